"""The transformers engine of ms-swift: every adapter type that PEFT can switch, CPU or GPU."""

import os

from swift_cl.errors import UserError
from swift_cl.serving.adapters import Deployment
from swift_cl.serving.backends import Command, ServerOptions

OLDEST = (4, 6)
"""ms-swift up to 4.5.2 answered concurrent requests for different adapters with the first one's adapter (#10134)."""


def check(deployment: Deployment, packages: dict[str, str], options: ServerOptions) -> None:
    """Refuse an ms-swift that mixes adapters up."""
    version = packages["ms-swift"]
    if tuple(int(part) for part in version.split(".")[:2]) < OLDEST:
        raise UserError(f"{options.python} has ms-swift {version}, which mixes adapters up; install ms-swift>=4.6")


def arguments(deployment: Deployment, packages: dict[str, str], options: ServerOptions) -> Command:
    """Its flags. One core is left to whoever asks: with a thread on every core of a busy CPU, OpenMP's waiting made a
    batch of a small model up to 20 times slower (0.1 s against 2-4 s, 2 cores). OMP_NUM_THREADS of the caller wins.
    """
    env = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) - 1))}
    return Command(["--infer_backend", "transformers", "--max_batch_size", str(options.max_batch_size)], env)
