"""Two processes under every engine compute what one process computes: weights of the second task in fp32, of every
method, and of every tuner with `seq`.

The two take their batch in two micro-batches of a row each and recompute activations (ms-swift's default, or FSDP2's
own way); the one takes its four rows at once and recomputes nothing.

The whole matrix takes about an hour on two cores: `sh tests/run.sh --distributed` (`-k zero3` for an engine, `-k
"zero3 and sdft"` for a cell). Otherwise two cells run, others for every commit.
"""

import json
import os
import random
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from swift_cl.io import load_method_state
from swift_cl.methods.registry import get_method, methods
from swift_cl.stages import STATE_DIR
from swift_cl.tuners.registry import tuners
from tests.support.chains import STAGES, Cell, run_chain
from tests.support.train import assert_equal_up_to_rounding, contradicting_rows

pytest.importorskip("deepspeed", reason="needs deepspeed")
pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
WHOLE = os.environ.get("SWIFT_CL_DISTRIBUTED") == "all"
KEPT = os.environ.get("SWIFT_CL_ENGINE_RUNS")
"""A folder that keeps the runs: a matrix that was stopped goes on (delete it when the code has changed)."""
PART = 2
"""Cells for a commit."""
# The tiny adapters would be kept whole on every rank, and what breaks where they are not would stay hidden.
PARTITIONED = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}
# DeepSpeed offloads to its own Adam only, unless it is told that another optimizer is meant.
OWN_OPTIMIZER = {"zero_force_ds_cpu_optimizer": False}
FSDP = -1
"""In place of a ZeRO stage."""
ENGINES: dict[str, tuple[int, dict[str, Any]]] = {
    "zero0": (0, {}),
    "zero1": (1, {}),
    "zero2": (2, {}),
    "zero3": (3, PARTITIONED),
    "fsdp2": (FSDP, {}),
    "zero2_offload": (2, OWN_OPTIMIZER),
    "zero3_offload": (3, OWN_OPTIMIZER),
}
"""ZeRO stage (or `FSDP`) and changes to ms-swift's settings by their name. DDP is always run, for every method, in
tests/integration/test_two_processes.py."""


def subjects() -> list[Cell]:
    """Every method with each tuner that it names (full fine-tuning is one), and every tuner with `seq`."""
    own: list[Cell] = []
    for name in sorted(methods()):
        kind = get_method(name)
        others = kind(kind.config_class()).supports().tuners[1:]
        own += [Cell(name), *(Cell(name, other) for other in others)]
    return [*own, *(Cell("seq", name) for name in sorted(tuners()))]


def stages(cell: Cell) -> Sequence[int]:
    """The ZeRO stages that a cell's method and tuner declare, and `FSDP`."""
    kind = get_method(cell.method)
    support = kind(kind.config_class()).supports()
    tuner = tuners().get(cell.tuner or support.tuners[0])
    declared = support.full_deepspeed if cell.tuner == "full" else support.deepspeed
    fsdp = support.full_fsdp if cell.tuner == "full" else support.fsdp
    found = [stage for stage in declared if tuner is None or stage in tuner.support.deepspeed]
    return [*found, FSDP] if fsdp and (tuner is None or tuner.support.fsdp) else found


def cells() -> Iterator[tuple[str, Cell]]:
    """(engine, cell) of everything that is declared to be supported."""
    for engine, (stage, _) in ENGINES.items():
        yield from ((engine, cell) for cell in subjects() if stage in stages(cell))


def chosen() -> list[tuple[str, Cell]]:
    """All cells, or the part that is this commit's."""
    every = list(cells())
    if WHOLE:
        return every
    git = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    return random.Random(git.stdout).sample(every, PART)


def engine_settings(name: str, folder: Path, changes: dict[str, Any] | None = None) -> dict[str, Any]:
    """The flags of an engine: ms-swift's settings of that name, changed, in fp32, which keeps one process and two
    comparable.

    Args:
        changes: in place of those of `ENGINES`.
    """
    import swift

    stage, own = ENGINES[name]
    changes = own if changes is None else changes
    flag = "fsdp" if stage == FSDP else "deepspeed"
    config = json.loads((Path(swift.__file__).parent / "config" / f"{name}.json").read_text())
    for key, value in changes.items():
        config[key] = {**config[key], **value} if isinstance(value, dict) else value
    file = folder / f"{flag}.json"
    file.write_text(json.dumps(config))
    # Otherwise half of a stage is a worker process that encodes eight rows.
    return {flag: str(file), "fp16": False, "bf16": False, "lazy_tokenize": True}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> "Runs":
    asked = [item.callspec.params for item in request.session.items if "cell" in getattr(item, "fixturenames", ())]
    folder = Path(KEPT) if KEPT else tmp_path_factory.mktemp("engines")
    folder.mkdir(parents=True, exist_ok=True)
    return Runs(folder, [(found["engine"], found["cell"]) for found in asked])


