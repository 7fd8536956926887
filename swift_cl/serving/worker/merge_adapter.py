"""`swift-cl export` in a process that ends with the one that started it. Run by file path."""

import sys

from starter import watch_starter  # type: ignore[import-not-found]

if __name__ == "__main__":
    watch_starter()
    from swift_cl.cli.main import main

    main(["export", *sys.argv[1:]])
