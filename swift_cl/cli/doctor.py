"""`swift-cl doctor`: versions, devices, optional parts, and what cannot work here and why."""

import argparse
from typing import Any


def add_parser(subparsers: Any) -> None:
    """Register the command."""
    parser = subparsers.add_parser(
        "doctor",
        help="what works on this machine, what cannot, and why",
        description="Print versions, devices and optional parts. With the flags below, check a planned job as well: "
        "exit code 2 and one line if it cannot work here.",
    )
    parser.add_argument("--model", help="a base model that is about to be used: folder or hub id")
    parser.add_argument("--data", nargs="+", default=[], metavar="FILE", help="data files that are about to be used")
    parser.add_argument("--gpus", type=int, metavar="N", help="number of CUDA GPUs that are about to be used")
    parser.add_argument("--quiet", action="store_true", help="only check, print nothing when all is well")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the state of this machine; check a job if flags name one."""
    from swift_cl.doctor import check_job, describe

    if not args.quiet:
        print(describe())
    check_job(args.model, args.data, args.gpus)
    return 0
