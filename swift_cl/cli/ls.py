"""`swift-cl ls`: what is available."""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from swift_cl.errors import UserError

if TYPE_CHECKING:
    from swift_cl.methods.base import Support

KINDS = ("methods", "tuners", "benchmarks", "scorers")
# Too long for a table.
JSON_ONLY = (
    "summary",
    "cost",
    "flags",
    "paper",
    "cell",
    "options",
    "data_dir",
    "missing",
    "data_source",
    "description",
    "file",
)
LONGEST_LIST = 6
WIDTH_OF_A_FILE = 160


def add_parser(subparsers: Any) -> None:
    """Register the command."""
    parser = subparsers.add_parser(
        "ls", help="list methods, tuners, benchmarks or scorers", description="What is available and what it supports."
    )
    parser.add_argument("kind", choices=KINDS)
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print JSON")
    form.add_argument("--markdown", action="store_true", help="methods: print the README's table of what each supports")
    parser.set_defaults(run=run)


def _methods() -> list[dict[str, Any]]:
    from swift_cl.methods.base import flags_of
    from swift_cl.methods.registry import methods
    from swift_cl.tuners.registry import names

    return [
        {
            "name": method.name,
            "title": method.title,
            "summary": method.summary,
            "cost": method.cost,
            "tuners": list(dict.fromkeys([*method.support.tuners, *(names() if method.support.any_tuner else ())])),
            "deepspeed": [f"zero{stage}" for stage in method.support.deepspeed],
            "fsdp2": method.support.fsdp,
            "packing": method.support.packing,
            "quantized": method.support.quantized,
            "encoder_decoder": method.support.encoder_decoder,
            "flags": [f"--{flag}" for flag, _ in flags_of(method)],
            "paper": method.paper,
        }
        for method in methods().values()
    ]


def zero_text(support: "Support") -> str:
    """The ZeRO stages as the README's table says them, e.g. `0 (fp32), 1-3 (full: 0)`; `no` for none."""

    def ranges(stages: Sequence[int]) -> str:
        if not stages:
            return "no"
        ends = f"{stages[0]}-{stages[-1]}" if len(stages) > 1 else str(stages[0])
        return ends if tuple(stages) == tuple(range(stages[0], stages[-1] + 1)) else ", ".join(map(str, stages))

    stages = support.deepspeed
    if stages[:1] == (0,) and not support.zero0_low_precision:
        text = "0 (fp32)" + (f", {ranges(stages[1:])}" if stages[1:] else "")
    else:
        text = ranges(stages)
    if "full" in support.tuners and support.full_deepspeed != stages:
        text += f" (full: {ranges(support.full_deepspeed)})"
    return text


def _tuners() -> list[dict[str, Any]]:
    from swift_cl.tuners.registry import FROM_MS_SWIFT, tuners

    none: list[str] = []
    theirs = [
        {"name": name, "title": title, "from": "ms-swift", "adapter": kind, "served by": list(served), "flags": none}
        for name, (title, kind, served) in FROM_MS_SWIFT.items()
    ]
    ours = [
        {
            "name": tuner.name,
            "title": tuner.title,
            "from": tuner.__module__,
            "adapter": tuner.peft_type,
            "served by": ["pt"],
            "flags": [*(f"--{flag}" for flag, _ in tuner.flags()), *(f"--{flag}" for flag in tuner.swift_flags)],
            "paper": tuner.paper,
        }
        for tuner in tuners().values()
    ]
    return [*theirs, *ours]


def _benchmarks() -> list[dict[str, Any]]:
    from swift_cl.stream import catalogue
    from swift_cl.stream.benchmark import load_benchmark
    from swift_cl.stream.disk import missing, needed

    roots = sorted({Path("datasets").resolve(), Path(__file__).resolve().parents[2] / "datasets"})
    found = []
    for file in [*(file for root in roots for file in sorted(root.glob("*/benchmark.yaml"))), *catalogue.files()]:
        benchmark = load_benchmark(file)
        tasks = benchmark.tasks.values()
        absent, all_files = missing(tasks), needed(tasks)
        found.append(
            {
                "name": benchmark.name,
                "tasks": list(benchmark.tasks),
                "orders": list(benchmark.orders),
                "format": sorted({task.file_format for task in tasks}),
                "scorers": list(dict.fromkeys([*benchmark.scorers, *(s for task in tasks for s in task.scorers)])),
                "data": "on disk" if not absent else f"{len(absent)} of {len(all_files)} files missing",
                "data_dir": str(benchmark.root),
                "missing": [str(path) for path in absent],
                "data_source": benchmark.data_source,
                "description": benchmark.description,
                "file": str(file),
            }
        )
    return found


def _scorers() -> list[dict[str, Any]]:
    from swift_cl.evaluation.scorers import module, names

    return [
        {
            "name": name,
            "direction": "higher is better" if scorer.HIGHER_IS_BETTER else "lower is better",
            "range": list(scorer.RANGE),
            "needs": getattr(scorer, "NEEDS", ""),
            "cell": getattr(scorer, "CELL", "mean of the answers' scores"),
            "options": _options(scorer),
            "title": (scorer.__doc__ or name).strip().splitlines()[0].partition(":")[0].rstrip("."),
        }
        for name, scorer in ((name, module(name)) for name in names())
    ]


def _options(scorer: ModuleType) -> list[str]:
    return list(scorer.Options.model_fields) if hasattr(scorer, "Options") else []


def _cell(value: Any) -> str:
    if not isinstance(value, list):
        return str(value)
    return f"{len(value)}: {value[0]} ... {value[-1]}" if len(value) > LONGEST_LIST else ", ".join(map(str, value))


def run(args: argparse.Namespace) -> int:
    """Print the list."""
    if args.markdown:
        from swift_cl.cli.methods_table import methods_table

        if args.kind != "methods":
            raise UserError(f"ls {args.kind}: --markdown prints the table of methods only")
        print(methods_table())
        return 0
    rows = {"methods": _methods, "tuners": _tuners, "benchmarks": _benchmarks, "scorers": _scorers}[args.kind]()
    if args.json:
        print(json.dumps(rows, ensure_ascii=False, indent=2))
        return 0
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    columns = [key for key in (rows[0] if rows else {}) if key not in JSON_ONLY]
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        # Names are what one copies from here, so they are never wrapped, however narrow the terminal.
        longest = max(len(str(row[column])) for row in rows) if column == "name" else None
        table.add_column(column, no_wrap=column == "name", min_width=longest, overflow="fold")
    for row in rows:
        table.add_row(*(_cell(row[column]) for column in columns))
    # A file or pipe has no width to fit into.
    Console(width=None if sys.stdout.isatty() else WIDTH_OF_A_FILE).print(table)
    return 0
