"""`swift-cl report RUN_DIR ...`: rebuild the report from what is on disk."""

import argparse
from pathlib import Path
from typing import Any


def add_parser(subparsers: Any) -> None:
    """Add the command."""
    parser = subparsers.add_parser(
        "report",
        help="rebuild Markdown, HTML and plots from results.json",
        description="Rebuild report.md, report.html (one file that works offline), matrix.png, and a CSV and a PNG of "
        "the matrix for each scorer from results.json and what else of the run is on disk, and print the table. With "
        "several runs, a comparison of all of them as well.",
    )
    parser.add_argument("run_dirs", metavar="RUN_DIR", nargs="+", help="a run folder with a results.json")
    parser.add_argument(
        "--output", metavar="DIR", help="folder of the comparison of several runs; default: their common parent"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Write the reports; 1 if a cell is null."""
    from swift_cl.report.comparison import aggregate, comparison_text
    from swift_cl.report.files import write_reports
    from swift_cl.report.runs import load_runs
    from swift_cl.report.text import render_text

    results, folder = write_reports([Path(d) for d in args.run_dirs], Path(args.output) if args.output else None)
    print(render_text(results))
    over = aggregate(load_runs([Path(d) for d in args.run_dirs]))
    for entry in over.comparisons:
        print(f"\nover seeds and orders: {comparison_text(entry)}")
    if over.refused:
        print(f"\nnot averaged over runs: {over.refused}")
    print(f"\nreport: {folder / 'report.md'}, {folder / 'report.html'}, {folder / 'matrix.png'}")
    return 1 if any(entry.get("problems") for entry in results) else 0
