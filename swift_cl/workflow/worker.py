"""The file that runs inside the training or serving process (and in every torchrun child).

ms-swift starts its commands as `python FILE flags` or `torchrun FILE flags`; this file takes their place, so plug-ins
are loaded in each process, dataloader workers started by spawn included (they import this file again as `__mp_main__`).
Which command to run is in SWIFT_CL_COMMAND, because ms-swift's launcher passes on flags and environment only.
"""

import os
import runpy
import sys
from pathlib import Path

from swift_cl.errors import RunFailure, UserError
from swift_cl.io import write_json
from swift_cl.models import register_models
from swift_cl.tuners import register_tuners

COMMAND = "SWIFT_CL_COMMAND"
ERROR_FILE = "SWIFT_CL_ERROR_FILE"


def report_error(error: Exception, code: int) -> None:
    """Leave the message for the parent: torchrun passes on neither exit codes nor clean output."""
    path = os.environ.get(ERROR_FILE)
    if path:
        write_json(Path(path), {"code": code, "message": str(error)})  # atomic: every rank may report
    else:
        print(f"swift-cl: error: {error}", file=sys.stderr)


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
        sys.exit(2)
    except RunFailure as error:
        report_error(error, 1)
        sys.exit(1)
