"""`swift-cl compare RUN_DIR ...`: methods side by side, over seeds and task orders."""

import argparse
import json
from pathlib import Path
from typing import Any


def add_parser(subparsers: Any) -> None:
    """Add the command."""
    parser = subparsers.add_parser(
        "compare",
        help="methods side by side: mean, spread and winners over seeds and orders",
        description="Group runs of one benchmark and base model by method, and print mean, standard deviation, 95 % "
        "bootstrap interval of the mean and number of runs for each metric. A winner is marked only where its interval "
        "overlaps no other's. Exit code 1 when a metric is missing in some run: it is null then, never a mean of the "
        "others.",
    )
    parser.add_argument("run_dirs", metavar="RUN_DIR", nargs="+", help="a run folder with a results.json")
    parser.add_argument("--scorer", metavar="NAME", help="only this scorer; default: all")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the comparison; 1 if a metric is missing in some run."""
    from swift_cl.evaluation.comparison import compare, read_run
    from swift_cl.report.comparison import comparison_text

    runs = [read_run(folder) for folder in dict.fromkeys(Path(d).resolve() for d in args.run_dirs)]
    found = compare(runs, args.scorer)
    if args.json:
        value = {
            "benchmark": runs[0].benchmark,
            "model": runs[0].model,
            "scorers": {entry.scorer: entry.as_json() for entry in found},
        }
        print(json.dumps(value, ensure_ascii=False, indent=2))
    else:
        print(f"{runs[0].benchmark}, {runs[0].model}\n")
        print("\n\n".join(comparison_text(entry) for entry in found))
    return 1 if any(entry.missing for entry in found) else 0
