"""Merge one stage's adapter into a copy of the base model, for backends that serve no adapters.

The merging process ends with this one, even when this one is killed outright.
"""

import contextlib
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from swift_cl.errors import RunFailure, UserError
from swift_cl.serving.adapters import Adapter, Deployment
from swift_cl.serving.backends import WORKERS
from swift_cl.serving.server import LOG_LINES, end_group

MERGE = WORKERS / "merge_adapter.py"


def check_mergeable(adapter: Adapter) -> None:
    """Refuse, before anything starts, what cannot be merged."""
    if adapter.peft_type != "LORA":
        raise UserError(
            f"{adapter.path}: --merge_stages merges LoRA adapters, this one is {adapter.peft_type}; "
            "use --infer_backend pt without it"
        )


def merge_command(adapter: Adapter, base: Deployment, output: Path) -> list[str]:
    """ms-swift's export with our plug-ins, told the model's settings so that none come from the adapter's folder."""
    settings = [text for key, value in base.model_args.items() for text in (f"--{key}", value)]
    return [
        *(sys.executable, str(MERGE), "--model", base.model, *settings),
        *("--adapters", str(adapter.path), "--merge_lora", "true", "--output_dir", str(output)),
        *("--load_args", "false", "--exist_ok", "true"),
    ]


@contextlib.contextmanager
def merged(adapter: Adapter, base: Deployment, folder: Path, log: Path) -> Iterator[Deployment]:
    """A deployment of the merged model, which exists within the block only: it is as large as the base model.

    Args:
        folder: where it is written; deleted before (a leftover of a killed run) and after.

    Raises:
        RunFailure: the merge failed; with its command and last log lines.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    try:
        _run(merge_command(adapter, base, folder), log)
        if not any(folder.glob("*.safetensors")):
            raise RunFailure(f"merging {adapter.path} wrote no weights to {folder}, see {log}")
        yield Deployment(str(folder), base.model_args)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        with contextlib.suppress(OSError):
            folder.parent.rmdir()


def _run(argv: list[str], log: Path) -> None:
    log.parent.mkdir(parents=True, exist_ok=True)
    env = {k: v for k, v in os.environ.items() if k not in ("NPROC_PER_NODE", "NNODES")}
    env["SWIFT_CL_SERVER_PARENT"] = str(os.getpid())
    with open(log, "wb") as stream:
        process = subprocess.Popen(
            argv, stdin=subprocess.DEVNULL, stdout=stream, stderr=subprocess.STDOUT, env=env, start_new_session=True
        )
        try:
            code = process.wait()
        except BaseException:
            end_group(process)
            raise
    if code != 0:
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()[-LOG_LINES:]
        tail = "\n".join(f"  | {line}" for line in lines) or "  | (nothing)"
        raise RunFailure(
            f"merging ended with exit code {code}\ncommand: {shlex.join(argv)}\nlast lines of {log}:\n{tail}"
        )
