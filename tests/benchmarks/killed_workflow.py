"""A whole benchmark from one command, killed several times and continued, equals the undisturbed run.

    python -m tests.benchmarks.killed_workflow --benchmark ../shared/bench/data/easycl/ABSACL_ATSC --order order1

Runs `swift-cl run` (full_workflow, tiny model, a few steps a stage) twice: once undisturbed; once with SIGKILL for it
and everything it started at random moments (in training, the last one in the asking), each time continued by the same
command. Then every adapter must be equal byte for byte, every answer, and results.json. Exit code 1 if one is not. One
JSON object is printed.
"""

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
import yaml

ROOT = Path(__file__).resolve().parents[2]
TRAIN: dict[str, Any] = {
    "model_type": "qwen2", "template": "qwen2_5", "torch_dtype": "float32", "use_cpu": True,
    "per_device_train_batch_size": 4, "gradient_accumulation_steps": 1, "learning_rate": 2.0e-3, "lora_rank": 4,
    "save_steps": 2, "logging_steps": 1, "dataset_num_proc": 1, "dataloader_num_workers": 0,
}  # fmt: skip


def write_run_file(folder: Path, args: argparse.Namespace) -> Path:
    """The run file of one of the two runs."""
    folder.mkdir(parents=True, exist_ok=True)
    values = {
        "name": "killed", "benchmark": str(Path(args.benchmark).resolve()), "order": args.order, "method": args.method,
        "model": str(ROOT / "assets" / "tiny_base"), "output_dir": "runs",
        "train": {**TRAIN, "max_steps": args.steps},
        "eval": {"test_limit": args.test_limit, "max_tokens": 8, "concurrency": 32},
    }  # fmt: skip
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(values, sort_keys=False))
    return path


def start(config: Path) -> "subprocess.Popen[bytes]":
    """`swift-cl run` with its output in a log beside the run file."""
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "HF_HUB_OFFLINE": "1"}
    with (config.parent / "log.txt").open("ab") as log:
        command = [sys.executable, "-m", "swift_cl.cli.main", "run", str(config)]
        return subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)


def kill_all(process: "subprocess.Popen[bytes]") -> None:
    """SIGKILL for a process and everything that it started, as when the machine loses power."""
    family = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
    for member in family:
        member.suspend()  # so that none of them can react to the end of another
    for member in family:
        member.kill()
    process.wait()


def progress(folder: Path) -> tuple[int, int]:
    """How far a run is: finished stages, and answers that are stored."""
    stages = len(list(folder.glob("runs/*/stage_*/stage.json")))
    return stages, sum(sum(1 for _ in file.open("rb")) for file in folder.glob("runs/*/answers/*/*.jsonl"))


def disturbed(config: Path, wanted: list[tuple[int, int]], rng: random.Random) -> list[dict[str, int]]:
    """Run, killed a moment after it has each of the wanted (finished stages, stored answers), then to its end."""
    found = []
    for stages, answers in wanted:
        process = start(config)
        while progress(config.parent) < (stages, answers):
            if process.poll() is not None:
                raise SystemExit(f"the run ended before it was killed, see {config.parent / 'log.txt'}")
            time.sleep(0.05)
        time.sleep(rng.uniform(0, 1))
        kill_all(process)
        done = progress(config.parent)
        found.append({"stages": done[0], "answers": done[1]})
    if start(config).wait() != 0:
        raise SystemExit(f"the continued run failed, see {config.parent / 'log.txt'}")
    return found


def moments(stages: int, answers: int, kills: int, rng: random.Random) -> list[tuple[int, int]]:
    """Random points of a run, one in each of `kills` parts: all in training but the last, which is in the asking."""
    parts = kills - 1
    trained = [rng.randrange(number * stages // parts, (number + 1) * stages // parts) for number in range(parts)]
    return [*((count, 0) for count in trained), (stages, rng.randrange(answers // 20, answers // 2))]


def answers_of(run: Path) -> dict[str, str]:
    """The last answer to every question of a run."""
    found = {}
    for file in sorted(run.glob("answers/*/*.jsonl")):
        for line in file.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            found[f"{file.parent.name}/{file.stem}/{row['id']}/{row['turn']}"] = row["answer"]
    return found


def differences(one: Path, other: Path, method: str) -> list[str]:
    """What differs between the two runs."""
    runs = [folder / "runs" / method for folder in (one, other)]
    files = [sorted(p.relative_to(run) for p in run.glob("stage_*/adapter/adapter_model.safetensors")) for run in runs]
    if files[0] != files[1]:
        return [f"stages: {len(files[0])} and {len(files[1])}"]
    found = [str(f) for f in files[0] if (runs[0] / f).read_bytes() != (runs[1] / f).read_bytes()]
    results = [json.loads((run / "results.json").read_text()) for run in runs]
    if answers_of(runs[0]) != answers_of(runs[1]):
        found.append("answers")
    return found + [f"results.json: {key}" for key in results[0] if results[0][key] != results[1].get(key)]


def main() -> int:
    """Run both and compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--benchmark", required=True, help="benchmark file or folder")
    parser.add_argument("--order")
    parser.add_argument("--method", default="replay")
    parser.add_argument("--steps", type=int, default=8, help="training steps a stage")
    parser.add_argument("--test_limit", type=int, default=3, help="test questions a task")
    parser.add_argument("--kills", type=int, default=3, help="at least 2")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--work_dir", help="default: a temporary folder, removed at the end")
    args = parser.parse_args()
    folder = Path(args.work_dir or tempfile.mkdtemp(prefix="killed_workflow_"))
    begun = time.monotonic()
    if start(write_run_file(folder / "undisturbed", args)).wait() != 0:
        raise SystemExit(f"the undisturbed run failed, see {folder / 'undisturbed' / 'log.txt'}")
    seconds, rng = time.monotonic() - begun, random.Random(args.seed)
    wanted = moments(*progress(folder / "undisturbed"), args.kills, rng)
    killed = disturbed(write_run_file(folder / "killed", args), wanted, rng)
    wrong = differences(folder / "undisturbed", folder / "killed", args.method)
    results = json.loads((folder / "killed" / "runs" / args.method / "results.json").read_text())
    print(json.dumps({
        "stages": len(results["order"]), "answers": len(answers_of(folder / "killed" / "runs" / args.method)),
        "undisturbed_s": round(seconds, 1), "killed": killed,
        "metrics": {name: entry["metrics"]["avg_acc"] for name, entry in results["scorers"].items()},
        "differences": wrong,
    }))  # fmt: skip
    if args.work_dir is None:
        shutil.rmtree(folder)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
