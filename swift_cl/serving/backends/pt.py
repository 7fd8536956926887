"""The transformers engine of ms-swift: every adapter type that PEFT can switch, CPU or GPU."""

import os
from collections.abc import Mapping

from swift_cl.serving.adapters import Deployment
from swift_cl.serving.backends import Command, ServerOptions

NAME = "pt"
ENGINES = ("transformers",)


def check(deployment: Deployment, packages: Mapping[str, str], options: ServerOptions) -> None:
    """Everything that PEFT can switch is served."""


def arguments(deployment: Deployment, packages: Mapping[str, str], options: ServerOptions) -> Command:
    """Its flags. One core is left to whoever asks: with a thread on every core of a busy CPU, OpenMP's waiting made a
    batch of a small model up to 20 times slower (0.1 s against 2-4 s, 2 cores). OMP_NUM_THREADS of the caller wins.
    """
    env = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) - 1))}
    return Command(["--infer_backend", "transformers", "--max_batch_size", str(options.max_batch_size)], env)
