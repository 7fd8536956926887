"""Two processes under every engine compute what one process computes: weights of the second task, per method, in fp32.

The whole matrix takes half an hour on two cores: `sh tests/run.sh --distributed`. Otherwise two cells run, others for
every commit.
"""

import os
import random
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from swift_cl.methods.registry import methods
from tests.support.chains import STAGES, run_chain
from tests.support.train import assert_equal_up_to_rounding, contradicting_rows

pytest.importorskip("deepspeed", reason="needs deepspeed")
pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
WHOLE = os.environ.get("SWIFT_CL_DISTRIBUTED") == "all"
PART = 2
"""Cells for a commit."""
# fp32 keeps one process and two comparable; ms-swift takes float32 for a request of fp16 training.
FP32 = {"fp16": False, "bf16": False}
FSDP = -1
"""In place of a ZeRO stage."""
ENGINES: dict[str, tuple[int, dict[str, Any]]] = {
    "zero0": (0, {"deepspeed": "zero0", **FP32}),
    "zero1": (1, {"deepspeed": "zero1", **FP32}),
    "zero2": (2, {"deepspeed": "zero2", **FP32}),
    "zero3": (3, {"deepspeed": "zero3", **FP32}),
    "fsdp2": (FSDP, {"fsdp": "fsdp2", **FP32}),
    "zero2_offload": (2, {"deepspeed": "zero2_offload", **FP32}),
    "zero3_offload": (3, {"deepspeed": "zero3_offload", **FP32}),
}
"""ZeRO stage (or `FSDP`) and settings by name. DDP is in tests/integration/test_two_processes.py, for every method."""
ON_DEMAND = ("zero2_offload", "zero3_offload")
"""Engines of the whole matrix only: their optimizer is compiled first, which takes minutes."""


def cells() -> Iterator[tuple[str, str]]:
    """(engine, method) of everything that the methods declare to support."""
    for engine, (stage, _) in ENGINES.items():
        for name, method in sorted(methods().items()):
            support = method(method.config_class()).supports()
            if support.fsdp if stage == FSDP else stage in support.deepspeed:
                yield engine, name


def chosen() -> list[tuple[str, str]]:
    """All cells, or the part that is this commit's."""
    every = list(cells())
    if WHOLE:
        return every
    git = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    return random.Random(git.stdout).sample([cell for cell in every if cell[0] not in ON_DEMAND], PART)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> "Runs":
    return Runs(tmp_path_factory.mktemp("engines"))


class Runs:
    """Runs of the chosen cells: one launch an engine trains all its methods, one after the other."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.failures: dict[tuple[str, str], str] = {}
        self._done: set[str] = set()
        contradicting_rows(folder)

    def of(self, engine: str, method: str) -> Path:
        """The method's run under an engine (`alone` for one process)."""
        if engine not in self._done:
            self._done.add(engine)
            names = sorted({name for other, name in chosen() if engine in (other, "alone")})
            self._train(engine, names)
        if (engine, method) in self.failures:
            pytest.fail(f"{method} under {engine}: {self.failures[engine, method]}")
        return self.folder / engine / "runs" / method

    def _train(self, engine: str, names: Sequence[str]) -> None:
        """Train; what fails is noted, and the others go on."""
        folder = self.folder / engine
        while names:
            try:
                if engine == "alone":
                    run_chain(folder, names, processes=1, batch=4)
                else:
                    run_chain(folder, names, 2, 2, ENGINES[engine][1], {"DS_ACCELERATOR": "cpu"})
                return
            except AssertionError as failure:
                left = [name for name in names if not (folder / "runs" / name / STAGES[1] / "stage.json").is_file()]
                broken = next((name for name in left if (folder / "runs" / name / STAGES[0]).is_dir()), left[0])
                self.failures[engine, broken] = str(failure)[-1500:]
                names = [name for name in left if name != broken]


@pytest.mark.parametrize(("engine", "method"), chosen())
def test_two_processes_equal_one(runs: Runs, engine: str, method: str) -> None:
    one, two = runs.of("alone", method), runs.of(engine, method)
    assert_equal_up_to_rounding(one / STAGES[0], one / STAGES[1], two / STAGES[1])
