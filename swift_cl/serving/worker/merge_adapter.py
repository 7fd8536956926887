"""`swift-cl export` in a process that ends with the one that started it. Run by file path."""

import runpy
import sys

from starter import watch_starter  # type: ignore[import-not-found]

if __name__ == "__main__":
    watch_starter()
    sys.argv = ["swift-cl", "export", *sys.argv[1:]]
    runpy.run_module("swift_cl.cli.main", run_name="__main__")
