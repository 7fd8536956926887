"""The stage that is trained before another one: a teacher that learns the same task alone (`Method.teacher_stage`)."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from swift_cl import distributed
from swift_cl.errors import UserError
from swift_cl.io import sha256_file, sha256_json
from swift_cl.methods.base import Method
from swift_cl.stages import DATA_DIR, load_stage
from swift_cl.training.flags import check_method_flags, config_from_flags, first, flag_values
from swift_cl.training.preflight import finished_stage

OWN = ("cl_method", "cl_previous", "cl_resume", "resume_from_checkpoint", "output_dir", "add_version", "adapters")
"""Flags of a stage that its teacher does not get."""


def teacher_argv(argv: list[str]) -> tuple[list[str], Path] | None:
    """(flags, folder) of the stage that a stage needs before it; None where it needs none.

    The folder carries the hash of the flags and data, so a finished teacher is used again and another one never is.
    """
    method = check_method_flags(argv)
    if method is None or method.teacher_stage is Method.teacher_stage:
        return None
    given = flag_values(argv)
    wanted = method(config_from_flags(method, given)).teacher_stage("cl_previous" not in given)
    if wanted is None:
        return None
    output = first(given, "output_dir")
    if output is None:
        raise UserError(f"--output_dir is missing: method '{method.name}' keeps a teacher in it")
    kept = {
        name: values for name, values in given.items() if name not in OWN and not name.startswith(f"{method.name}_")
    }
    kept.update({name: [value] for name, value in wanted.items()})
    files = [Path(spec.rsplit("#", 1)[0]) for spec in given.get("dataset", [])]
    key = sha256_json([kept, [sha256_file(path) for path in files if path.is_file()]])[:16]
    folder = Path(output) / DATA_DIR / method.name / f"teacher-{key}"
    kept |= {"output_dir": [str(folder)], "add_version": ["false"], "cl_resume": ["true"]}
    return [token for name, values in kept.items() for token in (f"--{name}", *values)], folder


def train_teacher(
    argv: list[str], shared: tuple[Any, Any] | None, make_stage: Callable[[list[str], Any], Any]
) -> tuple[Path | None, tuple[Any, Any] | None]:
    """Train what a stage needs before it, unless that is done.

    Args:
        shared: base model and processor to use, as for a stage.
        make_stage: makes a stage from flags and `shared`.

    Returns:
        The teacher's adapter, None where there is none, and what the stage itself may share.
    """
    found = teacher_argv(argv)
    if found is None:
        return None, shared
    own, folder = found
    if finished_stage(flag_values(own), None) is None:
        stage = make_stage(own, shared)
        stage.main()
        shared = stage.release()
    return load_stage(folder).weights_dir, shared


def drop_teacher(weights: Path | None, config: Any) -> None:
    """Delete a teacher after its stage, unless it is to be kept."""
    if weights is not None and not getattr(config, "keep_teacher", False) and distributed.world()[0] == 0:
        shutil.rmtree(weights.parent)
