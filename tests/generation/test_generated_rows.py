"""Whole stages whose rows are really generated, by a small base model that continues lists."""

import shutil

import pytest
import torch

from swift_cl.io import read_json, read_jsonl
from tests.support.synthesised import DEFINITION
from tests.support.talking_base import THINGS, talking_base, write_things
from tests.support.train import adapter, train_stage

pytestmark = pytest.mark.slow
SYNTHESIS = {"num_samples": 4, "max_new_tokens": 48, "shots": 2, "min_fill": 1.0}
METHODS = {
    "ssr": {"embedder": "model", "clusters": 2, **SYNTHESIS},
    "pseudo_replay": SYNTHESIS,
    "lamol": {"gamma": 0.25, "max_new_tokens": 64, "min_fill": 1.0},
    "lfpt5": {
        **{"num_per_task": 4, "max_new_tokens": 64, "min_fill": 1.0, "max_rounds": 5},
        **{"prompt_length": 1, "init": "labels", "repetition_penalty": 1.0},  # the base model talks if left alone
    },
    "lamol_kd": {"gamma": 0.25, "max_new_tokens": 64, "min_fill": 1.0},
}


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    folder = tmp_path_factory.mktemp("generated")
    talking_base(folder / "base")
    write_things(folder / "first.json", "a")  # as in the lists that the base model continues
    write_things(folder / "second.json", "the")
    return folder


def train(method, folder, output, kind, previous, **changes):
    flags = {f"{method}_{name}": value for name, value in METHODS.get(method, {}).items()}
    common = {"model": str(folder / "base"), "dataset": str(folder / f"{kind}.json"), "save_steps": 100, "system": ""}
    return train_stage(method, kind, output, previous, **{**common, **flags, **changes})


@pytest.mark.parametrize("method", METHODS)
def test_generated_rows_are_trained_on(work, tmp_path, method):
    train(method, work, tmp_path / "1", "first", None, learning_rate=1e-5)
    train(method, work, tmp_path / "2", "second", tmp_path / "1")
    rows = read_jsonl(tmp_path / "2" / "cl_data" / "train.jsonl")
    own = [row for row in rows if not row.get("channel", "").endswith("/lm")]
    assert len(own) == len(THINGS) + 4
    new = [row["messages"] for row in own[len(THINGS) :]]
    for messages in new:
        assert [m["role"] for m in messages] == ["system", "user", "assistant"]
        assert messages[1]["content"].startswith(f"{DEFINITION}\n\n")
        assert messages[2]["content"].strip()
    assert len({messages[1]["content"] for messages in new}) == 4
    assert read_json(tmp_path / "2" / "cl_state" / f"{method}.manifest.json")["own_rows"] == len(THINGS)
    # Killed before its first checkpoint and started again, the stage draws nothing anew and ends the same.
    again = tmp_path / "again"
    shutil.copytree(tmp_path / "2" / "cl_data", again / "cl_data")
    rounds = {path: path.stat().st_mtime_ns for path in again.rglob("r?-*.jsonl")}
    assert rounds
    train(method, work, again, "second", tmp_path / "1")
    assert {path: path.stat().st_mtime_ns for path in again.rglob("r?-*.jsonl")} == rounds
    for name, tensor in adapter(tmp_path / "2").items():
        assert torch.equal(tensor, adapter(again)[name]), name
