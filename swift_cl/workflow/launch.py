"""Start one of ms-swift's commands with our worker in place of its file."""

import json
import os
import sys
import tempfile
from pathlib import Path

from swift_cl.errors import RunFailure, UserError
from swift_cl.workflow.worker import COMMAND, ERROR_FILE


def launch(command: str, argv: list[str]) -> int:
    """Run `command` with `argv` through ms-swift's launcher (torchrun included, by NPROC_PER_NODE and NNODES).

    Returns:
        The exit code.

    Raises:
        UserError, RunFailure: what the worker reported; of several processes the first that failed.
    """
    from swift.cli.main import cli_main

    # cli_main knows which route names may go through torchrun: training of ours runs under the name of sft.
    route = command if command in TORCHRUN_ROUTES else ("sft" if command == "chain" else command)
    before = sys.argv
    with tempfile.TemporaryDirectory(prefix="swift_cl_error_") as folder:
        error_file = Path(folder) / "error.json"
        try:
            os.environ[COMMAND], os.environ[ERROR_FILE] = command, str(error_file)
            sys.argv = ["swift-cl", route, *argv]
            cli_main(route_mapping={route: "swift_cl.workflow.worker"})
            return 0
        except SystemExit as stop:
            if error_file.is_file():
                error = json.loads(error_file.read_text(encoding="utf-8"))
                raise (UserError if error["code"] == 2 else RunFailure)(error["message"]) from None
            return stop.code if isinstance(stop.code, int) else 1
        finally:
            sys.argv = before
            os.environ.pop(COMMAND, None)
            os.environ.pop(ERROR_FILE, None)


TORCHRUN_ROUTES = ("pt", "sft", "rlhf", "infer")
