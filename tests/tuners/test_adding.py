"""The example of assets/tuners/ADDING.md: found by its entry point, trained over two tasks, loaded again."""

import importlib.metadata
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from swift_cl.errors import UserError
from swift_cl.stages import load_stage
from swift_cl.tuners import registry
from swift_cl.tuners.moelora import MoELoRA
from swift_cl.tuners.registry import get_tuner, tuners
from tests.conftest import ROOT
from tests.support.train import MODEL, TASKS, adapter, train_stage

PAGE = ROOT / "assets" / "tuners" / "ADDING.md"
EntryPoint = importlib.metadata.EntryPoint


def entry_points(monkeypatch: pytest.MonkeyPatch, *entries: EntryPoint) -> None:
    original = importlib.metadata.entry_points

    def with_ours(**selection: str) -> list[EntryPoint]:
        return list(entries) if selection.get("group") == registry.ENTRY_POINT_GROUP else list(original(**selection))

    import peft  # noqa: F401 -- what it imports lists entry points of its own, in other forms
    import swift.pipelines  # noqa: F401

    monkeypatch.setattr(importlib.metadata, "entry_points", with_ours)
    tuners.cache_clear()


@pytest.fixture
def example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The two files of the page, importable, and its entry point."""
    description, model = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.M | re.S)
    (tmp_path / "gain.py").write_text(description)
    (tmp_path / "gain_model.py").write_text(model)
    monkeypatch.syspath_prepend(str(tmp_path))
    entry_points(monkeypatch, EntryPoint("gain", "gain:Gain", registry.ENTRY_POINT_GROUP))
    yield
    tuners.cache_clear()
    for name in ("gain", "gain_model"):
        sys.modules.pop(name, None)
    from swift.tuner_plugin import tuners_map

    tuners_map.pop("gain", None)


@pytest.mark.slow
def test_the_example_trains_over_two_tasks(tmp_path: Path, example: None) -> None:
    first, second = tmp_path / "1", tmp_path / "2"
    train_stage("seq", TASKS[0], first, tuner_type="gain", gain_factor=2.0)
    train_stage("seq", TASKS[1], second, first, tuner_type="gain")
    assert load_stage(second).tuner_type == "gain"
    assert all(name.endswith("gain_vector.weight") for name in adapter(second))
    assert any(bool(tensor.any()) for tensor in adapter(first).values())
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    again = get_tuner("gain").load(base, load_stage(second).weights_dir, False)
    assert again.peft_config["default"].factor == 2.0  # that of the first task
    with pytest.raises(UserError, match=r"--gain_factor is 3\.0, but the adapter that is continued .* has 2\.0"):
        train_stage("seq", TASKS[1], tmp_path / "3", first, tuner_type="gain", gain_factor=3.0)
    with pytest.raises(UserError, match=r"--gain_factor is 0\.0, allowed: a number > 0"):
        train_stage("seq", TASKS[1], tmp_path / "3", first, tuner_type="gain", gain_factor=0.0)


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("missing_package:Gain", "tuner plug-in 'gain' .missing_package:Gain. does not load: No module named"),
        ("pathlib:Path", "tuner plug-in 'gain' .pathlib:Path. is not a subclass of swift_cl's Tuner"),
    ],
)
def test_a_plug_in_that_is_none_is_named(monkeypatch: pytest.MonkeyPatch, value: str, said: str) -> None:
    entry_points(monkeypatch, EntryPoint("gain", value, registry.ENTRY_POINT_GROUP))
    with pytest.raises(UserError, match=said):
        tuners()
    monkeypatch.undo()
    tuners.cache_clear()


@pytest.mark.parametrize(
    ("what", "value", "owner"),
    [
        ("peft_type", "MOELORA", r"swift_cl\.tuners\.moelora"),
        ("name", "moelora", r"swift_cl\.tuners\.moelora"),
        ("name", "lora", "ms-swift"),
    ],
)
def test_a_name_or_type_that_is_taken_is_named(
    monkeypatch: pytest.MonkeyPatch, example: None, what: str, value: str, owner: str
) -> None:
    gain = get_tuner("gain")
    monkeypatch.setattr(gain, what, value)
    tuners.cache_clear()
    said = f"uses the name {gain.name!r} or the type {gain.peft_type}, which is taken by {owner}"
    with pytest.raises(UserError, match=said):
        tuners()


def test_a_tuner_of_ours_may_have_an_entry_point_too(monkeypatch: pytest.MonkeyPatch) -> None:
    entry_points(monkeypatch, EntryPoint("moelora", "swift_cl.tuners.moelora:MoELoRA", registry.ENTRY_POINT_GROUP))
    assert tuners()["moelora"] is MoELoRA
    monkeypatch.undo()
    tuners.cache_clear()


def test_an_unknown_tuner_is_named() -> None:
    with pytest.raises(UserError, match=r"--tuner_type 'moe_lora' is unknown, allowed: .*did you mean 'moelora'"):
        get_tuner("moe_lora")
