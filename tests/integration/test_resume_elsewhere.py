"""A stage that was stopped continues under another number of processes and gives the weights of the whole run.

Engines: tests/distributed/test_resume_engines.py.
"""

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from swift_cl.errors import UserError
from swift_cl.training.portable import FILE, FOLDER
from tests.support.resuming import SETTINGS, apart, layout, rows_file, stop_after, train
from tests.support.train import TASKS, train_stage

pytestmark = pytest.mark.slow
METHOD = "cia"
"""Has a state of its own in every checkpoint: the moving averages and what they were last compared with."""
ROUNDING = 1e-4
"""Of what was moved: two processes add in another order, 1e-7 a step, and 8 steps are divided by an epsilon of 1e-3."""


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two stages in one process: `1`, and `whole`, which is not interrupted."""
    folder = tmp_path_factory.mktemp("elsewhere")
    train_stage(METHOD, TASKS[0], folder / "1", lora_dropout=0.0, max_steps=2)
    alone(folder, "whole")
    return folder


def alone(work: Path, name: str, **changes: Any) -> Any:
    settings = {**SETTINGS, "dataset": str(rows_file(work)), **layout(1), **changes}
    return train_stage(METHOD, TASKS[1], work / name, work / "1", **settings)


def test_one_process_continues_as_two_and_these_as_one(work: Path) -> None:
    """The rows of an epoch are not a multiple of two: two processes would leave one out and shuffle the others anew."""
    stop_after(work / "whole", 2, work / "two")
    done = train(METHOD, work / "two", work / "1", rows_file(work), processes=2)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert apart(work / "1", work / "whole", work / "two") < ROUNDING
    assert json.loads((work / "two" / "checkpoint-4" / FOLDER / FILE).read_text())["processes"] == 2
    stop_after(work / "two", 4, work / "one_again")
    alone(work, "one_again")
    assert apart(work / "1", work / "whole", work / "one_again") < ROUNDING


def test_the_portable_copy_holds_all_that_another_engine_needs(work: Path) -> None:
    """Weights, moments, steps and learning rate: as if DeepSpeed had written the checkpoint."""
    folder = stop_after(work / "whole", 4, work / "copied")
    checkpoint = folder / "checkpoint-4"
    state = checkpoint / FOLDER / FILE
    state.write_text(json.dumps({**json.loads(state.read_text()), "engine": "zero2"}))
    for file in ("optimizer.pt", "scheduler.pt"):
        (checkpoint / file).unlink()
    weights = checkpoint / "adapter_model.safetensors"
    save_file({name: tensor * 0 for name, tensor in load_file(weights).items()}, weights, {"format": "pt"})
    alone(work, "copied")
    assert apart(work / "1", work / "whole", folder) < ROUNDING


def test_other_accumulation(work: Path) -> None:
    """The same number of rows a step in smaller pieces is the same training."""
    stop_after(work / "whole", 4, work / "pieces")
    alone(work, "pieces", **layout(1, accumulation=2))
    assert apart(work / "1", work / "whole", work / "pieces") < ROUNDING


def test_other_number_of_rows_a_step_is_refused(work: Path) -> None:
    stop_after(work / "whole", 4, work / "larger")
    with pytest.raises(UserError) as refused:
        alone(work, "larger", gradient_accumulation_steps=2)
    message = str(refused.value)
    assert message.startswith(
        f"{work / 'larger' / 'checkpoint-4'}: was trained with 4 rows a step (1 process, no DeepSpeed)"
    )
    assert "now it would be 8" in message
    assert "\n" not in message


def test_without_a_portable_copy_only_the_engine_itself_continues(work: Path) -> None:
    stop_after(work / "whole", 2, work / "lean")
    for file in (work / "lean" / "checkpoint-2" / FOLDER).glob("*.safetensors"):
        file.unlink()
    state = work / "lean" / "checkpoint-2" / FOLDER / FILE
    state.write_text(json.dumps({**json.loads(state.read_text()), "engine": "zero2", "parameters": {}}))
    with pytest.raises(
        UserError, match=r"written by 1 process, --deepspeed zero2 without a portable copy \(--cl_portable\)"
    ):
        alone(work, "lean")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema": 2}, "not of schema 1"),
        ({"engine": "zero2", "optim": "sgd"}, "was trained with --optim sgd"),
        ({"engine": "zero2", "parameters": {"x": [1]}}, "other trained parameters than now: "),
    ],
)
def test_a_copy_that_does_not_fit_is_refused(work: Path, tmp_path: Path, change: dict[str, Any], message: str) -> None:
    copy = stop_after(work / "whole", 2, tmp_path / "2")
    state = copy / "checkpoint-2" / FOLDER / FILE
    state.write_text(json.dumps({**json.loads(state.read_text()), **change}))
    settings = {**SETTINGS, "dataset": str(rows_file(work)), **layout(1)}
    with pytest.raises(UserError, match=message):
        train_stage(METHOD, TASKS[1], copy, work / "1", **settings)


def test_portable_copies_can_be_left_out(work: Path) -> None:
    alone(work, "without", cl_portable=False, max_steps=2)
    folder = work / "without" / "checkpoint-2" / FOLDER
    assert [path.name for path in folder.iterdir()] == [FILE]
