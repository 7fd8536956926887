"""`swift-cl run --train_params A.yaml --eval_params B.yaml`: EasyCL's two files, mapped or refused key by key."""

import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from swift_cl.cli.main import main
from swift_cl.errors import UserError
from swift_cl.training.flags import flag_values
from swift_cl.workflow.config import load_config
from swift_cl.workflow.easycl_call import EasyclCall, convert
from swift_cl.workflow.easycl_keys import EVAL_KEYS, METHOD_KEYS, METHODS, TRAIN_KEYS
from tests.support.stages import make_model

TRAIN: dict[str, Any] = {
    # As in EasyCL's examples: comments of LLaMA-Factory's files stand for the groups.
    "model_name_or_path": "base", "stage": "sft", "do_train": True, "finetuning_type": "lora", "lora_target": "all",
    "lora_rank": 8, "dataset": "t1,t2", "dataset_dir": "data", "template": "qwen", "cutoff_len": 512,
    "max_samples": 2, "overwrite_cache": True, "output_dir": "out", "learning_rate": 1.0e-4, "num_train_epochs": 1,
    "per_device_train_batch_size": 2, "seed": 7,
}  # fmt: skip
EVAL: dict[str, Any] = {"cl_tasks": "t1,t2", "save_dir": "scores", "batch_size": 16, "template": "qwen", "n_shot": 0}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """EasyCL's layout, as its working directory: a model, data/dataset_info.json, two tasks."""
    make_model(tmp_path / "base")
    (tmp_path / "data").mkdir()
    info = {}
    for task in ("t1", "t2"):
        for split in ("train", "test"):
            rows = [{"instruction": f"{task}?", "input": f"{split} {n}", "output": "yes"} for n in range(3)]
            (tmp_path / "data" / f"{task}_{split}.json").write_text(json.dumps(rows))
        info[task] = {"file_name": f"{task}_train.json", "formatting": "alpaca", "split": "train"}
        info[f"{task}_test"] = {"file_name": f"{task}_test.json", "split": "test"}
    (tmp_path / "data" / "dataset_info.json").write_text(json.dumps(info))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def call(folder: Path) -> Callable[..., EasyclCall]:
    """Convert the two files with some keys changed; `...` leaves one out. Keys of the second file begin with eval__."""

    def convert_with(benchmark_dir: Path | None = None, **changes: Any) -> EasyclCall:
        files = []
        for name, values in (("train", TRAIN), ("eval", EVAL)):
            own = {
                k.removeprefix("eval__"): v for k, v in changes.items() if k.startswith("eval__") == (name == "eval")
            }
            merged = {key: value for key, value in {**values, **own}.items() if value is not ...}
            files.append(folder / f"{name}.yaml")
            files[-1].write_text(yaml.safe_dump(merged))
        return convert(*files, benchmark_dir)

    return convert_with


def test_the_whole_mapping(folder: Path, call: Callable[..., EasyclCall]) -> None:
    found = call(use_ewc=True, ewc_lambda=5000, ewc_num_samples=64, use_gem=False)
    assert found.run == {
        "benchmark": "benchmark.yaml",
        "model": str(folder / "base"),
        "output_dir": str(folder / "out"),
        "method": "ewc",
        "seed": 7,
        "train": {
            "tuner_type": "lora", "target_modules": "all-linear", "lora_rank": 8, "template": "qwen2_5",
            "max_length": 512, "learning_rate": 1.0e-4, "num_train_epochs": 1, "per_device_train_batch_size": 2,
        },
        "method_settings": {"ewc": {"ewc_lambda": 5000, "ewc_fisher_samples": 64}},
        "eval": {"output": str(folder / "scores"), "max_batch_size": 16},
    }  # fmt: skip
    assert found.benchmark is not None
    assert found.benchmark["orders"] == {"default": ["t1", "t2"]}
    first = found.benchmark["tasks"][0]
    assert (first["train"], first["format"]) == (str(folder / "data" / "t1_train.json"), "alpaca")
    assert first["test"] == str(folder / "data" / "t1_test.json")
    assert first["train_limit"] == 2
    assert any(note.startswith("overwrite_cache is not needed") for note in found.notes)
    assert any(note.startswith("ewc_lambda: EasyCL's penalty has no gradient") for note in found.notes)


def test_what_is_written_runs(folder: Path, call: Callable[..., EasyclCall]) -> None:
    path = call(lora_target="q_proj, v_proj").write(folder / "made")
    config, benchmark = load_config(path, [])
    assert config.train["target_modules"] == ["q_proj", "v_proj"]
    assert [len(task.train_rows()) for task in benchmark.order()] == [2, 2]
    assert benchmark.tasks["t2"].test_rows()[1].turns == [("t2?\ntest 1", "yes")]


