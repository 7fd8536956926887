"""`swift-cl metrics FILE`: Avg.ACC, Forgetting, New.ACC, BWT, FWT, Last and Avg of a matrix."""

import argparse
import json
from pathlib import Path
from typing import Any


def add_parser(subparsers: Any) -> None:
    """Add the command."""
    parser = subparsers.add_parser(
        "metrics",
        help="metrics of a stage x task matrix",
        description="Metrics of a stage x task matrix. Exit code 1 when a metric needs a cell that was not measured: "
        "it is null then, never a number.",
    )
    parser.add_argument(
        "file",
        metavar="FILE",
        help="results.json (or the run folder that holds it); {order, base, matrix} in JSON; or a CSV whose header is "
        "the order and whose rows are the stages, a first row named 'base' being the base model",
    )
    parser.add_argument("--scorer", metavar="NAME", help="only this scorer of a results.json; default: all of them")
    parser.add_argument("--json", action="store_true", help="print the metrics as one JSON object")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the metrics; 1 if one of them needs a missing cell."""
    from swift_cl.errors import UserError, did_you_mean
    from swift_cl.evaluation.matrix_file import read_matrices
    from swift_cl.evaluation.metrics import compute
    from swift_cl.report.text import metrics_text

    found = read_matrices(Path(args.file))
    if args.scorer:
        names = [entry.scorer or "" for entry in found]
        found = [entry for entry in found if entry.scorer == args.scorer]
        if not found:
            hint = did_you_mean(args.scorer, names)
            raise UserError(f"{args.file}: no scorer {args.scorer!r}, found: {', '.join(names) or 'none'}{hint}")
    results = [(entry, compute(entry.matrix, entry.higher_is_better)) for entry in found]
    if args.json:
        # The first scorer's keys stand at the top, so that one matrix and one scorer read the same.
        value = results[0][1].as_json()
        if len(results) > 1:
            value["scorers"] = {str(entry.scorer): metrics.as_json() for entry, metrics in results}
        print(json.dumps(value, indent=2))
    else:
        print("\n".join(metrics_text(entry.scorer, metrics) for entry, metrics in results))
    return 1 if any(metrics.has_holes for _, metrics in results) else 0
