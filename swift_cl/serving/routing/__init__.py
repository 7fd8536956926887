"""Routing: run a method's `route` over many questions, in a process that has torch and the base model.

The process is our own interpreter, not that of a server (`--server_python` may have no swift_cl). It ends when the work
is done, so that a server that starts afterwards has the whole device.
"""

import contextlib
import json
import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from swift_cl.errors import RunFailure, UserError
from swift_cl.serving.server import LOG_LINES, end_group
from swift_cl.stages import Stage

WORKER = "swift_cl.serving.routing.worker"
AUTO = "auto"
"""The model name under which `swift-cl deploy --route` chooses an adapter for every question."""
FD, ERROR = "SWIFT_CL_ROUTES_FD", "error"


@dataclass(frozen=True)
class Question:
    """A `RouteRequest` as data.

    Attributes:
        key: what the caller knows it by.
    """

    key: str
    messages: list[dict[str, str]]
    systems: dict[str, str | None]
    system: str | None = None


@dataclass(frozen=True)
class RouteJob:
    """The questions of one stage.

    Attributes:
        stage_dir: the stage that routes.
        tasks: the tasks that it has adapters for, in the order of the candidates.
        settings: of the method, as the stage recorded them.
        candidates: `name`, `tasks`, `dir` (absolute), `sha256` and `system` of each.
    """

    method: str
    stage_dir: str
    tasks: list[str]
    settings: Mapping[str, Any]
    candidates: list[dict[str, Any]]
    questions: list[Question] = field(default_factory=list)


@dataclass(frozen=True)
class Routed:
    """The choice for a question."""

    key: str
    chosen: str
    scores: dict[str, float]


def job_of(stage: Stage, questions: Sequence[Question] = ()) -> RouteJob:
    """The job of a stage that routes."""
    assert stage.route is not None, f"{stage.dir} does not route"
    candidates = [{**entry, "dir": str((stage.dir / entry["dir"]).resolve())} for entry in stage.route["candidates"]]
    tasks = [task for entry in candidates for task in entry["tasks"]]
    return RouteJob(stage.method, str(stage.dir), tasks, stage.route["settings"], candidates, list(questions))


def run_jobs(
    model: str, model_args: Mapping[str, str], jobs: Sequence[RouteJob], log: Path, found: Callable[[Routed], None]
) -> None:
    """Route all questions in one process; each choice is handed over as soon as its batch is done.

    Args:
        model_args: model_type, template and torch_dtype, as a server is told them.

    Raises:
        UserError: what the router found wrong with the stages or settings.
        RunFailure: it failed; with its command and last log lines.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        work = stack.enter_context(tempfile.NamedTemporaryFile("w", suffix=".json", prefix="swift_cl_route_"))
        json.dump({"model": model, "model_args": dict(model_args), "jobs": [asdict(job) for job in jobs]}, work)
        work.flush()
        argv = [sys.executable, "-m", WORKER, work.name]
        ours, theirs = os.pipe()
        lines = stack.enter_context(os.fdopen(ours, "rb"))
        with open(log, "wb") as stream, os.fdopen(theirs, "wb"):
            process = subprocess.Popen(
                argv,
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=subprocess.STDOUT,
                env=_environment(theirs),
                pass_fds=(theirs,),
                start_new_session=True,
            )
        try:
            error = _read(lines, found)
            code = process.wait()
        except BaseException:
            end_group(process)
            raise
    if error is not None:
        raise UserError(error)
    if code != 0:
        tail = "\n".join(f"  | {line}" for line in log.read_text("utf-8", "replace").splitlines()[-LOG_LINES:])
        raise RunFailure(
            f"routing ended with exit code {code}\ncommand: {shlex.join(argv)}\nlast lines of {log}:\n"
            f"{tail or '  | (nothing)'}"
        )


def _environment(number: int) -> dict[str, str]:
    """Ours, without that of a torchrun around us, and with this copy of the package."""
    env = {k: v for k, v in os.environ.items() if k not in ("NPROC_PER_NODE", "NNODES", "RANK", "LOCAL_RANK")}
    package = str(Path(__file__).resolve().parents[3])
    paths = [package, *filter(None, [env.get("PYTHONPATH")])]
    return {**env, FD: str(number), "PYTHONPATH": os.pathsep.join(paths), "SWIFT_CL_SERVER_PARENT": str(os.getpid())}


def _read(lines: Any, found: Callable[[Routed], None]) -> str | None:
    """Hand over the choices; the message of the error that ended the work, or None."""
    for line in lines:
        value = json.loads(line)
        if ERROR in value:
            return str(value[ERROR])
        found(Routed(value["key"], value["chosen"], value["scores"]))
    return None
