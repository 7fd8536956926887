"""The process that routes: `python -m swift_cl.serving.routing.worker WORK.json`; choices go to the pipe as JSON lines.

It ends when the process that started it is gone.
"""

import json
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

from swift_cl.errors import UserError
from swift_cl.methods._routing import RouteRequest
from swift_cl.serving.routing import ERROR, FD, RouteJob
from swift_cl.serving.routing.model import RouteModel, load_base, router_of

AT_ONCE = 64
"""Questions after which choices are handed over, so that a stopped run goes on from there."""


def main(path: Path) -> None:
    """Route every question of the work file."""
    work = json.loads(path.read_text(encoding="utf-8"))
    with os.fdopen(int(os.environ[FD]), "w", encoding="utf-8") as out:
        try:
            model = RouteModel(lambda: load_base(work["model"], work["model_args"]))
            for job in work["jobs"]:
                _route(job, model, out)
        except UserError as error:
            out.write(json.dumps({ERROR: str(error)}) + "\n")


def _route(job: dict[str, Any], model: RouteModel, out: Any) -> None:
    questions = job.pop("questions")
    router = router_of(RouteJob(**job), model)
    for start in range(0, len(questions), AT_ONCE):
        batch = questions[start : start + AT_ONCE]
        requests = [RouteRequest(tuple(q["messages"]), q["systems"], q["system"]) for q in batch]
        for question, route in zip(batch, router.route(requests), strict=True):
            line = {"key": question["key"], "chosen": route.chosen, "scores": route.scores}
            out.write(json.dumps(line) + "\n")
        out.flush()


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1.0)
    os.killpg(os.getpgid(0), signal.SIGKILL)


if __name__ == "__main__":
    threading.Thread(target=_end_with, args=(int(os.environ["SWIFT_CL_SERVER_PARENT"]),), daemon=True).start()
    main(Path(sys.argv[1]))
