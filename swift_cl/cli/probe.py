"""`swift-cl probe RUN_DIR`: what the features of every stage still tell about each task, and what its answers lose."""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from swift_cl.cli.eval_flags import add_question_flags

KINDS = ("linear", "cosine", "mean_dot", "mean_cosine")


def add_parser(subparsers: Any) -> None:
    """Add the command."""
    parser = subparsers.add_parser(
        "probe",
        help="probing performance: fresh classifiers on the frozen features of every stage",
        description="Freeze every stage, read the features of the training rows (last token of the prompt), train "
        "fresh classifiers on them, and test these on the test rows: an upper bound of what the stage still knows. The "
        "gap to the observed matrix (results.json) is forgetting outside the features. An analysis, not a method: it "
        "reads the training rows of earlier tasks again, with --probe_scope all those of later tasks too. Needs a "
        "benchmark whose scenario is a classification. Writes probing.json.",
    )
    parser.add_argument("run_dir", metavar="RUN_DIR", help="a run folder")
    add_question_flags(parser)
    group = parser.add_argument_group("probes")
    group.add_argument(
        "--probe_kinds",
        nargs="+",
        choices=KINDS,
        default=list(KINDS),
        metavar="KIND",
        help="linear (without bias), cosine, mean_dot and mean_cosine (class means, by inner product and by cosine)",
    )
    group.add_argument(
        "--probe_scope",
        choices=("seen", "all"),
        default="seen",
        help="train a stage's probes on the tasks that it has learned (default), or on all tasks",
    )
    for name, kind, default, text in (
        ("epochs", int, 20, "passes over the training rows"),
        ("lr", float, 1e-3, "learning rate (Adam)"),
        ("batch", int, 128, "rows of a step"),
        ("seed", int, 0, "seed of start values and order"),
    ):
        group.add_argument(f"--probe_{name}", metavar="X", type=kind, default=default, help=f"{text}; {default}")
    parser.add_argument("--json", action="store_true", help="print probing.json instead of the tables")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Probe and print; 1 where a stage is not trained yet."""
    import os

    from swift_cl.errors import UserError
    from swift_cl.evaluation.plan import GridOptions
    from swift_cl.models import NAMES
    from swift_cl.probing.matrix import probe_run
    from swift_cl.probing.probes import ProbeSettings
    from swift_cl.report.probing import probing_text
    from swift_cl.stages import load_run

    for name, value in (("epochs", args.probe_epochs), ("lr", args.probe_lr), ("batch", args.probe_batch)):
        if not value > 0:
            raise UserError(f"--probe_{name} is {value}, expected a number > 0")
    kind = load_run(Path(args.run_dir)).model_args.get("model_type")
    if kind in NAMES:
        raise UserError(f"{args.run_dir}: swift-cl probe reads no models of type {kind}")
    os.environ.setdefault("LOG_LEVEL", "ERROR")  # of ms-swift, which loads the model
    options = GridOptions(
        Path(args.benchmark) if args.benchmark else None,
        Path(args.data_dir) if args.data_dir else None,
        args.order,
        args.test_limit,
        args.model,
    )
    settings = ProbeSettings(args.probe_epochs, args.probe_lr, args.probe_batch, args.probe_seed)
    kinds = list(dict.fromkeys(args.probe_kinds))
    found = probe_run(
        Path(args.run_dir), options, kinds, args.probe_scope, settings, lambda line: print(line, file=sys.stderr)
    )
    print(json.dumps(found, ensure_ascii=False, indent=2) if args.json else probing_text(found))
    last = [values["matrix"][-1][0] for values in found["kinds"].values()]
    return 1 if None in last else 0
