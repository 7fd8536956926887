"""Small real trainings through our own SwiftSft, in this process, with the tiny model that ships with the project."""

import functools
import gc
import os
from pathlib import Path
from typing import Any

from tests.conftest import ROOT

MODEL = ROOT / "assets" / "tiny_base"
NEWS = ROOT / "datasets" / "continual_news_mini"
CLASSES = ROOT / "tests" / "data" / "classes"
"""Classification tasks of the same names."""
TASKS = ("2022", "2023")

FLAGS: dict[str, Any] = {
    "model_type": "qwen2",
    "template": "qwen2_5",
    "torch_dtype": "float32",
    "max_steps": 4,
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 1,
    "learning_rate": 2e-3,
    "save_steps": 2,
    "logging_steps": 1,
    "lora_rank": 4,
    "lora_dropout": 0.05,
    "dataset_num_proc": 1,
    "dataloader_num_workers": 0,
    "check_model": False,
    "report_to": "none",
    "add_version": False,
    "save_total_limit": 10,
    "use_cpu": True,
}
# Settings that make a method act within a few steps on a few rows.
METHOD_FLAGS: dict[str, dict[str, Any]] = {
    "ewc": {"ewc_fisher_samples": 8},
    "replay": {"replay_ratio": 0.5},
    "gem": {"gem_mem_batch": 4},
    "moe_lora": {"moe_lora_num_experts": 2},
    "cl_moe": {"moe_lora_num_experts": 4, "cl_moe_count_rows": 8},
    "i_lora": {"i_lora_lambda": 0.9, "i_lora_mem_ratio": 1.0},
    # The tiny model continues no lists, so nothing usable is generated; test_generated_rows.py has one that does.
    "ssr": {
        "ssr_num_samples": 2,
        "ssr_shots": 1,
        "ssr_embedder": "model",
        "ssr_max_new_tokens": 12,
        "ssr_min_fill": 0.0,
    },
    "pseudo_replay": {
        "pseudo_replay_num_samples": 2,
        "pseudo_replay_shots": 1,
        "pseudo_replay_max_new_tokens": 12,
        "pseudo_replay_min_fill": 0.0,
    },
    "lamol": {"lamol_max_new_tokens": 24, "lamol_max_rounds": 1, "lamol_min_fill": 0.0},
    "l2kd": {"l2kd_first_task": "plain", "l2kd_max_new_tokens": 24, "l2kd_max_rounds": 1, "l2kd_min_fill": 0.0},
    "lamol_kd": {"lamol_kd_max_new_tokens": 24, "lamol_kd_max_rounds": 1, "lamol_kd_min_fill": 0.0},
    "seq_star": {"seq_star_labels": str(CLASSES / "labels.json")},
    "sdft": {"sdft_max_new_tokens": 6},
    "pcll": {"pcll_z_dim": 8, "pcll_max_new_tokens": 24, "pcll_max_rounds": 1, "pcll_min_fill": 0.0},
    "lfpt5": {
        "lfpt5_prompt_length": 5,
        "lfpt5_task_type": "news",
        "lfpt5_max_new_tokens": 24,
        "lfpt5_max_rounds": 1,
        "lfpt5_min_fill": 0.0,
    },
    "dynamic_conpet_cls": {
        "dynamic_conpet_cls_labels": str(CLASSES / "labels.json"),
        "dynamic_conpet_cls_batch_limit": 3,
        "dynamic_conpet_cls_memory": 8,
    },
    "dynamic_conpet": {"dynamic_conpet_batch_limit": 3, "dynamic_conpet_memory": 8},
}
# Methods whose first task has more to learn than the task, or is kept in another form than it is trained in.
MORE_THAN_THE_TASK = (
    "abscl", "cl_moe", "dynamic_conpet_cls", "l2kd", "lamol", "lamol_kd", "lfpt5", "pcll", "prog_prompt", "sdft",
    "seq_star",
)  # fmt: skip
# Methods that train on what an untouched base model generates, which the tiny one cannot do.
NEED_A_TALKING_BASE = ("ssr", "pseudo_replay")


def stage_argv(method: str, task: str, output_dir: Path, previous: Path | None = None, **changes: Any) -> list[str]:
    """Flags of one small stage; `changes` win, None leaves a flag out."""
    from swift_cl.methods.registry import methods
    from swift_cl.workflow.plan import flags

    known = methods().get(method)  # None for a plug-in that is installed in another process only
    data = CLASSES / f"{task}.json" if known is not None and known.classifies else NEWS / f"{task}-train.json"
    values = {
        "model": str(MODEL),
        "dataset": str(data),
        "output_dir": str(output_dir),
        "system": f"News of {task}.",
        "cl_method": method,
        "cl_task": task,
        "cl_resume": True,
        "cl_previous": str(previous) if previous else None,
        **FLAGS,
        **METHOD_FLAGS.get(method, {}),
        **changes,
    }
    if values.get("tuner_type") == "full":
        values["lora_rank"] = values["lora_dropout"] = None
    return flags(values)


@functools.cache
def _leave_imports_alone() -> None:
    """Take what is there out of garbage collection: accelerate collects after every training, and most of what it would
    look through, half a second each time, is the modules of the libraries."""
    gc.collect()
    gc.freeze()


def train_stage(method: str, task: str, output_dir: Path, previous: Path | None = None, **changes: Any) -> Any:
    """Train one stage here; returns the finished `CLSft`."""
    os.environ.setdefault("LOG_LEVEL", "ERROR")
    from swift_cl.models import register_models
    from swift_cl.training.sft import CLSft
    from swift_cl.tuners import register_tuners

    register_tuners()
    register_models()
    _leave_imports_alone()
    sft = CLSft(stage_argv(method, task, output_dir, previous, **changes))
    sft.main()
    return sft


def adapter(stage_dir: Path) -> dict[str, Any]:
    """The tensors of a finished stage."""
    from safetensors.torch import load_file

    from swift_cl.stages import load_stage

    folder = load_stage(stage_dir).weights_dir
    tensors: dict[str, Any] = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(file)
    return tensors


def contradicting_rows(folder: Path) -> tuple[Path, Path]:
    """Two data files with the same questions and different answers: learning the second must unlearn the first."""
    import json

    rows = json.loads((NEWS / f"{TASKS[0]}-train.json").read_text(encoding="utf-8"))[:8]
    one, two = folder / "one.json", folder / "two.json"
    one.write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    answers = [row["messages"][1]["content"] for row in rows]
    for row, answer in zip(rows, answers[1:] + answers[:1], strict=True):
        row["messages"] = [row["messages"][0], {"role": "assistant", "content": answer}]
    two.write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    return one, two


def assert_equal_up_to_rounding(start: Path, one: Path, two: Path) -> None:
    """Two trainings from `start` agree to 1 % of what they moved (a wrong factor would be off by 100 % and more).

    Where an adapter grows by the new task's pair, what moved is its B, which begins at 0.
    """
    a, b, origin = adapter(one), adapter(two), adapter(start)
    assert a.keys() == b.keys()
    grown = {name: tensor[:, origin[name].shape[1] :] for name, tensor in a.items() if "lora_B" in name}
    if any(part.numel() for part in grown.values()):
        moved = max(part.abs().max().item() for part in grown.values())
    else:
        same = [name for name in a if name in origin and a[name].shape == origin[name].shape]
        moved = max((a[name] - origin[name]).abs().max().item() for name in same)
    apart = max((a[name] - b[name]).abs().max().item() for name in a)
    assert moved > 0
    assert apart <= 0.01 * moved, f"moved by {moved}, but {apart} apart"
