"""`swift-cl run`: the whole task sequence from one file."""

import argparse
from pathlib import Path
from typing import Any

MODES = ("train_only", "eval_only", "train_then_eval", "full_workflow")


def add_parser(subparsers: Any) -> None:
    """Register the command."""
    parser = subparsers.add_parser(
        "run",
        help="train all stages, serve them, ask, score and report, from one file",
        description="Train every task of an order with a method, evaluate all stages, and report. A run that was "
        "stopped continues where it stopped; what is finished is not done again.",
    )
    parser.add_argument("config", metavar="CONFIG", type=Path, help="run file (YAML)")
    parser.add_argument("--mode", choices=MODES, help="which parts to do (default: `mode` in the file, full_workflow)")
    parser.add_argument("--order", metavar="NAME", help="task order of the benchmark")
    parser.add_argument("--method", metavar="NAME", nargs="+", help="method, or several to run one after the other")
    parser.add_argument("--model", metavar="PATH", help="base model: folder or hub id")
    parser.add_argument("--output_dir", metavar="DIR", help="where the runs go, one folder a method")
    parser.add_argument("--set", metavar="KEY=VALUE", action="append", default=[], dest="assignments",
                        help="change a key of the file, e.g. train.learning_rate=1e-3; may be repeated")  # fmt: skip
    parser.add_argument("--preview", action="store_true", help="print every command and path, start nothing")
    parser.add_argument("--overwrite", action="store_true", help="delete what this run made before, and start anew")
    parser.add_argument("--verbose", action="store_true", help="show ms-swift's own log lines")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Plan, train, evaluate, report."""
    from swift_cl.cli.main import build_parser
    from swift_cl.workflow.config import load_config
    from swift_cl.workflow.plan import check_against_existing, make_plans, preview
    from swift_cl.workflow.run import check_rows, eval_argv, prepare, train

    config, benchmark = load_config(args.config, args.assignments)
    for key in ("mode", "order", "method", "model"):
        if getattr(args, key) is not None:
            setattr(config, key, getattr(args, key))
    if args.model is not None and Path(args.model).is_dir():
        config.model = str(Path(args.model).resolve())
    if args.output_dir is not None:
        config.output_dir = str(Path(args.output_dir).resolve())
    plans = make_plans(config, benchmark)
    # Parsed before the training: a wrong flag of the evaluation must not show after hours.
    evaluation = build_parser().parse_args(["eval", *eval_argv(config, plans)])
    if args.preview:
        check_rows(config, benchmark)
        print(preview(plans, eval_argv(config, plans) if config.mode != "train_only" else None))
        return 0
    if config.mode == "eval_only":
        for plan in plans:
            check_against_existing(plan)
    else:
        train(prepare(config, benchmark, args.overwrite), args.verbose)
    return 0 if config.mode == "train_only" else int(evaluation.run(evaluation))