def test_the_command(folder: Path, call: Callable[..., EasyclCall], capsys: pytest.CaptureFixture[str]) -> None:
    call(use_replay=True)
    with pytest.raises(SystemExit) as stopped:
        main(["run", "--train_params", "train.yaml", "--eval_params", "eval.yaml", "--preview"])
    out, err = capsys.readouterr()
    assert stopped.value.code == 0, err
    commands = [shlex.split(line) for line in out.splitlines() if not line.startswith("#")]
    assert [command[1] for command in commands] == ["sft", "sft", "eval"]
    given = flag_values(commands[1][2:])
    assert (given["cl_method"], given["cl_task"], given["max_length"]) == (["replay"], ["t2"], ["512"])
    assert given["output_dir"] == [str(folder / "out" / "replay" / "stage_2_t2")]
    assert "note: overwrite_cache is not needed" in err
    assert not (folder / "out").exists(), "a preview writes nothing"


def test_benchmark_folder(folder: Path, call: Callable[..., EasyclCall], capsys: pytest.CaptureFixture[str]) -> None:
    info = {"mine": {"description": "", "orders": {"order1": ["t1", "t2"], "order2": ["t2", "t1"]}}}
    (folder / "data" / "benchmark_info.json").write_text(json.dumps(info))
    call(Path("data"), max_samples=..., dataset=...)
    argv = ["run", "--train_params", "train.yaml", "--eval_params", "eval.yaml", "--preview", "--order", "order2"]
    with pytest.raises(SystemExit) as stopped:
        main([*argv, "--benchmark_dir", "data"])
    out, err = capsys.readouterr()
    assert stopped.value.code == 0, err
    assert "# seq, seed 7: t2 -> t1 into" in out


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"learning_rat": 1}, "train.yaml: learning_rat has no counterpart in swift_cl; did you mean 'learning_rate'?"),
        ({"eval__batch_siz": 1}, "eval.yaml: batch_siz has no counterpart in swift_cl; did you mean 'batch_size'?"),
        ({"use_ewc": True, "use_gem": True}, "use_ewc and use_gem are true, expected one method"),
        ({"ewc_lambda": 1}, "ewc_lambda is a setting of ewc, but the method is seq"),
        ({"stage": "pt"}, "stage is 'pt', only 'sft' can be run"),
        ({"eval__n_shot": 5}, "eval.yaml: n_shot is 5, only 0 can be run"),
        ({"eval__cl_tasks": "t2,t1"}, "cl_tasks is ['t2', 't1'], but the training file learns ['t1', 't2']"),
        ({"eval__template": "llama3"}, "template is 'llama3', but the training file has template 'qwen'"),
        ({"template": "vicuna"}, "template 'vicuna' has no known counterpart in ms-swift"),
        ({"dataset": "t1,t3"}, "no train data for task 't3'"),
        ({"dataset": ...}, "dataset is missing"),
        ({"output_dir": ...}, "output_dir is missing"),
    ],
)
def test_refused(call: Callable[..., EasyclCall], changes: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError) as caught:
        call(**changes)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_both_files_are_needed(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for argv in (["--train_params", "a"], ["--eval_params", "a"], ["run.yaml", "--benchmark_dir", "data"]):
        with pytest.raises(SystemExit) as stopped:
            main(["run", *argv])
        assert stopped.value.code == 2
        assert "go together" in capsys.readouterr().err


def test_every_key_leads_to_a_flag_that_exists() -> None:
    from swift_cl.cli.main import build_parser
    from swift_cl.methods.base import flags_of
    from swift_cl.methods.registry import methods
    from swift_cl.training.arguments import check_known_flags

    check_known_flags(TRAIN_KEYS.values())
    for owner, flag, _ in METHOD_KEYS.values():
        assert flag in [name for name, _ in flags_of(methods()[owner])]
    for flag in EVAL_KEYS.values():
        build_parser().parse_args(["eval", "x", f"--{flag}", "1"])
    assert set(METHODS.values()) >= {"ewc", "lwf", "replay", "gem", "o_lora"}


def test_every_template_exists() -> None:
    from swift.template import TEMPLATE_MAPPING

    from swift_cl.workflow.easycl_keys import TEMPLATES

    assert set(TEMPLATES.values()) <= TEMPLATE_MAPPING.keys()
