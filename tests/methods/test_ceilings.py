"""single and mtl: what a task reaches alone, and what all tasks reach together."""

import json
from pathlib import Path

import pytest
import torch

from swift_cl.errors import UserError
from swift_cl.io import MethodState, load_method_state, read_jsonl, save_method_state
from swift_cl.methods.base import Method
from swift_cl.methods.mtl import Mtl, MtlConfig
from swift_cl.methods.single import Single
from swift_cl.stages import load_stage
from swift_cl.training.preflight import start_of_stage
from tests.support.fake_context import FakeContext
from tests.support.stages import make_model, make_stage
from tests.support.train import NEWS, TASKS, adapter, train_stage


def rows(*names: str) -> list[dict[str, object]]:
    return [{"messages": [{"role": "user", "content": name}]} for name in names]


def test_joint_training_takes_the_rows_of_all_tasks_in_order(tmp_path: Path) -> None:
    state: MethodState | None = None
    seen = []
    for index, own in enumerate((rows("a", "b"), rows("c"), rows("d", "e"))):
        ctx = FakeContext(earlier=[f"t{i}" for i in range(index)], state=state)
        ctx.rows = own
        method = Mtl(MtlConfig())
        used = method.prepare_task(ctx, own)
        assert (used is own) == (index == 0)  # the same list says that the data is unchanged
        seen.append([row["messages"][0]["content"] for row in used])
        ended = method.end_task(ctx)
        assert ended.meta == {"rows": (2, 3, 5)[index]}
        save_method_state(tmp_path / str(index), "mtl", ended)
        state = load_method_state(tmp_path / str(index), "mtl")
    assert seen == [["a", "b"], ["a", "b", "c"], ["a", "b", "c", "d", "e"]]


def test_only_joint_training_needs_the_rows_themselves() -> None:
    """It stores them; a model of its own for every task may also read them from a stream."""
    assert (Mtl.needs_rows, Single.needs_rows) == (True, False)


@pytest.mark.parametrize("method", [Single, Mtl])
def test_a_fresh_stage_continues_no_adapter_but_the_same_base(method: type[Method], tmp_path: Path) -> None:
    base, other = make_model(tmp_path / "base"), make_model(tmp_path / "other", seed=1)
    previous = make_stage(tmp_path / "1", base_model=str(base))
    assert start_of_stage({"model": [str(base)]}, previous, method) == (None, None)
    assert start_of_stage({"model": [str(base)]}, previous)[0] == str(previous.weights_dir)
    with pytest.raises(UserError, match="trained on base model"):
        start_of_stage({"model": [str(other)]}, previous, method)
    with pytest.raises(UserError, match=f"--adapters does not work with method '{method.name}'"):
        start_of_stage({"model": [str(base)], "adapters": [str(previous.weights_dir)]}, previous, method)


@pytest.mark.slow
def test_the_second_task_of_single_is_what_the_task_alone_gives(tmp_path: Path) -> None:
    train_stage("single", TASKS[0], tmp_path / "1")
    train_stage("single", TASKS[1], tmp_path / "2", tmp_path / "1")
    train_stage("seq", TASKS[1], tmp_path / "alone")
    ours, alone = adapter(tmp_path / "2"), adapter(tmp_path / "alone")
    assert ours.keys() == alone.keys()
    assert all(torch.equal(ours[name], alone[name]) for name in ours)
    assert load_stage(tmp_path / "2").started_from is not None  # the chain is still recorded


@pytest.mark.slow
def test_joint_training_for_real(tmp_path: Path) -> None:
    """The second stage trains on both files' rows, each with its own system prompt, from a new adapter."""
    train_stage("mtl", TASKS[0], tmp_path / "1")
    sft = train_stage("mtl", TASKS[1], tmp_path / "2", tmp_path / "1")
    sizes = [len(json.loads((NEWS / f"{task}-train.json").read_text(encoding="utf-8"))) for task in TASKS]
    used = read_jsonl(tmp_path / "2" / "cl_data" / "train.jsonl")
    assert len(used) == sum(sizes) == len(sft.trainer.train_dataset)
    systems = [row["messages"][0]["content"] for row in used]
    assert systems == [f"News of {TASKS[0]}."] * sizes[0] + [f"News of {TASKS[1]}."] * sizes[1]
