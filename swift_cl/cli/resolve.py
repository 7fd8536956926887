"""`swift-cl resolve-adapter`: the adapter that the next stage starts from."""

import argparse
from pathlib import Path
from typing import Any


def add_parser(subparsers: Any) -> None:
    """Register the command."""
    parser = subparsers.add_parser(
        "resolve-adapter",
        help="print the adapter folder that the next stage starts from",
        description="Print the adapter (or, after full fine-tuning, model) folder of a finished stage. DIR is the "
        "output folder of `swift-cl sft` or `swift sft`. Checkpoints that were cut off are never chosen.",
    )
    parser.add_argument("dir", metavar="DIR", type=Path)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the folder; exit code 2 with one line if there is none."""
    from swift_cl.training.checkpoints import resolve_adapter

    print(resolve_adapter(args.dir))
    return 0
