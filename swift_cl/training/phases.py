"""The trainings that one stage consists of (`Method.phases`): all but the last run before it, in the same command."""

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from swift_cl import distributed
from swift_cl.errors import UserError
from swift_cl.io import sha256_file, sha256_json
from swift_cl.methods.base import Method, Phase
from swift_cl.stages import DATA_DIR, STAGE_FILE, load_stage
from swift_cl.training.checkpoints import find_stage_dir
from swift_cl.training.flags import check_method_flags, config_from_flags, first, flag_values
from swift_cl.training.preflight import finished_stage, load_previous

FOLDER = ("cl_resume", "resume_from_checkpoint", "output_dir", "add_version")
"""Flags that say where a stage is; a phase has its own folder."""
CHAIN = ("cl_method", "cl_previous", "adapters")
"""Flags of a stage that a phase of another method does not get."""


@dataclass(frozen=True)
class Training:
    """One of the trainings of a stage.

    Attributes:
        argv: its flags.
        phase: its name, empty where it is a stage of its own.
        adapters: those of the phases before it, by name.
        last: whether it is the stage's own, which all others were for.
    """

    argv: list[str]
    phase: str = ""
    adapters: Mapping[str, Path] = field(default_factory=dict)
    last: bool = True


def phase_argv(method: type[Method], phase: Phase, given: Mapping[str, list[str]]) -> tuple[list[str], Path]:
    """(flags, folder) of a phase before the stage's own training.

    The folder carries the hash of flags, data and earlier stage, so a finished phase is used again and another one
    never is.

    Args:
        given: the stage's flags.
    """
    output = first(dict(given), "output_dir")
    if output is None:
        raise UserError(f"--output_dir is missing: method '{method.name}' keeps its phase '{phase.name}' in it")
    left_out = set(FOLDER)
    if phase.other_method:
        left_out |= {*CHAIN, *(name for name in given if name.startswith(f"{method.name}_"))}
    kept = {name: values for name, values in given.items() if name not in left_out}
    kept.update({name: [value] for name, value in phase.flags.items()})
    files = [Path(spec.rsplit("#", 1)[0]) for spec in given.get("dataset", [])]
    if "cl_previous" in kept:
        files.append(find_stage_dir(Path(kept["cl_previous"][0])) / STAGE_FILE)
    key = sha256_json([kept, [sha256_file(path) for path in files if path.is_file()]])[:16]
    folder = Path(output) / DATA_DIR / method.name / f"{phase.name}-{key}"
    kept |= {"output_dir": [str(folder)], "add_version": ["false"], "cl_resume": ["true"]}
    return as_argv(kept), folder


def as_argv(given: Mapping[str, list[str]]) -> list[str]:
    """The inverse of `flag_values`."""
    return [token for name, values in given.items() for token in (f"--{name}", *values)]


def train_phases(
    argv: list[str], shared: tuple[Any, Any] | None, make_stage: Callable[[list[str], Any, Training | None], Any]
) -> tuple[Training, tuple[Any, Any] | None]:
    """Train what a stage needs before its own training, unless that is done.

    Args:
        shared: base model and processor to use, as for a stage.
        make_stage: makes a stage from flags, `shared`, and which training of a stage it is.

    Returns:
        The stage's own training, and what it may share.
    """
    method = check_method_flags(argv)
    if method is None or method.phases is Method.phases:
        return Training(argv), shared
    given = flag_values(argv)
    *before, own = method(config_from_flags(method, given)).phases("cl_previous" not in given)
    adapters: dict[str, Path] = {}
    for phase in before:
        flags, folder = phase_argv(method, phase, given)
        found = flag_values(flags)
        if finished_stage(found, load_previous(first(found, "cl_previous"))) is None:
            training = None if phase.other_method else Training(flags, phase.name, dict(adapters), last=False)
            stage = make_stage(flags, shared, training)
            stage.main()
            shared = stage.release()
        adapters[phase.name] = load_stage(folder).weights_dir
    own_flags = as_argv({**given, **{name: [value] for name, value in own.flags.items()}}) if own.flags else argv
    return Training(own_flags, own.name, adapters), shared


def drop_phases(training: Training, method: Method) -> None:
    """Delete what was trained for a stage after it, unless it is to be kept."""
    if training.last and not method.keeps_phases() and distributed.world()[0] == 0:
        for weights in training.adapters.values():
            shutil.rmtree(weights.parent)
