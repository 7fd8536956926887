"""`swift-cl plain-lora`: an adapter of another tuner as a LoRA, where one computes the same."""

import argparse
from pathlib import Path
from typing import Any


def add_parser(subparsers: Any) -> None:
    """Register the command."""
    parser = subparsers.add_parser(
        "plain-lora",
        help="write an adalora or moelora adapter as a plain LoRA, where that is exact",
        description="Write the adapter of a stage (or an adapter folder) as a plain LoRA, which vLLM and any other "
        "server of LoRA loads. Exact, or refused: adalora always is; moelora where its gate does not depend on the "
        "input (one expert, routers of zeros, cl_moe with beta 0); the other tuners are no LoRA.",
    )
    parser.add_argument("dir", metavar="DIR", type=Path, help="output folder of a stage, or an adapter folder")
    parser.add_argument("output", metavar="OUTPUT_DIR", type=Path, help="folder to write, which is not there yet")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Write the adapter; exit code 2 with one line where there is no such LoRA."""
    from swift_cl.training.checkpoints import resolve_adapter
    from swift_cl.tuners._plain_lora import write_plain_lora

    rank = write_plain_lora(resolve_adapter(args.dir), args.output)
    print(f"{args.output}: LoRA of rank {rank}")
    return 0
