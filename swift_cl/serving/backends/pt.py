"""The transformers engine of ms-swift: every adapter type that PEFT can switch, CPU or GPU."""

import os
import sys
from collections.abc import Mapping

from swift_cl.errors import UserError
from swift_cl.models import NAMES
from swift_cl.serving.adapters import Adapter, Deployment
from swift_cl.serving.backends import Command, ServerOptions
from swift_cl.tuners.registry import tuner_of_type

NAME = "pt"
ENGINES = ("transformers",)
CLASSIFIES = CONSTRAINS = OUR_MODELS = True
ALONE = ("PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING")
"""PEFT puts these prompts in front of a row's padding, so that what a row is answered would depend on its batch."""
PLUGINS = "SWIFT_CL_PLUGINS"
"""Tells the worker to import our tuners and models, which it does without otherwise."""


def _is_our_model(deployment: Deployment) -> bool:
    return deployment.model_args.get("model_type") in NAMES


def _is_ours(adapter: Adapter) -> bool:
    tuner = tuner_of_type(adapter.peft_type)
    return tuner is not None and tuner.own_type


def check(deployment: Deployment, packages: Mapping[str, str], options: ServerOptions) -> None:
    """Everything that PEFT can switch is served; a type of ours needs swift_cl in the server's environment."""
    needs = [f"{a.path}: an adapter of type {a.peft_type}" for a in deployment.adapters if _is_ours(a)]
    if _is_our_model(deployment):
        needs.insert(0, f"{deployment.model}: a model of type {deployment.model_args['model_type']}")
    if needs and options.python != sys.executable and "swift-cl" not in packages:
        raise UserError(
            f"{needs[0]} needs swift_cl in the server's environment; "
            f"install it there ({options.python} -m pip install -e .), or leave --server_python out"
        )


def arguments(deployment: Deployment, packages: Mapping[str, str], options: ServerOptions) -> Command:
    """Its flags. One core is left to whoever asks: with a thread on every core of a busy CPU, OpenMP's waiting made a
    batch of a small model up to 20 times slower (0.1 s against 2-4 s, 2 cores). OMP_NUM_THREADS of the caller wins.
    """
    env = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) - 1))}
    if _is_our_model(deployment) or any(_is_ours(adapter) for adapter in deployment.adapters):
        env[PLUGINS] = "1"
    batch = 1 if any(adapter.peft_type in ALONE for adapter in deployment.adapters) else options.max_batch_size
    return Command(["--infer_backend", "transformers", "--max_batch_size", str(batch)], env)
