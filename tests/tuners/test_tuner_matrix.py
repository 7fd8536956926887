"""The shared matrix of the tuners: each trained for real on two tasks, resumed, loaded again and served.

A new tuner is tested by being registered. Each is trained once over two tasks; the tests read what that left.
"""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from swift_cl.errors import RunFailure, UserError
from swift_cl.evaluation.grid import EvalOptions, evaluate
from swift_cl.evaluation.plan import GridOptions
from swift_cl.io import read_json
from swift_cl.serving.adapters import is_all_zero, stage_adapter
from swift_cl.stages import Run, Stage, load_stage, stage_dir_name
from swift_cl.training import probe as probe_module
from swift_cl.tuners.registry import get_tuner, tuners
from tests.conftest import ROOT
from tests.integration.test_serving_probe import watched_gaps
from tests.support.train import MODEL, NEWS, TASKS, adapter, assert_equal_up_to_rounding, train_stage
from tests.support.tuners import NAMES, flags_for

pytestmark = [pytest.mark.slow, pytest.mark.parametrize("tuner", NAMES)]


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tuners")


_LIVE: dict[str, Any] = {}


def two_stages(work: Path, tuner: str, label: str = "reference", **changes: Any) -> tuple[Path, Path]:
    """Folders of the two stages, trained once a session and label; the second one's `CLSft` is kept in `_LIVE`."""
    folder = work / label / tuner
    first, second = (folder / stage_dir_name(index, task) for index, task in enumerate(TASKS))
    if not (second / "stage.json").is_file():
        train_stage("seq", TASKS[0], first, **flags_for(tuner), **changes)
        sft = train_stage("seq", TASKS[1], second, first, **flags_for(tuner), **changes)
        if label == "reference":
            _LIVE[tuner] = sft
    return first, second


