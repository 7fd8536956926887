"""What methods promise of the reduced gradient and of their averages holds under every engine (two CPU processes).

`SWIFT_CL_DISTRIBUTED=all` runs it; a minute an engine.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from tests.distributed.test_engines import ENGINES, WHOLE, engine_settings
from tests.support import commands
from tests.support.chains import free_port
from tests.support.invariants import METHODS

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not WHOLE, reason="runs with SWIFT_CL_DISTRIBUTED=all")]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Folder of an engine's run ('alone': one process; 'ddp'), made when it is first asked for."""
    folder = tmp_path_factory.mktemp("invariants")

    def of(engine: str) -> Path:
        out = folder / engine
        if not out.is_dir():
            out.mkdir()
            command, arguments = [sys.executable, "-m"], [str(out)]
            if engine != "alone":
                command += ["torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(free_port()), "-m"]
            if engine in ENGINES:
                arguments.append(json.dumps(engine_settings(engine, out)))
            command += ["tests.support.invariants", *arguments]
            env = {**commands.environment(), "DS_ACCELERATOR": "cpu", "PYTHONPATH": os.pathsep.join(sys.path)}
            done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=1800, check=False)
            (out / "log").write_text(done.stdout + done.stderr)
        ranks = 1 if engine == "alone" else 2
        made = [*(out / f"rank{rank}.json" for rank in range(ranks)), *(out / f"{m}.safetensors" for m in METHODS)]
        assert all(file.is_file() for file in made), (out / "log").read_text()[-3000:]
        return out

    return of


def seen(folder: Path, method: str) -> list[dict[str, Any]]:
    """What each rank noted."""
    return [json.loads(file.read_text())[method] for file in sorted(folder.glob("rank*.json"))]


engines = pytest.mark.parametrize("engine", ["ddp", *ENGINES])


@engines
def test_gems_constraints_hold_on_the_reduced_gradient(run: Callable[[str], Path], engine: str) -> None:
    for rank in seen(run(engine), "gem"):
        assert rank["violated"] >= 2, "nothing was to be projected"
        assert len(rank["cosines"]) == 3
        assert min(rank["cosines"]) >= -1e-5


@engines
@pytest.mark.parametrize("method", ["ewc", "o_lora"])
def test_what_is_added_to_the_gradient_is_that_of_one_process(
    run: Callable[[str], Path], engine: str, method: str
) -> None:
    """The penalty's pull is in the engine's gradient after it was written, the same as in one process, and not 0.

    Rounding: fp32 gradients that were reduced in another order, over three steps; a wrong factor would be 100 % off.
    """
    alone, two = (load_file(run(name) / f"{method}.safetensors") for name in ("alone", engine))
    assert alone.keys() == two.keys()
    last = f"step_{len(alone) - 1}"
    assert alone[last].abs().max() > 0
    for step, added in alone.items():
        assert (added - two[step]).abs().max() <= 0.01 * max(float(added.abs().max()), 1e-6), step


@engines
def test_o_loras_regulariser_acts_under_checkpointing(run: Callable[[str], Path], engine: str) -> None:
    assert all(rank["checkpointed"] for rank in seen(run(engine), "o_lora"))
    added = load_file(run(engine) / "o_lora.safetensors")
    assert all(bool(step.any()) for step in added.values())


@engines
def test_averages_are_the_same_on_all_ranks(run: Callable[[str], Path], engine: str) -> None:
    one, two = seen(run(engine), "cia")
    assert len(one["averages"]) == 3
    assert len(set(one["averages"])) == 3, "the average does not move"
    assert one["averages"] == two["averages"]
