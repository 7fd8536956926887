"""lmdeploy through ms-swift: a GPU, and one model a server; adapters cannot be served by name."""

from collections.abc import Mapping

from swift_cl.errors import UserError
from swift_cl.serving.adapters import Deployment
from swift_cl.serving.backends import Command, ServerOptions

ENGINES = ("lmdeploy",)


def check(deployment: Deployment, packages: Mapping[str, str], options: ServerOptions) -> None:
    """Refuse adapters, which ms-swift has no code for here."""
    if deployment.adapters:
        raise UserError(
            "--infer_backend lmdeploy cannot serve adapters (ms-swift has no adapter code for it): use vllm or pt, or "
            "pass --merge_stages, which merges each stage into the base model and serves it alone"
        )
    if "lmdeploy" not in packages:
        raise UserError(
            f"{options.python} has no lmdeploy; install swift_cl[lmdeploy] there, or use --infer_backend pt"
        )


def arguments(deployment: Deployment, packages: Mapping[str, str], options: ServerOptions) -> Command:
    """Its flags."""
    return Command(["--infer_backend", "lmdeploy"])
