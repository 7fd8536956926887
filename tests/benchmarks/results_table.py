"""The results table: every method on small forms of the benchmarks, tuned, three seeds. Writes assets/RESULTS.md.

    python -m tests.benchmarks.results_table run --part cl_benchmark --methods seq replay ssr o_lora mtl --minutes 60
    python -m tests.benchmarks.results_table table

`run` fills cells, one method on one benchmark each, and can be stopped at any time: a filled cell is a file of
assets/results and is not done again, and what a stopped cell has trained and asked is found again in --work. First each
learning rate of the grid is tried on development rows, then the seeds are trained with the best and asked the test
rows (`tests/benchmarks/results/parts.py` and `settings.py` say with what). `table` only writes the page.
"""

import argparse
import importlib.metadata
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import yaml

from swift_cl.io import write_json
from swift_cl.methods.registry import get_method, methods
from tests.benchmarks.results.page import METRICS, RESULTS, cells_of, write_page
from tests.benchmarks.results.parts import PARTS, ROOT, Part, fits, write_benchmark
from tests.benchmarks.results.settings import TRAIN, TUNERS, flags_of, tuner_of
from tests.support.commands import environment

SEEDS, DEV_SEED = (1, 2, 3), 0


def write_run(folder: Path, part: Part, model: Path, method: str, rate: float, dev: bool) -> Path:
    """The run file of a method on a part, beside its benchmark and data."""
    write_benchmark(part, folder, dev, get_method(method).classifies)
    tuner = tuner_of(method)
    kind = {} if tuner == "lora" else {"tuner_type": tuner}
    sizes = {"learning_rate": rate, "num_train_epochs": part.epochs, "per_device_train_batch_size": part.batch}
    config: dict[str, Any] = {
        "benchmark": "benchmark.yaml",
        "model": str(model),
        "output_dir": "runs",
        "method": method,
        "seed": [DEV_SEED] if dev else list(SEEDS),
        "train": {**TRAIN, **kind, **TUNERS[tuner].train, **sizes},
        "eval": {"concurrency": 64, "no_report": True, "no_identity_check": dev},
    }
    if flags_of(method, part.rows):
        config["method_settings"] = {method: flags_of(method, part.rows)}
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(config, sort_keys=False))
    return path


def module(log: Path, name: str, *argv: str) -> tuple[float, float]:
    """Run a module to its end; (processor seconds of it and its children, peak resident set of the largest in MB).

    Raises:
        RuntimeError: it failed; the log is named.
    """
    with log.open("ab") as stream:
        process = subprocess.Popen(
            [sys.executable, "-m", name, *argv],
            env={**environment(), "PYTHONPATH": str(ROOT)}, cwd=ROOT, stdout=stream, stderr=stream,
        )  # fmt: skip
        _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise RuntimeError(f"{name} {' '.join(argv)} failed, see {log}")
    return usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024


def swift_cl(log: Path, *argv: str) -> tuple[float, float]:
    """Run a command of the product, see `module`."""
    return module(log, "swift_cl.cli.main", *argv)


def model_of(part: Part, work: Path) -> Path:
    """The folder of a part's base model, which is first made where it is not the bench's own."""
    if not part.lists:
        return (ROOT / part.model).resolve()
    model = work / "warm_base"
    if not (model / "tokenizer_config.json").is_file():  # written last
        work.mkdir(parents=True, exist_ok=True)
        module(work / "warm_base.log", "tests.benchmarks.results.warm_base", "--out", str(model))
    return model


def scores(folder: Path) -> list[dict[str, Any]]:
    """What every run below a folder scored, by seed: metrics, matrix and floor."""
    found = [json.loads(path.read_text()) for path in sorted(folder.glob("runs/**/results.json"))]
    return [next(iter(entry["scorers"].values())) for entry in found]


def choose_rate(part: Part, model: Path, method: str, work: Path) -> dict[float, float]:
    """Avg.ACC after the first two tasks on the development rows, by learning rate."""
    tried = {}
    for rate in TUNERS[tuner_of(method)].rates:
        folder = work / f"dev-{rate:g}"
        swift_cl(work / f"dev-{rate:g}.log", "run", str(write_run(folder, part, model, method, rate, True)))
        tried[rate] = scores(folder)[0]["metrics"]["avg_acc"]
    return tried


def fill(part: Part, model: Path, method: str, work: Path) -> dict[str, Any]:
    """Tune, train and ask: a cell of the table."""
    work.mkdir(parents=True, exist_ok=True)
    tried = choose_rate(part, model, method, work)
    best = max(tried, key=lambda rate: tried[rate])
    path, log, cost = write_run(work / "test", part, model, method, best, False), work / "test.log", work / "cost.json"
    if not cost.is_file():
        continued = any((work / "test").glob("runs/**/stage.json"))  # what was trained before the stop is not timed
        seconds, memory = swift_cl(log, "run", str(path), "--mode", "train_only")
        write_json(cost, {"cpu_seconds": None if continued else round(seconds, 1), "memory_mb": round(memory)})
    swift_cl(log, "run", str(path))
    found = scores(work / "test")
    return {
        "learning_rate": best,
        "tried": {f"{rate:g}": value for rate, value in tried.items()},
        "seeds": list(SEEDS),
        "metrics": {name: [run["metrics"][name] for run in found] for name in METRICS},
        "matrices": [run["matrix"] for run in found],
        **json.loads(cost.read_text()),
        "versions": {name: importlib.metadata.version(name) for name in ("ms-swift", "torch", "peft")},
        "command": f"python -m tests.benchmarks.results_table run --part {part.name} --methods {method}",
    }


def run(args: argparse.Namespace) -> int:
    """Fill what is missing, as long as there is time; a cell that fails is named and left empty."""
    end, failed = time.monotonic() + 60 * args.minutes, 0
    for name in args.part:
        for method in args.methods or sorted(methods()):
            if method in cells_of(name) or not fits(PARTS[name], method):
                continue
            if time.monotonic() > end:
                print("the time is over; the same command continues")
                return 1 if failed else 0
            print(f"{time.strftime('%H:%M:%S')} {name}: {method}", flush=True)
            try:
                work = Path(args.work).resolve()
                cell = fill(PARTS[name], model_of(PARTS[name], work), method, work / name / method)
            except RuntimeError as error:
                print(f"failed: {error}", file=sys.stderr, flush=True)
                failed += 1
                continue
            write_json(RESULTS / name / f"{method}.json", cell)
            write_page()
    return 1 if failed else 0


def main() -> int:
    """`run` or `table`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    runner = commands.add_parser("run", help="fill missing cells")
    runner.add_argument("--part", nargs="+", choices=PARTS, default=list(PARTS), help="benchmarks")
    runner.add_argument("--methods", nargs="+", choices=sorted(methods()), help="methods; default: all")
    runner.add_argument("--minutes", type=float, default=1e9, help="begin no further cell after so many minutes")
    runner.add_argument("--work", default=str(ROOT / "build" / "results"), help="folder of the runs")
    runner.set_defaults(do=run)
    commands.add_parser("table", help="write the page").set_defaults(do=lambda _: write_page() or 0)
    args = parser.parse_args()
    return int(args.do(args))


if __name__ == "__main__":
    sys.exit(main())
