"""`swift-cl run`: the whole task sequence from one file."""

import argparse
import json
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from swift_cl import distributed
from swift_cl.errors import RunFailure, UserError, did_you_mean

if TYPE_CHECKING:
    from swift_cl.stream.benchmark import Benchmark
    from swift_cl.workflow.config import RunConfig
    from swift_cl.workflow.plan import RunPlan
    from swift_cl.workflow.provenance import Call

MODES = ("train_only", "eval_only", "train_then_eval", "full_workflow")
CHANGES = ("order", "method", "model", "seed", "assignments")
"""Flags that change a run file; `--from` repeats a run unchanged."""


def add_parser(subparsers: Any) -> None:
    """Register the command."""
    parser = subparsers.add_parser(
        "run",
        help="train all stages, serve them, ask, score and report, from one file",
        description="Train every task of an order with a method, evaluate all stages, and report. A run that was "
        "stopped continues where it stopped; what is finished is not done again. Several methods, orders and seeds "
        "make a run folder each; over orders and seeds they are compared at the end.",
    )
    parser.add_argument("config", metavar="CONFIG", nargs="?", type=Path, help="run file (YAML)")
    parser.add_argument("--from", metavar="RUN_DIR", type=Path, dest="repeated",
                        help="repeat this run from what its folder holds, in place of CONFIG; refused when the data "
                        "has changed. --output_dir says where, default: beside the old one, with _again")  # fmt: skip
    parser.add_argument("--train_params", metavar="FILE", type=Path, help="EasyCL's training file (with --eval_params, "
                        "in place of CONFIG); run.yaml is made of both in its output_dir")  # fmt: skip
    parser.add_argument("--eval_params", metavar="FILE", type=Path, help="EasyCL's evaluation file")
    parser.add_argument("--benchmark_dir", metavar="DIR", type=Path, help="EasyCL's benchmark folder, whose order "
                        "--order names; default: the tasks of `dataset` in the training file")  # fmt: skip
    parser.add_argument("--mode", choices=MODES,
                        help="train_only, eval_only, train_then_eval (the table alone), or full_workflow (report and "
                        "plots as well; the default)")  # fmt: skip
    parser.add_argument("--order", metavar="NAME", nargs="+", help="task order of the benchmark, or several")
    parser.add_argument("--method", metavar="NAME", nargs="+", help="method, or several to run one after the other")
    parser.add_argument("--seed", metavar="N", nargs="+", type=int, help="seed, or several")
    parser.add_argument("--model", metavar="PATH", help="base model: folder or hub id")
    parser.add_argument("--output_dir", metavar="DIR", help="where the runs go, one folder a run")
    parser.add_argument("--set", metavar="KEY=VALUE", action="append", default=[], dest="assignments",
                        help="change a key of the file, e.g. train.learning_rate=1e-3; may be repeated")  # fmt: skip
    parser.add_argument("--preview", action="store_true", help="print every command and path, start nothing")
    parser.add_argument("--overwrite", action="store_true", help="delete what this run made before, and start anew")
    parser.add_argument("--verbose", action="store_true", help="show ms-swift's own log lines")
    parser.add_argument("--schema", choices=("run", "benchmark"), nargs="?", const="run",
                        help="print the JSON schema of a run file (default) or a benchmark file, and stop")  # fmt: skip
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Plan, train, evaluate, report."""
    if args.schema is not None:
        from swift_cl.workflow.schema import schema

        print(json.dumps(schema(args.schema), ensure_ascii=False, indent=2))
        return 0
    from swift_cl.cli.eval_flags import scorer_options
    from swift_cl.cli.main import build_parser
    from swift_cl.workflow.plan import make_plans
    from swift_cl.workflow.preview import preview
    from swift_cl.workflow.provenance import noted
    from swift_cl.workflow.run import check_evaluation, check_rows, check_train_flags, eval_argv, prepare, train

    config, benchmark = configuration(args)
    plans = make_plans(config, benchmark)
    # Parsed before the training: a wrong flag of the evaluation must not show after hours.
    parser = build_parser()
    check_eval_keys(config.eval, parser)
    evaluation = parser.parse_args(["eval", *eval_argv(config, plans)])
    check_evaluation(
        config, benchmark, evaluation.scorer, scorer_options(evaluation.scorer_option), evaluation.decoding
    )
    if args.preview:
        check_train_flags(plans)
        counts = check_rows(config, benchmark)
        print(preview(plans, eval_argv(config, plans) if config.mode != "train_only" else None, counts))
        return 0
    node, nodes = distributed.node()
    if config.mode != "eval_only" and node == 0:
        plans = prepare(config, benchmark, args.overwrite)
    again = "to continue: " + continuing_command(args.argv)
    try:
        if node != 0:
            # The training processes here read what node 0 has written: they meet its own before they begin.
            if config.mode != "eval_only":
                train(plans, args.verbose, anew=args.overwrite)
            print(f"node {node} of {nodes}: done; what follows is node 0's")
            return 0
        with noted([Path(plan.run_dir) for plan in plans], config.mode) as call:
            code = work(config, plans, args.verbose, evaluation, call)
    except RunFailure as failure:
        raise RunFailure(f"{failure}\n{again}") from failure
    except KeyboardInterrupt:
        print(again, file=sys.stderr)
        raise
    if code != 0:
        print(again, file=sys.stderr)
    elif len(config.orders) * len(config.seeds) > 1 and config.mode in ("eval_only", "full_workflow"):
        comparison = parser.parse_args(["compare", *(plan.run_dir for plan in plans)])
        print()
        code = int(comparison.run(comparison))
    return code


def work(
    config: "RunConfig", plans: "list[RunPlan]", verbose: bool, evaluation: argparse.Namespace, call: "Call"
) -> int:
    """What the mode asks for; the exit code."""
    from swift_cl.workflow.plan import check_against_existing
    from swift_cl.workflow.run import train

    if config.mode == "eval_only":
        for plan in plans:
            check_against_existing(plan)
    else:
        with call.part("training"):
            train(plans, verbose)
    if config.mode == "train_only":
        return 0
    evaluation.no_report = evaluation.no_report or config.mode == "train_then_eval"
    with call.part("evaluation"):
        code = int(evaluation.run(evaluation))
    call.complete = code == 0
    return code


def configuration(args: argparse.Namespace) -> "tuple[RunConfig, Benchmark]":
    """The run file, or the configuration of the run that is repeated, with the changes of the command line."""
    from swift_cl.workflow.config import load_config
    from swift_cl.workflow.easycl_call import convert, load_call
    from swift_cl.workflow.repeat import repeated

    easycl = [args.train_params, args.eval_params]
    sources = (args.config, args.repeated, next(filter(None, easycl), None))
    if sum(source is not None for source in sources) != 1:
        raise UserError("run: needs CONFIG (a run file), --from RUN_DIR, or --train_params and --eval_params")
    if any(easycl) != all(easycl) or (args.benchmark_dir is not None and not all(easycl)):
        raise UserError(
            "run: --train_params, --eval_params (and --benchmark_dir) go together: EasyCL's call has them all"
        )
    if args.repeated is not None:
        given = [flag for flag in CHANGES if getattr(args, flag)]
        if given:
            flag = given[0].replace("assignments", "set")
            raise UserError(f"run: --from repeats a run as it was, so --{flag} does not go with it")
        config, benchmark = repeated(args.repeated, lambda line: print(f"note: {line}", file=sys.stderr))
    elif args.train_params is not None:
        call = convert(args.train_params, args.eval_params, args.benchmark_dir)
        for line in call.notes:
            print(f"note: {line}", file=sys.stderr)
        config, benchmark = load_call(call, lambda path: load_config(path, args.assignments), args.preview)
    else:
        config, benchmark = load_config(args.config, args.assignments)
    for key in ("mode", "order", "method", "model", "seed"):
        value = getattr(args, key)
        if value is not None:
            setattr(config, key, value[0] if isinstance(value, list) and len(value) == 1 else value)
    if args.model is not None and Path(args.model).is_dir():
        config.model = str(Path(args.model).resolve())
    if args.output_dir is not None:
        config.output_dir = str(Path(args.output_dir).resolve())
    return config, benchmark


def check_eval_keys(values: dict[str, Any], parser: argparse.ArgumentParser) -> None:
    """Refuse a key below `eval:` that is no flag of `swift-cl eval`."""
    commands = next(action for action in parser._actions if isinstance(action, argparse._SubParsersAction)).choices
    flags = [name for name in commands["eval"]._option_string_actions if name.startswith("--") and name != "--help"]
    known = [name.removeprefix("--") for name in flags]
    for key in values:
        if key not in known:
            raise UserError(f"eval.{key} is no flag of `swift-cl eval`, allowed: {', '.join(known)}"
                            f"{did_you_mean(key, known)}")  # fmt: skip


def continuing_command(argv: list[str]) -> str:
    """The command that takes up a call where it stopped: the same without `--overwrite`, which would begin anew."""
    return shlex.join(["swift-cl", *(argument for argument in argv if argument != "--overwrite")])
