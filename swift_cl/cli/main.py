"""`swift-cl`: finds the command, and turns errors into one line and an exit code (2: wrong input, 1: failed work)."""

import argparse
import importlib
import os
import sys
from typing import NoReturn

from swift_cl import __version__
from swift_cl.cli.exits import guarded
from swift_cl.errors import UserError, did_you_mean

# Commands of our own: the module `swift_cl.cli.<name>` has add_parser(subparsers).
OWN = ("run", "eval", "report", "metrics", "compare", "probe", "ls", "resolve", "plain_lora", "doctor")
# ms-swift's commands; `sft` has flags of ours as well.
PASS_THROUGH = (
    "sft", "pt", "rlhf", "infer", "deploy", "export", "merge-lora", "rollout", "sample", "app", "web-ui",
)  # fmt: skip
EPILOG = "ms-swift's own commands, with our plug-ins loaded: " + ", ".join(PASS_THROUGH)


class _Parser(argparse.ArgumentParser):
    """Reports a wrong flag as every other wrong input: one line, exit code 2."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{self.prog.removeprefix('swift-cl').strip()}: {message}".removeprefix(": "))


def build_parser() -> argparse.ArgumentParser:
    """The parser of our own commands."""
    parser = _Parser(
        prog="swift-cl", description="Continual learning on top of ms-swift.", epilog=EPILOG, allow_abbrev=False
    )
    parser.add_argument("--version", action="version", version=f"swift-cl {__version__}")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND")
    for name in OWN:
        importlib.import_module(f"swift_cl.cli.{name}").add_parser(subparsers)
    subparsers.add_parser("sft", help=importlib.import_module("swift_cl.cli.sft").SUMMARY, add_help=False)
    return parser


def _dispatch(argv: list[str]) -> int:
    command = argv[0].replace("_", "-") if argv else ""
    if command == "sft":
        return int(importlib.import_module("swift_cl.cli.sft").run(argv[1:]))
    if command == "deploy" and "--route" in argv:
        return int(importlib.import_module("swift_cl.cli.serve").run(argv[1:]))
    if command in PASS_THROUGH:
        if argv[1:] in (["--help"], ["-h"]):
            print(f"usage: swift-cl {command} [flags of `swift {command}`]\n")
            print(f"ms-swift's own command, with our plug-ins loaded; `swift-cl {command} --help-all` lists its flags.")
            if command == "deploy":
                print("\nswift-cl deploy --route RUN_DIR serves a run, and as `auto` the adapter that the run's method")
                print("chooses for each question; `swift-cl deploy --route --help` lists the flags of that.")
            return 0
        ours = [argument for argument in argv[1:] if argument.startswith("--cl_")]
        if ours:
            raise UserError(f"{ours[0]} is a flag of `swift-cl sft`; `{command}` is ms-swift's own")
        from swift_cl.workflow.launch import launch

        return launch(command, ["--help" if argument == "--help-all" else argument for argument in argv[1:]])
    parser = build_parser()
    if not argv:
        parser.print_help()
        return 0
    known = [*next(a for a in parser._actions if isinstance(a, argparse._SubParsersAction)).choices, *PASS_THROUGH]
    if not argv[0].startswith("-") and argv[0] not in known:
        hint = did_you_mean(argv[0], known)
        raise UserError(f"command {argv[0]!r} is unknown, allowed: {', '.join(sorted(set(known)))}{hint}")
    args = parser.parse_args(argv)
    args.argv = argv
    return int(args.run(args))


def main(argv: list[str] | None = None) -> None:
    """Entry point of the `swift-cl` command."""
    arguments = sys.argv[1:] if argv is None else argv
    try:
        code = guarded("swift-cl", lambda: _dispatch(arguments))
        sys.stdout.flush()
    except BrokenPipeError:
        # The reader (`swift-cl ls methods | head -1`) has seen enough. Python would complain again at its own flush.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    sys.exit(code)


if __name__ == "__main__":
    main()
