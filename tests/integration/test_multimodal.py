"""Tasks with images: every method trains on them or refuses them, and the evaluator really shows the pictures."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from swift_cl.errors import UserError
from swift_cl.methods._frozen_teacher import rows_of_batch
from swift_cl.methods._generating import GenerationConfig
from swift_cl.methods.registry import methods
from swift_cl.stages import load_stage
from tests.support.commands import run_swift_cl
from tests.support.seeing_base import SHAPES, why_not_qwen2_vl, write_pictures
from tests.support.train import FLAGS, METHOD_FLAGS, NEWS, TASKS, adapter, train_stage

pytestmark = pytest.mark.slow

SHORT = {"max_steps": 2, "per_device_train_batch_size": 8, "lora_dropout": 0.0, "save_steps": 100}


@dataclass(frozen=True)
class Shown:
    """A folder with the untrained model in `base` and two tasks that ask for a picture's colour in different words."""

    folder: Path
    flags: dict[str, Any]


@pytest.fixture(scope="module", params=sorted(SHAPES))
def shown(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Shown:
    """One for every shape of model."""
    reason = why_not_qwen2_vl() if request.param == "qwen2_vl" else None
    if reason:
        pytest.skip(reason)
    folder = tmp_path_factory.mktemp(request.param)
    SHAPES[request.param].make(folder / "base")
    for name in ("colour", "paint"):
        write_pictures(folder, f"{name}-train", name, (0, 6, 12, 18))
        write_pictures(folder, f"{name}-test", name, (3, 15))
    return Shown(folder, SHAPES[request.param].flags)


def data(shown: Shown, task: str) -> dict[str, Any]:
    file = shown.folder / f"{task}-train.json"
    return {"model": str(shown.folder / "base"), "dataset": str(file), "system": None, **shown.flags, **SHORT}


def refuses(method: str) -> str | None:
    """What those say to pictures that generate or classify text or put prompts in front of it; None for the others."""
    found = methods()[method]
    if found.support.tuners == ("soft_prompt",):
        return r": a multimodal model does not work with --tuner_type soft_prompt$"
    generates = method == "sdft" or issubclass(found.config_class, GenerationConfig)
    if not generates and not found.classifies:
        return None
    does = "classifies" if found.classifies else "generates"
    return rf"^method '{method}' {does} text, but row 0 of task 'colour' has images$"


@pytest.mark.parametrize("method", sorted(name for name in methods() if not refuses(name)))
def test_every_method_trains_on_pictures(method: str, shown: Shown, tmp_path: Path) -> None:
    first, second = tmp_path / "1", tmp_path / "2"
    train_stage(method, "colour", first, **data(shown, "colour"))
    train_stage(method, "paint", second, first, **data(shown, "paint"))
    assert load_stage(second).weights_dir.is_dir()
    one, two = adapter(first), adapter(second)
    assert any(name not in one or not torch.equal(one[name], two[name]) for name in two)


def test_a_row_is_collated_again_with_its_picture(shown: Shown, tmp_path: Path) -> None:
    """As a method's memory does at every step."""
    session = train_stage("seq", "colour", tmp_path / "1", **{**data(shown, "colour"), "max_steps": 1}).session
    encoded = session.encode(session.rows[:2])
    first, again = session.collate(encoded), session.collate(encoded)
    assert "pixel_values" in first
    assert first.keys() == again.keys()
    assert torch.equal(first["pixel_values"], again["pixel_values"])


def text(shown: Shown, task: str) -> dict[str, Any]:
    """Rows without a picture, in batches of three: as many as Qwen2-VL's positions have planes."""
    rows = {"dataset": str(NEWS / f"{task}-train.json"), "per_device_train_batch_size": 3, "lazy_tokenize": True}
    return {**data(shown, "colour"), **rows}


def test_rows_of_a_batch_of_text_keep_their_positions(shown: Shown, tmp_path: Path) -> None:
    """What a teacher or a slow learner is given: some rows of a batch, which then answer as they did in it."""
    sft = train_stage("seq", TASKS[0], tmp_path / "1", **{**text(shown, TASKS[0]), "max_steps": 1})
    batch = sft.session.collate(sft.session.encode(sft.session.rows[:3]))
    assert len(batch["labels"]) == 3
    model = sft.trainer.model.eval()
    with torch.no_grad():
        every, some = (model(**inputs).logits for inputs in (batch, rows_of_batch(batch, torch.tensor([2, 0]))))
    for row, found in zip((2, 0), some, strict=True):
        real = batch["labels"][row] != -100
        assert real.any()
        assert torch.allclose(every[row][real], found[real], atol=1e-4)


@pytest.mark.parametrize(("method", "flags"), [("lwf", {"lwf_tokens": "all"}), ("i_lora", METHOD_FLAGS["i_lora"])])
def test_methods_that_cut_batches_train_on_text(
    method: str, flags: dict[str, Any], shown: Shown, tmp_path: Path
) -> None:
    first, second = tmp_path / "1", tmp_path / "2"
    train_stage(method, TASKS[0], first, **{**text(shown, TASKS[0]), **flags})
    train_stage(method, TASKS[1], second, first, **{**text(shown, TASKS[1]), **flags})
    one, two = adapter(first), adapter(second)
    assert all(bool(torch.isfinite(tensor).all()) for tensor in two.values())
    assert any(not torch.equal(one[name], two[name]) for name in one.keys() & two.keys())


@pytest.mark.parametrize("method", sorted(filter(refuses, methods())))
def test_methods_of_text_alone_refuse_pictures(method: str, shown: Shown, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=refuses(method)):
        train_stage(method, "colour", tmp_path / "1", **data(shown, "colour"))


def test_two_tasks_are_learned_and_asked_with_their_pictures(shown: Shown) -> None:
    """All rows of a task ask the same words, so that only a model that is shown the picture can be right each time."""
    tasks = [{"name": t, "train": f"{t}-train.json", "test": f"{t}-test.json"} for t in ("colour", "paint")]
    (shown.folder / "benchmark.yaml").write_text(yaml.safe_dump({"name": "pictures", "tasks": tasks}))
    train = {**FLAGS, **shown.flags, "max_steps": 40, "per_device_train_batch_size": 16, "learning_rate": 1e-2}
    train |= {"lora_rank": 8, "lora_dropout": 0.0, "save_steps": 1000, "logging_steps": 20}
    del train["add_version"]
    config = {
        "benchmark": "benchmark.yaml", "model": str(shown.folder / "base"), "output_dir": "runs", "method": ["seq"],
        "train": train, "eval": {"infer_backend": "pt", "scorer": ["exact_match"], "max_tokens": 8},
    }  # fmt: skip
    (shown.folder / "run.yaml").write_text(yaml.safe_dump(config))
    run_swift_cl("run", str(shown.folder / "run.yaml"))
    found = json.loads((shown.folder / "runs" / "seq" / "results.json").read_text())["scorers"]["exact_match"]
    assert found["base"] == [0, 0]
    assert found["metrics"]["new_acc"] > 80, "four colours: one answer for all of them gives 25"
