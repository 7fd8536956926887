"""The results table: every method on small forms of the benchmarks, tuned, three seeds. Writes assets/RESULTS.md.

    python tests/benchmarks/results_table.py run --part cl_benchmark --methods seq replay ssr o_lora mtl --minutes 60
    python tests/benchmarks/results_table.py table

`run` fills cells and can be stopped at any time: what is done is kept in assets/results/<part>.json and not done again.
A cell is a method on a part: first each learning rate of the grid is tried on the development rows (seed 0, the best
Avg.ACC wins), then the seeds are trained with it and asked the test rows. `table` only writes the page. Training runs
alone, one process after the other, so its time and peak memory can be compared.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import yaml

from swift_cl.evaluation.statistics import Summary, summarise
from swift_cl.io import write_json, write_text
from swift_cl.methods.registry import methods
from tests.support.commands import environment

ROOT = Path(__file__).resolve().parents[2]
SHARED = Path(os.environ.get("SWIFT_CL_SHARED", ROOT.parent / "shared"))
RESULTS, PAGE = ROOT / "assets" / "results", ROOT / "assets" / "RESULTS.md"
SEEDS, DEV_SEED = (1, 2, 3), 0
GRID = (5e-4, 1e-3, 2e-3)
METRICS = ("avg_acc", "forgetting", "new_acc")
TRAIN: dict[str, Any] = {
    "model_type": "qwen2", "template": "qwen2_5", "torch_dtype": "float32", "use_cpu": True, "lora_rank": 16,
    "lora_alpha": 32, "lora_dropout": 0.0, "per_device_train_batch_size": 8, "gradient_accumulation_steps": 1,
    "gradient_checkpointing": False, "save_steps": 100000, "logging_steps": 10, "dataset_num_proc": 1,
    "dataloader_num_workers": 0,
}  # fmt: skip
# Settings without which a method does nothing on so few rows; all others keep their defaults.
METHOD_SETTINGS: dict[str, dict[str, Any]] = {
    "replay": {"replay_ratio": 0.1},
    "ssr": {"ssr_embedder": "model", "ssr_num_samples": 60},
    "pseudo_replay": {"pseudo_replay_num_samples": 60},
    "lfpt5": {"lfpt5_task_type": "all"},
}
OTHER_TUNERS = {"moe_lora": "moelora", "cl_moe": "moelora", "prog_prompt": "soft_prompt", "lfpt5": "soft_prompt"}


def news() -> dict[str, Any]:
    """The bundled yearly tasks with the bundled tiny model."""
    folder = ROOT / "datasets" / "continual_news_mini"
    value = yaml.safe_load((folder / "benchmark.yaml").read_text())
    value |= {"data_dir": str(folder), "scorers": ["exact_match"]}
    return value


def cl_benchmark() -> dict[str, Any]:
    """Four tasks of CL_Benchmark, 200 training rows each."""
    folders = {"dbpedia": "TC/dbpedia", "amazon": "SC/amazon", "agnews": "TC/agnews", "sst2": "SC/SST-2"}
    tasks = [
        {"name": name, "train": f"{folder}/train.json", "test": f"{folder}/test.json", "dev": f"{folder}/dev.json"}
        for name, folder in folders.items()
    ]
    return _benchmark("cl_benchmark", SHARED / "bench/data/cl_benchmark", tasks, train_limit=200)


def absa() -> dict[str, Any]:
    """The first eight tasks of ABSACL_ATSC in order 1."""
    folder = SHARED / "bench/data/easycl/ABSACL_ATSC"
    order = json.loads((folder / "benchmark_info.json").read_text())["ABSACL_ATSC"]["orders"]["order1"][:8]
    tasks = [{"name": n, **{k: f"{n}/{n}_{k}.json" for k in ("train", "dev", "test")}} for n in order]
    return _benchmark("alpaca", folder, tasks, train_limit=200)


def superni() -> dict[str, Any]:
    """Five tasks of SuperNI; the last 50 training rows are the development rows."""
    tasks = [
        {"name": n, "train": f"{n}.train.json", "dev": f"{n}.train.json", "test": f"{n}.eval.json"}
        for n in ("qa", "sa", "trans", "para", "pos")
    ]
    return _benchmark("superni", SHARED / "bench/data/superni", tasks, train_limit=150, max_tokens=32, scorer="rouge_l")


PARTS: dict[str, tuple[Any, str, float]] = {
    "news": (news, "assets/tiny_base", 8),
    "cl_benchmark": (cl_benchmark, "../shared/bench/base", 3),
    "absa": (absa, "../shared/bench/base", 3),
    "superni": (superni, "../shared/bench/base", 3),
}
"""By name: what makes the benchmark, the base model, epochs."""


def _benchmark(
    file_format: str, folder: Path, tasks: list[dict[str, Any]], *, train_limit: int, max_tokens: int = 8,
    scorer: str = "exact_match",
) -> dict[str, Any]:  # fmt: skip
    limits = {"train_limit": train_limit, "test_limit": 100}
    return {
        "name": file_format, "format": file_format, "data_dir": str(folder), "scorers": [scorer],
        "generation": {"max_tokens": max_tokens}, "tasks": [{**task, **limits} for task in tasks],
    }  # fmt: skip


def write_run(folder: Path, part: str, method: str, rate: float, seeds: tuple[int, ...], dev: bool) -> Path:
    """The run file of a method on a part, and its benchmark file."""
    make, model, epochs = PARTS[part]
    value = make()
    for task in value["tasks"]:
        held_back = task.pop("dev", None)
        if dev:
            # The news have no development rows: what was learned is asked, in the words of the training.
            task["test"], task["test_limit"] = held_back or task["train"], 50
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "benchmark.yaml").write_text(yaml.safe_dump(value, sort_keys=False))
    train = {**TRAIN, "learning_rate": rate, "num_train_epochs": epochs}
    if method in OTHER_TUNERS:
        train = {k: v for k, v in train.items() if not k.startswith("lora_") or OTHER_TUNERS[method] == "moelora"}
    config = {
        "benchmark": "benchmark.yaml", "model": str((ROOT / model).resolve()), "output_dir": "runs", "method": method,
        "seed": list(seeds), "train": train, "method_settings": {method: METHOD_SETTINGS.get(method, {})},
        "eval": {"concurrency": 48, "no_report": True},
    }  # fmt: skip
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(config, sort_keys=False))
    return path


def swift_cl(log: Path, *argv: str) -> tuple[float, float]:
    """Run a command to its end; (seconds, peak resident set of its largest process in MB).

    Raises:
        SystemExit: it failed; the log is named.
    """
    begin = time.monotonic()
    with log.open("ab") as stream:
        process = subprocess.Popen(
            [sys.executable, "-m", "swift_cl.cli.main", *argv],
            env={**environment(), "OMP_NUM_THREADS": "2", "PYTHONPATH": str(ROOT)}, stdout=stream, stderr=stream,
        )  # fmt: skip
        _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"swift-cl {' '.join(argv)} failed, see {log}")
    return time.monotonic() - begin, usage.ru_maxrss / 1024


def scores(folder: Path) -> list[dict[str, float]]:
    """The metrics of every run below a folder, by seed."""
    found = [json.loads(path.read_text()) for path in sorted(folder.glob("runs/**/results.json"))]
    return [next(iter(entry["scorers"].values()))["metrics"] for entry in found]


def fill(part: str, method: str, work: Path) -> dict[str, Any]:
    """Tune, train and ask: a cell of the table."""
    tried: dict[float, float] = {}
    for rate in GRID:
        folder = work / part / method / f"dev-{rate:g}"
        swift_cl(folder.with_suffix(".log"), "run", str(write_run(folder, part, method, rate, (DEV_SEED,), True)))
        tried[rate] = scores(folder)[0]["avg_acc"]
        shutil.rmtree(folder)
    best = max(tried, key=lambda rate: tried[rate])
    folder = work / part / method / "test"
    path, log = write_run(folder, part, method, best, SEEDS, False), folder.with_suffix(".log")
    seconds, memory = swift_cl(log, "run", str(path), "--mode", "train_only")
    swift_cl(log, "run", str(path))
    found = scores(folder)
    return {
        "learning_rate": best,
        "tried": {f"{rate:g}": value for rate, value in tried.items()},
        "seeds": list(SEEDS),
        "metrics": {name: [run[name] for run in found] for name in METRICS},
        "train_seconds": round(seconds, 1),
        "memory_mb": round(memory),
        "command": f"python tests/benchmarks/results_table.py run --part {part} --methods {method}",
    }


def run(args: argparse.Namespace) -> None:
    """Fill what is missing, as long as there is time."""
    end = time.monotonic() + 60 * args.minutes
    for part in args.part:
        file = RESULTS / f"{part}.json"
        cells = json.loads(file.read_text()) if file.is_file() else {}
        for method in args.methods or sorted(methods()):
            if method in cells:
                continue
            if time.monotonic() > end:
                print("the time is over; the same command continues")
                return
            print(f"{part}: {method}", flush=True)
            cells[method] = fill(part, method, Path(args.work))
            write_json(file, cells)
            table()


def mean(summary: Summary) -> str:
    """`57.25 (55.00 to 60.00)`."""
    if summary.mean is None:
        return "-"
    interval = "" if summary.interval is None else f" ({summary.low:.2f} to {summary.high:.2f})"
    return f"{summary.mean:.2f}{interval}"


def verdict(method: str, own: Summary, seq: Summary | None) -> str:
    """Whether the method is above `seq`, as every paper claims of its own; an overlap decides nothing."""
    if method == "seq" or seq is None or own.interval is None or seq.interval is None:
        return ""
    if own.interval[0] > seq.interval[1]:
        return "✓"
    return "✗" if own.interval[1] < seq.interval[0] else "open"


def table() -> None:
    """Write the page from the files of assets/results."""
    lines = [
        "# Results",
        "",
        "Made by `tests/benchmarks/results_table.py`, see there: small models and few rows, on a CPU. The learning",
        f"rate of every method is the best of {', '.join(f'{rate:g}' for rate in GRID)} on development rows (seed "
        f"{DEV_SEED}); then seeds {', '.join(map(str, SEEDS))}",
        "on the test rows. Mean and, in brackets, 95 % bootstrap interval, which is the range of three runs. Time and",
        "memory: all seeds' training, over that of `seq`. Last column: Avg.ACC above `seq` (✓), below (✗), or the",
        "intervals overlap (open).",
    ]
    for part in PARTS:
        file = RESULTS / f"{part}.json"
        if not file.is_file():
            continue
        cells = json.loads(file.read_text())
        made, model, epochs = PARTS[part]
        lines += ["", f"## {part}", "", f"{made.__doc__} Base model `{model}`, {epochs:g} epochs a task.", ""]
        lines += ["| method | lr | Avg.ACC | Forgetting | New.ACC | time | memory | above seq |", "| --- " * 8 + "|"]
        own = {name: {m: summarise(cell["metrics"][m]) for m in METRICS} for name, cell in cells.items()}
        base = cells.get("seq")
        for name in sorted(cells, key=lambda name: -(own[name]["avg_acc"].mean or 0)):
            cell = cells[name]
            ratios = [
                f"{cell[key] / base[key]:.2f}x" if base else "" for key in ("train_seconds", "memory_mb")
            ]  # fmt: skip
            above = verdict(name, own[name]["avg_acc"], own["seq"]["avg_acc"] if base else None)
            values = [f"`{name}`", f"{cell['learning_rate']:g}", *(mean(own[name][m]) for m in METRICS), *ratios, above]
            lines.append("| " + " | ".join(values) + " |")
        lines += ["", "Each row: `python tests/benchmarks/results_table.py run --part " + part + " --methods NAME`."]
    write_text(PAGE, "\n".join(lines) + "\n")


def main() -> None:
    """`run` or `table`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    runner = commands.add_parser("run", help="fill missing cells")
    runner.add_argument("--part", nargs="+", choices=PARTS, default=list(PARTS), help="benchmarks")
    runner.add_argument("--methods", nargs="+", choices=sorted(methods()), help="methods; default: all")
    runner.add_argument("--minutes", type=float, default=1e9, help="begin no further cell after so many minutes")
    runner.add_argument("--work", default=str(ROOT / "build" / "results"), help="folder of the runs")
    runner.set_defaults(do=run)
    commands.add_parser("table", help="write the page").set_defaults(do=lambda args: table())
    args = parser.parse_args()
    args.do(args)


if __name__ == "__main__":
    main()
