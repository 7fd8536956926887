"""What a finished stage and a run look like on disk. Training writes it; serving, evaluation and reports read it.

RUN_DIR/run.json                      benchmark, order, method, model, seed
RUN_DIR/stage_1_2022/adapter/         what the next stage starts from and what is served
RUN_DIR/stage_1_2022/cl_state/        the method's own state
RUN_DIR/stage_1_2022/cl_data/         the rows that it was trained on, and what was generated for them
RUN_DIR/stage_1_2022/stage.json       written last: its presence means that the stage is complete
"""

import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from swift_cl.errors import UserError
from swift_cl.io import read_json, sha256_file, write_json

STAGE_SCHEMA = 1
RUN_SCHEMA = 1
STAGE_FILE = "stage.json"
RUN_FILE = "run.json"
STATE_DIR = "cl_state"
DATA_DIR = "cl_data"
ADAPTER_DIR = "adapter"
WEIGHTS = "adapter_model.safetensors"


@dataclass(frozen=True)
class Stage:
    """A finished stage.

    Attributes:
        dir: its folder (not written to the file, so that a run can be moved).
        index: 0-based position in the order.
        weights: folder of the adapter (or, for full fine-tuning, of the model), relative to `dir`.
        weights_sha256: hash of the adapter's safetensors file; for a full model None.
        base_model: the model path or id that was trained.
        model_args: model_type, template, torch_dtype: what a server needs to load the base the same way.
        system: the system prompt of the stage, None for the template's default.
        started_from: `{"dir", "weights_sha256"}` of the stage before, or None.
        route: how its answers are chosen among several adapters, None where it answers with its own: `task_id_given`,
            `settings` of the method, `state_sha256` of its state, and `candidates`, each with `name`, `tasks`, `dir`
            (relative), `sha256` and `system`.
        probe: `{"messages", "logprobs"}`: what it answered right after training, None where that was not recorded.
    """

    dir: Path
    task: str
    index: int
    method: str
    weights: str
    weights_sha256: str | None
    tuner_type: str
    base_model: str
    model_args: dict[str, str] = field(default_factory=dict)
    system: str | None = None
    seed: int = 42
    started_from: dict[str, Any] | None = None
    train: dict[str, Any] = field(default_factory=dict)
    probe: dict[str, Any] | None = None
    route: dict[str, Any] | None = None

    @property
    def weights_dir(self) -> Path:
        """Absolute folder of the adapter or model."""
        return (self.dir / self.weights).resolve()

    @property
    def state_dir(self) -> Path:
        """Folder of the method's state."""
        return self.dir / STATE_DIR

    def save(self) -> None:
        """Write `stage.json`; everything else of the stage must be on disk already."""
        value = {"schema": STAGE_SCHEMA, **asdict(self)}
        del value["dir"]
        write_json(self.dir / STAGE_FILE, value)


def load_stage(folder: Path) -> Stage:
    """Read a finished stage and check that its weights are the recorded ones.

    Raises:
        UserError: the stage is missing, unfinished or damaged.
    """
    path = folder / STAGE_FILE
    if not folder.is_dir():
        raise UserError(f"{folder}: stage folder not found")
    if not path.is_file():
        raise UserError(f"{folder}: the stage is unfinished (no {STAGE_FILE}); train it to its end first")
    value = read_json(path)
    if not isinstance(value, dict) or value.pop("schema", None) != STAGE_SCHEMA:
        raise UserError(f"{path}: not a stage file of schema {STAGE_SCHEMA}")
    try:
        stage = Stage(dir=folder, **value)
    except TypeError as error:
        raise UserError(f"{path}: not a stage file of schema {STAGE_SCHEMA} ({error})") from None
    if stage.weights_sha256 is not None:
        if not (stage.weights_dir / "adapter_config.json").is_file():
            raise UserError(f"{stage.weights_dir}: no adapter_config.json, but {path} lists an adapter there")
        file = stage.weights_dir / WEIGHTS
        if not file.is_file():
            raise UserError(f"{file}: file not found, but {path} lists it")
        if sha256_file(file) != stage.weights_sha256:
            raise UserError(f"{file}: the adapter differs from the hash in {path}; it was changed or cut off")
    elif not stage.weights_dir.is_dir():
        raise UserError(f"{stage.weights_dir}: folder not found, but {path} lists it")
    return stage


def check_started_from(stage: Stage, previous: Stage | None) -> None:
    """Refuse a finished stage that was trained from other weights than the stage before has now.

    Raises:
        UserError: the stage before was trained again, or is another one.
    """
    wanted = previous.weights_sha256 if previous else None
    had = stage.started_from["weights_sha256"] if stage.started_from else None
    if wanted != had or (previous is None) != (stage.started_from is None):
        raise UserError(
            f"{stage.dir}: was trained from other weights than {previous.dir if previous else 'the base model'} now "
            "has; delete it and the stages after it, or use --overwrite, to train the chain anew"
        )


@dataclass(frozen=True)
class Run:
    """A run: its description and its finished stages, in order."""

    dir: Path
    name: str
    benchmark: str | None
    data_dir: str | None
    order: list[str]
    method: str
    model: str
    model_args: dict[str, str]
    seed: int
    stages: list[Stage]

    def save(self) -> None:
        """Write `run.json` (the stages have their own files)."""
        value = {"schema": RUN_SCHEMA, **asdict(self)}
        del value["dir"], value["stages"]
        write_json(self.dir / RUN_FILE, value)


def stage_dir_name(index: int, task: str) -> str:
    """Folder of a stage: `stage_1_2022` for the first task (index 0)."""
    return f"stage_{index + 1}_{task}"


def finished_stages(run_dir: Path) -> list[Stage]:
    """The finished stages of a run folder in order, each checked.

    Raises:
        UserError: a stage is damaged, or two have the same number (of two orders that used one folder).
    """
    found: dict[int, Path] = {}
    for folder in sorted(run_dir.iterdir()):
        match = re.fullmatch(r"stage_(\d+)_.+", folder.name)
        if match and (folder / STAGE_FILE).is_file():
            number = int(match[1])
            if number in found:
                raise UserError(f"{run_dir}: {found[number].name} and {folder.name} are both stage {number}")
            found[number] = folder
    return [load_stage(folder) for _, folder in sorted(found.items())]


def load_run(run_dir: Path) -> Run:
    """Read a run folder, written by `swift-cl run` or by a recipe (then it is described by its stages alone).

    Raises:
        UserError: no such folder, or no finished stage in it.
    """
    if not run_dir.is_dir():
        raise UserError(f"{run_dir}: run folder not found")
    stages = finished_stages(run_dir)
    if not stages:
        raise UserError(f"{run_dir}: no finished stage in this folder (expected stage_1_*/{STAGE_FILE})")
    path = run_dir / RUN_FILE
    if path.is_file():
        value = read_json(path)
        if not isinstance(value, dict) or value.pop("schema", None) != RUN_SCHEMA:
            raise UserError(f"{path}: not a run file of schema {RUN_SCHEMA}")
        try:
            return Run(dir=run_dir, stages=stages, **value)
        except TypeError as error:
            raise UserError(f"{path}: not a run file of schema {RUN_SCHEMA} ({error})") from None
    first = stages[0]
    order = [stage.task for stage in stages]
    return Run(
        run_dir,
        run_dir.name,
        None,
        None,
        order,
        stages[-1].method,
        first.base_model,
        first.model_args,
        first.seed,
        stages,
    )
