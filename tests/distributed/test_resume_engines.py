"""A stage that was stopped continues under another engine and gives the weights of the whole run (fp32).

On demand: `sh tests/run.sh --distributed`. Numbers of processes alone: tests/integration/test_resume_elsewhere.py.
"""

import os
from pathlib import Path

import pytest

from tests.support.resuming import apart, rows_file, stop_after, train
from tests.support.train import TASKS, train_stage

pytest.importorskip("deepspeed", reason="needs deepspeed")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(os.environ.get("SWIFT_CL_DISTRIBUTED") != "all", reason="on demand: tests/run.sh --distributed"),
]
ROUNDING = 1e-4
WHOLE = "zero2"
# (continued from, at its step, new name, processes, engine). Every engine is left and entered, and ends as it began.
CHAIN = [
    (WHOLE, 2, "one", 1, None),
    (WHOLE, 2, "ddp", 2, None),
    (WHOLE, 4, "zero3", 2, "zero3"),
    (WHOLE, 2, "zero2_alone", 1, "zero2"),
    ("ddp", 4, "zero1", 2, "zero1"),
    ("zero1", 6, "zero0", 2, "zero0"),
    ("zero3", 6, "zero2_again", 2, "zero2"),
    ("zero3", 6, "one_again", 1, None),
    (WHOLE, 4, "fsdp2", 2, "fsdp2"),
    ("fsdp2", 6, "fsdp2_again", 2, "fsdp2"),
    ("fsdp2", 6, "one_after_fsdp2", 1, None),
    ("fsdp2", 6, "zero3_after_fsdp2", 2, "zero3"),
]


@pytest.fixture(scope="module", params=["cia", "ewc"])
def work(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A first stage, and a second one that is not interrupted."""
    folder = tmp_path_factory.mktemp("resumed") / request.param
    folder.mkdir()
    train_stage(request.param, TASKS[0], folder / "1", lora_dropout=0.0, max_steps=2)
    done = train(request.param, folder / WHOLE, folder / "1", rows_file(folder), 2, WHOLE)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return folder


@pytest.mark.parametrize(("before", "step", "name", "processes", "engine"), CHAIN, ids=[link[2] for link in CHAIN])
def test_continued_elsewhere(work: Path, before: str, step: int, name: str, processes: int, engine: str | None) -> None:
    stop_after(work / before, step, work / name)
    done = train(work.name, work / name, work / "1", rows_file(work), processes, engine)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert apart(work / "1", work / WHOLE, work / name) < ROUNDING