class Runs:
    """Runs of the cells that were asked for: one launch an engine trains all of them, one after the other."""

    def __init__(self, folder: Path, asked: Sequence[tuple[str, Cell]]) -> None:
        self.folder, self.asked = folder, asked
        self.failures: dict[tuple[str, Cell], str] = {}
        self._done: set[str] = set()
        contradicting_rows(folder)

    def of(self, engine: str, cell: Cell) -> Path:
        """The cell's run under an engine (`alone` for one process)."""
        if engine not in self._done:
            self._done.add(engine)
            self._train(engine, sorted({own for other, own in self.asked if engine in (other, "alone")}))
        if (engine, cell) in self.failures:
            pytest.fail(f"{cell.name} under {engine}: {self.failures[engine, cell]}")
        return cell.run_dir(self.folder / engine)

    def _train(self, engine: str, wanted: Sequence[Cell]) -> None:
        """Train; what fails is noted, and the others go on."""
        folder = self.folder / engine
        while wanted:
            try:
                if engine == "alone":
                    run_chain(folder, wanted, 1, 4, {"gradient_checkpointing": False})
                else:
                    folder.mkdir(exist_ok=True)
                    settings = {**engine_settings(engine, folder), "gradient_accumulation_steps": 2}
                    run_chain(folder, wanted, 2, 1, settings, {"DS_ACCELERATOR": "cpu"})
                return
            except AssertionError as failure:
                left = [cell for cell in wanted if not (cell.run_dir(folder) / STAGES[1] / "stage.json").is_file()]
                broken = next((cell for cell in left if (cell.run_dir(folder) / STAGES[0]).is_dir()), left[0])
                self.failures[engine, broken] = str(failure)[-1500:]
                wanted = [cell for cell in left if cell != broken]


@pytest.mark.parametrize(("engine", "cell"), [pytest.param(*c, id=f"{c[0]}-{c[1].name}") for c in chosen()])
def test_two_processes_equal_one(runs: Runs, engine: str, cell: Cell) -> None:
    one, two = runs.of("alone", cell), runs.of(engine, cell)
    assert_equal_up_to_rounding(one / STAGES[0], one / STAGES[1], two / STAGES[1])
    for stage in STAGES:
        assert_same_state(one / stage / STATE_DIR, two / stage / STATE_DIR, cell.method)
    assert_same_log(one / STAGES[1], two / STAGES[1], (cell.method, cell.tuner or cell.method))


def assert_same_log(one: Path, two: Path, names: tuple[str, str]) -> None:
    """What the method and the tuner log of each step, as EWC's penalty, agrees to a percent."""
    logs = [list(map(json.loads, (stage / "logging.jsonl").read_text().splitlines())) for stage in (one, two)]
    for step, theirs in zip(*logs, strict=True):
        own = {key: value for key, value in step.items() if key.startswith(names)}
        assert own == pytest.approx({key: theirs[key] for key in own}, rel=0.01, abs=1e-3)


def assert_same_state(one: Path, two: Path, method: str) -> None:
    """What a method keeps: the same rows, and statistics and weights that agree to rounding."""
    files = [sorted(path.relative_to(folder) for path in folder.rglob("*.safetensors")) for folder in (one, two)]
    assert files[0] == files[1]
    if (one / f"{method}.json").is_file():
        assert load_method_state(one, method).rows == load_method_state(two, method).rows
    for file in files[0]:
        theirs = load_file(two / file)
        for name, tensor in load_file(one / file).items():
            limit = 1e-3 * max(1.0, tensor.abs().max().item()) if tensor.numel() else 0.0
            assert tensor.shape == theirs[name].shape
            assert not tensor.numel() or (tensor - theirs[name]).abs().max().item() <= limit, f"{file}: {name}"


@pytest.mark.skipif(not WHOLE, reason="compiles an optimizer first, a minute; runs with SWIFT_CL_DISTRIBUTED=all")
@pytest.mark.parametrize("engine", ["zero2_offload", "zero3_offload"])
def test_offloaded_to_deepspeeds_own_adam(tmp_path: Path, engine: str) -> None:
    """What ms-swift's settings do as they are: accelerate puts DeepSpeedCPUAdam in the place of torch's AdamW."""
    contradicting_rows(tmp_path)
    adam = {"optim": "adamw_torch", "learning_rate": 1e-3}
    two = tmp_path / engine
    two.mkdir()
    run_chain(tmp_path / "alone", ["seq"], 1, 4, adam)
    run_chain(two, ["seq"], 2, 2, {**adam, **engine_settings(engine, two, {})}, {"DS_ACCELERATOR": "cpu"})
    start, one, both = (
        Cell("seq").run_dir(folder) / stage
        for folder, stage in ((tmp_path / "alone", STAGES[0]), (tmp_path / "alone", STAGES[1]), (two, STAGES[1]))
    )
    assert_equal_up_to_rounding(start, one, both)
