"""On a GPU, with a model of 7B shape: methods train under ZeRO-2, ZeRO-3 and offload, and cost what they cost without.

Needs an H200 (141 GB), DeepSpeed with a compiler for its CPU optimizer, and 32 GB of disk. By hand:
`SWIFT_CL_SHAPE=qwen2.5-0.5b python -m pytest -m gpu tests/gpu` for a smaller one.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import ROOT
from tests.support.chains import free_port

pytest.importorskip("deepspeed", reason="needs deepspeed")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.slow,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU, found none"),
]
SHAPE = os.environ.get("SWIFT_CL_SHAPE", "qwen2.5-7b")
CASES = ("seq", "ewc", "cia", "lwf", "gem")
WITHIN = 0.05
"""Of the one-process ratio: what the design asks for."""


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("gpu")


def measured(work: Path, engine: str | None) -> dict[str, dict[str, Any]]:
    """The benchmark's numbers with this engine, measured once."""
    file = work / f"{engine}.json"
    if not file.is_file():
        script = [str(ROOT / "tests" / "benchmarks" / "step_cost.py"), "--device", "cuda", "--shape", SHAPE]
        script += ["--work_dir", str(work), "--json", str(file), "--steps", "10", "--rounds", "2", "--cases", *CASES]
        launcher = [sys.executable]
        if engine is not None:
            launcher += ["-m", "torch.distributed.run", "--nproc_per_node", "1", "--master_port", str(free_port())]
            script += ["--deepspeed", engine]
        done = subprocess.run([*launcher, *script], capture_output=True, text=True, timeout=3600, cwd=ROOT)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
        print(done.stdout)
    found: dict[str, dict[str, Any]] = json.loads(file.read_text())
    return found


@pytest.mark.parametrize("engine", ["zero2", "zero3", "zero2_offload", "zero3_offload"])
def test_every_method_trains(work: Path, engine: str) -> None:
    for case, row in measured(work, engine).items():
        assert row["step_seconds"] > 0, case


@pytest.mark.parametrize("case", [case for case in CASES if case != "seq"])
def test_step_time_ratio_of_zero2_is_that_of_one_process(work: Path, case: str) -> None:
    one, zero2 = (measured(work, engine)[case]["ratio"] for engine in (None, "zero2"))
    assert abs(zero2 - one) <= WITHIN * one, f"{case}: {zero2:.3f} under ZeRO-2, {one:.3f} without"
