"""What every method sends between processes in an optimizer step, against plain fine-tuning: measured, two processes.

    python -m tests.benchmarks.communication [--methods ewc gem] [--deepspeed zero2] [--gem_mode agem] [--json FILE]

A second task of 8 rows with the tiny model, LoRA rank 4, fp32, on the CPU, settings of tests/support/train.py. Counted
are the bytes that one process gives to collectives (tests/support/communication.py). The gradient of the trained
parameters is 4 bytes a parameter; a step of `seq` sends it once, and counts beside it. `beyond` is what a method's step
sends in addition, the largest of its steps, also as a multiple of the gradient.
"""

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("LOG_LEVEL", "ERROR")


def measure(methods: list[str], deepspeed: str | None) -> dict[str, tuple[int, int]]:
    """By method: (bytes beyond the gradient and what seq sends beside it, bytes of the gradient)."""
    from tests.support.chains import STAGES, run_chain
    from tests.support.communication import COUNTED, beyond_plain
    from tests.support.train import contradicting_rows

    engine = {"deepspeed": deepspeed, "fp16": False, "bf16": False} if deepspeed else {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        contradicting_rows(folder)
        environment = {"DS_ACCELERATOR": "cpu"} if deepspeed else {}
        run_chain(folder / "two", sorted({"seq", *methods}), 2, 2, {**COUNTED, **engine}, environment)
        runs = folder / "two" / "runs"
        return {method: beyond_plain(runs / method / STAGES[1], runs / "seq" / STAGES[1]) for method in methods}


def main() -> int:
    from swift_cl.methods.registry import methods
    from tests.support.train import METHOD_FLAGS

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", choices=list(methods()), default=list(methods()))
    parser.add_argument("--deepspeed", choices=("zero0", "zero1", "zero2"))
    parser.add_argument("--gem_mode", choices=("gem", "agem"), default="gem")
    parser.add_argument("--json", type=Path, help="write the numbers to this file")
    args = parser.parse_args()
    METHOD_FLAGS["gem"]["gem_mode"] = args.gem_mode
    stage = int(args.deepspeed[-1]) if args.deepspeed else None
    asked = [name for name in args.methods if stage is None or stage in methods()[name].support.deepspeed]
    found = measure(asked, args.deepspeed)
    print(f"two processes, {args.deepspeed or 'DDP'}; bytes of an optimizer step on one process")
    print(f"{'method':<16}{'gradient':>10}{'beyond':>10}{'in gradients':>14}")
    for name, (beyond, gradient) in found.items():
        print(f"{name:<16}{gradient:>10}{beyond:>10}{beyond / gradient:>14.4f}")
    if args.json:
        args.json.write_text(json.dumps(found, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
