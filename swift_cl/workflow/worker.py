"""The file that runs inside the training or serving process (and in every torchrun child).

ms-swift starts its commands as `python FILE flags` or `torchrun FILE flags`; this file takes their place, so plug-ins
are loaded in each process, dataloader workers started by spawn included (they import this file again as `__mp_main__`).
Which command to run is in SWIFT_CL_COMMAND, because ms-swift's launcher passes on flags and environment only.
"""

import contextlib
import os
import runpy
import sys
import traceback
from pathlib import Path
from typing import NoReturn

from swift_cl.errors import RunFailure, UserError
from swift_cl.io import write_json
from swift_cl.models import register_models
from swift_cl.tuners import register_tuners

COMMAND = "SWIFT_CL_COMMAND"
ERROR_FILE = "SWIFT_CL_ERROR_FILE"


LOST = ("Connection reset by peer", "Connection closed by peer", "remote process exited")
"""What gloo and NCCL say to a rank whose partner has gone without a word of its own."""


def rank_text() -> str:
    """`rank 1 of 2: `, and nothing where there is one process."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    return f"rank {os.environ.get('RANK', '0')} of {size}: " if size > 1 else ""


def report_error(error: Exception, code: int) -> None:
    """Leave the message for the parent: torchrun passes on neither exit codes nor clean output.

    The first report stays. When a rank fails the others lose it in the middle of a collective, and fail as well.
    """
    text = str(error)
    if any(words in text for words in LOST):
        text = "lost the connection to another rank, which was killed (out of memory?) or whose machine is gone"
    elif not isinstance(error, (UserError, RunFailure)):
        text = f"{type(error).__name__}: {text.splitlines()[0] if text else 'no message'}; the traceback is above"
    message = text if code == 2 else rank_text() + text
    path = os.environ.get(ERROR_FILE)
    if not path:
        print(f"swift-cl: error: {message}", file=sys.stderr)
        return
    own = Path(f"{path}.{os.getpid()}")
    write_json(own, {"code": code, "message": message})
    with contextlib.suppress(FileExistsError):
        os.link(own, path)  # unlike a rename, it does not replace what another rank has left
    own.unlink()


def stop(code: int) -> NoReturn:
    """End this process. One of several ends at once: taking a process group down in order waits for the others."""
    sys.stdout.flush()
    sys.stderr.flush()
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        os._exit(code)
    sys.exit(code)


def _run() -> None:
    command = os.environ[COMMAND]
    if command == "sft":
        from swift.cli.sft import try_init_unsloth
        from swift.cli.utils import try_use_single_device_mode

        try_use_single_device_mode()
        try_init_unsloth()
        from swift_cl.training.sft import main

        main(sys.argv[1:])
    elif command == "chain":
        from swift_cl.workflow.chain import main as chain_main

        chain_main(sys.argv[1:])
    else:
        from swift.cli.main import ROUTE_MAPPING

        runpy.run_module(ROUTE_MAPPING[command], run_name="__main__", alter_sys=True)


# Python puts this file's folder first on the path, where its neighbours would hide packages of the same names.
sys.path[:] = [path for path in sys.path if path != str(Path(__file__).resolve().parent)]
if __name__ in ("__main__", "__mp_main__"):  # not in the parent, which imports names from here and must stay light
    register_tuners()
    register_models()

if __name__ == "__main__":
    try:
        _run()
    except UserError as error:
        report_error(error, 2)
        stop(2)
    except Exception as error:
        if not isinstance(error, RunFailure):
            traceback.print_exc()
        report_error(error, 1)
        stop(1)
