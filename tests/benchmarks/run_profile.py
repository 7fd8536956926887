"""Where the time of a whole benchmark goes, and what switching from one stage to the next costs.

    python -m tests.benchmarks.run_profile --model ../shared/bench/base \
        --benchmark ../shared/bench/data/easycl/ABSACL_ATSC --order order1 --steps 30 --test_limit 20

Runs `swift-cl run` (full_workflow) and prints one JSON object: the wall time; training (the Trainer's own time, all
stages), generation (the time in which a server was asked), their share of the wall time; and for every stage but the
first its switch: the time between the two stages' ends that is not the Trainer's. Rows are encoded when they are needed
(`lazy_tokenize`), so that this counts as training, as it does where every row is trained on.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import yaml

from tests.benchmarks.killed_workflow import TRAIN, start


def write_run_file(folder: Path, args: argparse.Namespace) -> Path:
    """The run file of the measured run."""
    values = {
        "name": "profile", "benchmark": str(Path(args.benchmark).resolve()), "order": args.order, "method": args.method,
        "model": str(Path(args.model).resolve()), "output_dir": "runs",
        "train": {
            **TRAIN, "per_device_train_batch_size": 8, "learning_rate": 1e-3, "lora_rank": 16, "save_steps": 10000,
            "logging_steps": 10, "max_steps": args.steps, "lazy_tokenize": True,
        },
        "eval": {"test_limit": args.test_limit, "max_tokens": args.max_tokens, "concurrency": 32},
    }  # fmt: skip
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(values, sort_keys=False))
    return path


def trained_seconds(stage: Path) -> float:
    """The Trainer's time of a stage, from the last line of its log."""
    lines = [json.loads(line) for line in (stage / "logging.jsonl").read_text(encoding="utf-8").splitlines()]
    return float(next(line["train_runtime"] for line in reversed(lines) if "train_runtime" in line))


def profile(folder: Path, wall: float) -> dict[str, Any]:
    """What the files of a finished run say."""
    run = next(path.parent for path in folder.glob("runs/*/run.json"))
    stages = sorted(run.glob("stage_*_*"), key=lambda path: int(path.name.split("_")[1]))
    ends = [(stage / "stage.json").stat().st_mtime for stage in stages]
    trained = [trained_seconds(stage) for stage in stages]
    switches = [b - a - own for a, b, own in zip(ends, ends[1:], trained[1:], strict=False)]
    asked = [json.loads(line) for line in (run / "evaluations.jsonl").read_text(encoding="utf-8").splitlines()]
    generation = sum(line["asking_seconds"] for line in asked)
    return {
        "wall_seconds": round(wall, 1),
        "training_seconds": round(sum(trained), 1),
        "generation_seconds": round(generation, 1),
        "share": round((sum(trained) + generation) / wall, 3),
        "stages": len(stages),
        "questions": sum(line["asked"] for line in asked),
        "evaluation_seconds": round(sum(line["seconds"] for line in asked), 1),
        "server_seconds": [server["ready_seconds"] for line in asked for server in line["servers"]],
        "switch_seconds": {
            "median": round(sorted(switches)[len(switches) // 2], 2), "largest": round(max(switches), 2),
        },
    }  # fmt: skip


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--benchmark", required=True, help="a benchmark's file or folder")
    parser.add_argument("--order", help="its order")
    parser.add_argument("--model", required=True, help="the base model's folder")
    parser.add_argument("--method", default="seq", help="method")
    parser.add_argument("--steps", type=int, default=30, help="steps a stage")
    parser.add_argument("--test_limit", type=int, default=20, help="questions a task")
    parser.add_argument("--max_tokens", type=int, default=8, help="tokens of an answer")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config = write_run_file(folder, args)
        begin = time.monotonic()
        if start(config).wait():
            subprocess.run(["tail", "-n", "20", str(folder / "log.txt")], check=False)
            sys.exit("the run failed")
        print(json.dumps(profile(folder, time.monotonic() - begin), indent=2))


if __name__ == "__main__":
    main()
