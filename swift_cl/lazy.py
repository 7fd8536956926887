"""Import heavy packages at first use.

Method files define both the flags (needed by `--help` in under two seconds) and the mathematics (needs torch).
A proxy keeps both in one file without paying for torch when only the flags are read.
"""

import importlib
from typing import Any


class LazyModule:
    """Stands for a module and imports it on the first attribute access."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, attribute: str) -> Any:
        return getattr(importlib.import_module(self._name), attribute)
