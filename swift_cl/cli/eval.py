"""`swift-cl eval RUN_DIR ...`: serve once, fill the stage x task grid, score it, write the report.

Its two halves are `evaluation/test_ans.py` (ask a running endpoint) and `evaluation/sim.py` (score what is stored).
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from swift_cl.cli.eval_flags import (
    add_asking_flags,
    add_budget_flag,
    add_question_flags,
    add_scoring_flags,
    add_server_flags,
    options_from,
)
from swift_cl.cli.exits import guarded

if TYPE_CHECKING:
    from swift_cl.evaluation.grid import Evaluation


def add_parser(subparsers: Any) -> None:
    """Add the command."""
    parser = subparsers.add_parser(
        "eval",
        help="serve once, fill the stage x task grid, score it",
        description="Ask the base model and every stage all test questions of all tasks, with one server that holds "
        "all adapters; score the answers; write results.json, report.md, report.html and matrix.png. Answers "
        "are stored as they arrive; a second call asks only what is missing, failed or changed. Exit code 1 when "
        "answers are missing (see --fail_on_error) or a stage is not trained.",
    )
    parser.add_argument("run_dirs", metavar="RUN_DIR", nargs="+", help="a run folder; several share one server")
    add_question_flags(parser)
    add_scoring_flags(parser)
    add_asking_flags(parser)
    add_server_flags(parser)
    add_budget_flag(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Ask and score; 1 if more answers are missing than allowed."""
    from swift_cl.evaluation.budget import parse_budget
    from swift_cl.evaluation.grid import evaluate
    from swift_cl.evaluation.trackers import check_trackers

    budget = parse_budget(args.fail_on_error)
    check_trackers(args.report_to)
    evaluation = evaluate([Path(d) for d in args.run_dirs], options_from(args), _notify)
    log_results(args, evaluation)
    show(args)
    return 0 if evaluation.passes(budget) else 1


def log_results(args: argparse.Namespace, evaluation: "Evaluation") -> None:
    """Hand each run's results to the trackers."""
    from swift_cl.evaluation.trackers import track

    folders = dict.fromkeys(Path(d).resolve() for d in args.run_dirs)  # as `load_grids` reads them: each once
    for folder, results in zip(folders, evaluation.results, strict=True):
        track(results, folder, args.report_to)


def main_ask(argv: list[str] | None = None) -> int:
    """`evaluation/test_ans.py`: only ask. The default endpoint is that of `evaluation/deploy.sh`."""
    parser = argparse.ArgumentParser(
        prog="test_ans.py",
        description="Ask a running endpoint every test question, and store the answers by sample id.",
    )
    add_run_dirs(parser)
    add_question_flags(parser)
    add_asking_flags(parser)
    parser.add_argument("--infer_backend", metavar="NAME", help="what serves there, for the record: pt, vllm, ...")
    add_budget_flag(parser)
    parser.set_defaults(base_url="http://127.0.0.1:8000/v1")
    return run_script(run_ask, parser, argv)


def main_score(argv: list[str] | None = None) -> int:
    """`evaluation/sim.py`: only score."""
    parser = argparse.ArgumentParser(
        prog="sim.py", description="Score stored answers; print the table and the metrics."
    )
    add_run_dirs(parser)
    add_question_flags(parser)
    add_scoring_flags(parser)
    parser.add_argument(
        "--infer_backend", metavar="NAME", help="what served the answers, for the record: pt, vllm, ..."
    )
    add_budget_flag(parser)
    return run_script(run_score, parser, argv)


def add_run_dirs(parser: argparse.ArgumentParser) -> None:
    """The runs, as `--run_dir DIR ...` or as plain arguments."""
    parser.add_argument("run_dirs", metavar="RUN_DIR", nargs="*", help="run folders")
    parser.add_argument("--run_dir", metavar="DIR", nargs="+", default=[], help="the same, as a flag")


def run_script(
    command: Callable[[argparse.Namespace], int], parser: argparse.ArgumentParser, argv: list[str] | None
) -> int:
    """Parse and run a script's command."""
    args = parser.parse_args(argv)
    args.run_dirs = [*args.run_dirs, *args.run_dir]
    if not args.run_dirs:
        parser.error("no run folder; pass --run_dir DIR")
    return guarded(parser.prog, lambda: command(args))


def run_ask(args: argparse.Namespace) -> int:
    """Only ask (`evaluation/test_ans.py`); 1 if more answers are missing than allowed."""
    from swift_cl.evaluation.budget import parse_budget
    from swift_cl.evaluation.grid import ask, count_answers, load_grids, missing_answers

    options, budget = options_from(args), parse_budget(args.fail_on_error)
    grids = load_grids([Path(d) for d in args.run_dirs], options.grid)
    ask(grids, options, _notify)
    problems = missing_answers(grids)
    for line in problems:
        _notify(line)
    if not problems:
        print(f"all questions are answered: {', '.join(str(grid.run.dir / 'answers') for grid in grids)}")
    untrained = any(stage is None for grid in grids for stage in grid.stages)
    return 1 if untrained or not budget.allows(*count_answers(grids)) else 0


def run_score(args: argparse.Namespace) -> int:
    """Only score what is stored (`evaluation/sim.py`); 1 if more answers are missing than allowed."""
    from swift_cl.evaluation.budget import parse_budget
    from swift_cl.evaluation.grid import prepare, score
    from swift_cl.evaluation.trackers import check_trackers

    options, budget = options_from(args), parse_budget(args.fail_on_error)
    check_trackers(args.report_to)
    grids, scorers = prepare([Path(d) for d in args.run_dirs], options)
    evaluation = score(grids, scorers, options)
    log_results(args, evaluation)
    show(args)
    return 0 if evaluation.passes(budget) else 1


def show(args: argparse.Namespace) -> None:
    """Write the reports of the runs, unless they are not wanted, and print the table."""
    from swift_cl.cli import report
    from swift_cl.report.runs import load_results
    from swift_cl.report.text import render_text

    if args.no_report:
        print(render_text([load_results(Path(folder)) for folder in args.run_dirs]))
    else:
        report.run(args)


def _notify(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
