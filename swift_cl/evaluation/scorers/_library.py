"""Libraries of the extra `scorers`, and where scorers keep what they compute once."""

import importlib
import importlib.util
import os
from pathlib import Path

from swift_cl.errors import UserError

EXTRA = "pip install 'swift_cl[scorers]'"


def require(scorer: str, *modules: str) -> None:
    """Check that libraries are installed, without importing them.

    Raises:
        UserError: one is missing; names the extra that brings it.
    """
    for module in modules:
        if importlib.util.find_spec(module) is None:
            raise UserError(f"scorer {scorer!r} needs the library {module}, which is not installed: {EXTRA}")


def cache_dir(name: str) -> Path:
    """A folder for what can be computed again: `$SWIFT_CL_CACHE/name`, else `$XDG_CACHE_HOME/swift_cl/name`, else
    `~/.cache/swift_cl/name`."""
    root = os.environ.get("SWIFT_CL_CACHE")
    if root:
        return Path(root) / name
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "swift_cl" / name
