"""`python -m swift_cl.cli.serve RUN_DIR ...`: serve a base model and all its stages until interrupted.

What `evaluation/deploy.sh` and `swift-cl deploy --route RUN_DIR` run. Prints one line when the server is ready; Ctrl-C
or SIGTERM ends it.
"""

import argparse
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from swift_cl.cli.exits import guarded
from swift_cl.errors import UserError

if TYPE_CHECKING:
    from swift_cl.stages import Run


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m swift_cl.cli.serve", description=__doc__)
    parser.add_argument("run_dirs", metavar="RUN_DIR", nargs="+", help="run folders with the same base model")
    parser.add_argument(
        "--route",
        action="store_true",
        help="list one more model, auto: the adapter that the run's method chooses for a question answers it, and the "
        "response names that adapter (one run of a method that routes; pt only)",
    )
    parser.add_argument("--model", metavar="DIR", help="serve this copy of the base model instead of the run's")
    parser.add_argument("--infer_backend", metavar="NAME", default="pt", help="pt (default), vllm or lmdeploy")
    parser.add_argument("--server_python", metavar="PATH", default=sys.executable, help="interpreter that serves")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default 127.0.0.1)")
    parser.add_argument("--port", metavar="N", type=int, default=8000, help="port to listen on (default 8000)")
    parser.add_argument("--max_batch_size", metavar="N", type=int, default=16, help="answers at a time, pt only")
    parser.add_argument("--start_timeout", metavar="S", type=float, default=900.0, help="seconds it may take to start")
    parser.add_argument("--server_args", metavar="TEXT", default="", help="further flags of `swift deploy`, in quotes")
    return parser


def serve(args: argparse.Namespace) -> int:
    """Serve until a signal comes."""
    import shlex
    from dataclasses import replace

    from swift_cl.serving.adapters import Deployment, check_deployment, run_adapters, unique, weights_id
    from swift_cl.serving.backends import ServerOptions, check_name, command, is_offline
    from swift_cl.serving.routing import AUTO
    from swift_cl.serving.server import Server
    from swift_cl.stages import load_run

    if is_offline(args.infer_backend):
        raise UserError(f"--infer_backend {args.infer_backend} has no address; pass it to swift-cl eval")
    runs = [load_run(Path(folder).resolve()) for folder in args.run_dirs]
    full = [stage.dir for run in runs for stage in run.stages if stage.weights_sha256 is None]
    if full:
        raise UserError(
            f"{full[0]} holds a fully fine-tuned model, which needs a server of its own: swift-cl eval starts one a "
            "stage, or serve it with swift-cl deploy --model"
        )
    other = next((run for run in runs if weights_id(run.model) != weights_id(runs[0].model)), None)
    if other is not None:
        raise UserError(f"{other.dir} has the base model {other.model}, {runs[0].dir} has {runs[0].model}; serve one")
    route_run = _routed(args, runs) if args.route else None
    adapters = unique(adapter for run in runs for adapter in run_adapters(run.stages))
    deployment = Deployment(args.model or runs[0].model, runs[0].model_args, adapters)
    check_deployment(deployment)
    extra = tuple(shlex.split(args.server_args))
    options = ServerOptions(check_name(args.infer_backend), args.server_python, args.max_batch_size, extra)
    # Names follow the run's base model also when a copy of it is served, so that an evaluation finds them.
    named = replace(deployment, model=runs[0].model)
    names = [*named.names, *([] if route_run is None else [AUTO])]
    server = Server(
        lambda host, port: command(deployment, options, host, port, named.base_name, route_run),
        names,
        runs[0].dir / "logs" / "deploy.log",
        args.port,
        args.host,
        args.start_timeout,
        lambda line: print(line, file=sys.stderr, flush=True),
    )
    with server:
        print(f"ready: {server.base_url} serves {', '.join(names)}", flush=True)
        while True:
            time.sleep(1.0)
            server.check_alive("by itself")


def _routed(args: argparse.Namespace, runs: "list[Run]") -> Path:
    """The run that routes; refused where nothing can be chosen."""
    from swift_cl.serving.backends.pt import NAME

    if len(runs) > 1:
        raise UserError(f"--route serves one run, found {len(runs)}")
    if args.infer_backend != NAME or args.server_python != sys.executable:
        raise UserError(
            "--route chooses inside the server, which needs --infer_backend pt and this interpreter; swift-cl eval "
            "routes for every backend"
        )
    stage = runs[0].stages[-1]
    if stage.route is None:
        raise UserError(f"--route: {stage.dir} answers every question with its own adapter (method {stage.method!r})")
    if stage.route["task_id_given"]:
        names = ", ".join(entry["name"] for entry in stage.route["candidates"])
        raise UserError(
            f"--route: method {stage.method!r} as it was configured needs the task of every question; serve without "
            f"--route and ask the task's own adapter ({names})"
        )
    return runs[0].dir


def run(argv: list[str]) -> int:
    """`swift-cl deploy --route RUN_DIR`."""
    return serve(_parser().parse_args(argv))


def main() -> int:
    """Entry point."""
    args = _parser().parse_args()
    return guarded("deploy", lambda: serve(args))


if __name__ == "__main__":
    sys.exit(main())