def same(one: dict[str, Any], two: dict[str, Any]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def loaded(tuner: str, stage: Stage, trainable: bool) -> Any:
    """The base model with the adapter of a stage, loaded anew."""
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    return get_tuner(tuner).load(base, stage.weights_dir, trainable)


def logits(model: Any) -> Any:
    ids = torch.arange(3, 40).reshape(1, -1)
    with torch.no_grad():
        return model.eval()(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[:, -37:]


def test_two_tasks_chain(work: Path, tuner: str) -> None:
    first, second = two_stages(work, tuner)
    one, two = load_stage(first), load_stage(second)
    assert two.started_from == {"dir": f"../{first.name}", "weights_sha256": one.weights_sha256}
    assert one.tuner_type == two.tuner_type == tuner
    assert read_json(two.weights_dir / "adapter_config.json")["peft_type"] == get_tuner(tuner).peft_type
    assert not is_all_zero(stage_adapter(one))
    assert adapter(first).keys() == adapter(second).keys()
    assert not same(adapter(first), adapter(second)), "the second task changed nothing"
    assert all(bool(torch.isfinite(tensor).all()) for tensor in adapter(second).values())


def test_the_base_model_stays_bit_identical(work: Path, tuner: str) -> None:
    from safetensors.torch import load_file

    two_stages(work, tuner)
    base = get_tuner(tuner).base_of(_LIVE[tuner].trainer.model)
    kept = {name: tensor.float() for name, tensor in load_file(MODEL / "model.safetensors").items()}
    live = {name: tensor.detach() for name, tensor in base.state_dict().items() if name in kept}
    assert len(live) > 20
    assert same(live, {name: kept[name] for name in live})


def test_kept_is_what_is_loaded(work: Path, tuner: str) -> None:
    """To be served, and to be trained on: the same function, and the same tensors in the file again."""
    _, second = two_stages(work, tuner)
    stage = load_stage(second)
    served, trained = loaded(tuner, stage, False), loaded(tuner, stage, True)
    assert torch.allclose(logits(served), logits(trained), atol=1e-5)
    assert same(dict(get_tuner(tuner).live_tensors(trained)), adapter(second))
    assert any(parameter.requires_grad for parameter in trained.parameters())
    folder = work / "saved" / tuner
    get_tuner(tuner).save(trained, folder, None)
    from safetensors.torch import load_file

    assert same(load_file(folder / "adapter_model.safetensors"), adapter(second))


def test_resumed_equals_uninterrupted(work: Path, tmp_path: Path, tuner: str) -> None:
    first, second = two_stages(work, tuner)
    copy = tmp_path / second.name
    shutil.copytree(second, copy, symlinks=True)
    for name in ("stage.json", "adapter", "cl_state", "last-checkpoint", "checkpoint-4"):
        path = copy / name
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)
    resumed = train_stage("seq", TASKS[1], copy, first, **flags_for(tuner))
    assert resumed.trainer.state.global_step == 4
    assert same(adapter(copy), adapter(second))


def test_accumulation_changes_nothing(work: Path, tuner: str) -> None:
    """Batch 4 x accumulation 1 equals batch 1 x accumulation 4."""
    plain = {"optim": "sgd", "learning_rate": 0.05, "lora_dropout": 0.0, "save_steps": 100, "max_steps": 3}
    first, whole = two_stages(work, tuner, "whole", **plain)
    split, halves = work / "split" / tuner, {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}
    train_stage("seq", TASKS[1], split, first, **flags_for(tuner), **plain, **halves)
    assert_equal_up_to_rounding(first, whole, split)


def test_a_stage_that_starts_from_other_weights_is_stopped(
    work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tuner: str
) -> None:
    from swift.pipelines import SwiftSft

    first, _ = two_stages(work, tuner)
    original = SwiftSft.prepare_model

    def loses_weights(self: object, *args: object, **kwargs: object) -> object:
        model = original(*args, **kwargs)
        with torch.no_grad():
            next(p for p in model.parameters() if p.requires_grad).mul_(0.5)
        return model

    monkeypatch.setattr(SwiftSft, "prepare_model", loses_weights)
    with pytest.raises(RunFailure, match="loaded with other values: the chain is broken"):
        train_stage("seq", TASKS[1], tmp_path / "2", first, **flags_for(tuner))


def test_another_tuner_does_not_continue_it(work: Path, tmp_path: Path, tuner: str) -> None:
    first, _ = two_stages(work, tuner)
    with pytest.raises(UserError, match=f"--tuner_type is 'lora', but the previous stage .* used '{tuner}'"):
        train_stage("seq", TASKS[1], tmp_path / "2", first)
    kind = get_tuner(tuner).peft_type
    with pytest.raises(UserError, match=f"an adapter of type {kind}, which --tuner_type lora does not continue"):
        train_stage("seq", TASKS[1], tmp_path / "2", adapters=str(load_stage(first).weights_dir))


def test_served_with_pt(work: Path, tuner: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server of base and both stages: each answers as it did right after its training."""
    first, second = two_stages(work, tuner)
    stages = [load_stage(first), load_stage(second)]
    run, one = first.parent, stages[0]
    Run(
        run, "run", str(NEWS / "benchmark.yaml"), None, list(TASKS), "seq", one.base_model, one.model_args, 1, []
    ).save()
    gaps = watched_gaps(monkeypatch)
    options = EvalOptions(GridOptions(test_limit=1), scorers=("exact_match",), max_tokens=4)
    assert evaluate([run], options, notify=print).complete
    assert len(gaps) == 2
    assert max(gaps.values()) < 1e-3, gaps
    answers = {stage.dir.name: stage.probe for stage in stages}
    tops = [probe["logprobs"] for probe in answers.values() if probe is not None]
    assert len(tops) == 2
    assert tops[0] != tops[1]
    assert len(tops[0]) == probe_module.TOP


def test_page(tuner: str) -> None:
    """One page a tuner, in one form; its table of flags is the config dataclass."""
    from tests.support.method_pages import flag_table

    text = (ROOT / "assets" / "tuners" / f"{tuner}.md").read_text(encoding="utf-8")
    headings = [line for line in text.splitlines() if line.startswith("## ")]
    reference = (ROOT / "assets" / "tuners" / "lora.md").read_text(encoding="utf-8").splitlines()
    assert headings == [line for line in reference if line.startswith("## ")]
    assert flag_table(tuners()[tuner].flags(), "tuner") in text, (
        f"paste the output of: python -m tests.support.method_pages {tuner}"
    )
