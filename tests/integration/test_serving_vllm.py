"""The same adapters under vLLM, eight of them on one server: its greedy answers are those of the pt backend, with HTTP
and without."""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from swift_cl.errors import RunFailure
from swift_cl.evaluation.grid import EvalOptions, evaluate
from swift_cl.evaluation.plan import GridOptions, load_grid
from swift_cl.evaluation.servers import ServerSettings
from swift_cl.serving.backends import ServerOptions
from tests.integration.serving_run import make_run, write_classes

PYTHON = os.environ.get("SWIFT_CL_VLLM_PYTHON")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.vllm,
    pytest.mark.skipif(not PYTHON, reason="SWIFT_CL_VLLM_PYTHON names no Python with vLLM"),
]
COMMON = EvalOptions(GridOptions(test_limit=2), scorers=("exact_match",), max_tokens=16)
EIGHT = 8


def options(backend: str) -> EvalOptions:
    extra = ("--vllm_max_model_len", "512")
    server = ServerSettings(ServerOptions(backend, python=PYTHON or "", extra=extra))
    return replace(COMMON, backend=backend, server=server)


def answers(runs: list[Path]) -> dict[tuple[str, ...], str]:
    """Every stored answer by run, model, task, sample and turn."""
    found = {}
    for path in sorted(file for run in runs for file in (run / "answers").rglob("*.jsonl")):
        for line in path.read_bytes().split(b"\n"):
            row = json.loads(line) if line else None
            if row is not None:
                found[path.parents[2].name, path.parent.name, path.stem, row["id"], str(row["turn"])] = row["answer"]
    return found


def copies(runs: list[Path], folder: Path) -> list[Path]:
    without = shutil.ignore_patterns("answers", "logs", "results.json", "identity.json")
    return [shutil.copytree(run, folder / run.name, ignore=without) for run in runs]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> list[Path]:
    """Two runs of four stages on one base model."""
    folder = tmp_path_factory.mktemp("vllm")
    return [make_run(folder / name, tiny_base, seed) for name, seed in (("one", 1), ("two", 11))]


@pytest.fixture(scope="module")
def served(runs: list[Path]) -> dict[tuple[str, ...], str]:
    """The answers of a vLLM server with eight adapters."""
    lines: list[str] = []
    found = evaluate(runs, options("vllm"), notify=lines.append)
    assert found.complete
    assert found.results[0]["backend"] == "vllm"
    assert sum("the server is ready" in line for line in lines) == 1
    adapters = {target.weights for run in runs for target in load_grid(run, COMMON.grid).stages if target}
    assert len(adapters) == EIGHT
    return answers(runs)


def equal_share(one: dict[tuple[str, ...], str], two: dict[tuple[str, ...], str]) -> float:
    assert one.keys() == two.keys()
    equal = sum(one[key] == two[key] for key in one)
    print(f"{equal} of {len(one)} answers are equal")
    return equal / len(one)


def test_vllm_answers_as_pt_does(runs: list[Path], served: dict[tuple[str, ...], str], tmp_path: Path) -> None:
    pt = copies(runs, tmp_path)
    assert evaluate(pt, COMMON, notify=print).complete
    assert equal_share(served, answers(pt)) >= 0.95


def test_constrained_answers_are_visible_labels(runs: list[Path], tmp_path: Path) -> None:
    """As under pt, where a label is made of its own tokens; here any tokens may spell it, so the two can differ."""
    asked = replace(options("vllm"), grid=GridOptions(write_classes(tmp_path)), decoding="constrained")
    (run,) = copies(runs[:1], tmp_path)
    assert evaluate([run], asked, notify=print).complete
    grid = load_grid(run, asked.grid)
    visible = {(t.row, task.name): grid.visible(t, task) for t in grid.targets for task in grid.tasks}
    said = answers([run])
    assert all(answer in visible[row, task] for (_, row, task, *_), answer in said.items())
    assert len(set(said.values())) > 1


def test_offline_answers_as_the_server_does(
    runs: list[Path], served: dict[tuple[str, ...], str], tmp_path: Path
) -> None:
    """No HTTP, the same store: what the server has answered is not asked again, and new answers are the same."""
    lines: list[str] = []
    assert evaluate(runs, options("vllm-offline"), notify=lines.append).complete
    assert lines == []  # all answers were found, no engine was started
    offline = copies(runs, tmp_path)
    found = evaluate(offline, replace(options("vllm-offline"), concurrency=64), notify=lines.append)
    assert found.complete
    assert found.results[0]["backend"] == "vllm-offline"
    assert "starting the server without HTTP" in lines[0]
    assert equal_share(served, answers(offline)) >= 0.95
    log = (offline[0] / "logs" / "server.log").read_text()
    assert "Uvicorn" not in log
    assert str(offline[0]) not in os.popen("ps -eo args").read().replace(log.splitlines()[0], "")


def test_an_engine_that_cannot_start_says_why(runs: list[Path], tmp_path: Path) -> None:
    run = copies(runs[:1], tmp_path)[0]
    wrong = options("vllm-offline")
    wrong = replace(
        wrong, server=replace(wrong.server, options=replace(wrong.server.options, extra=("--no_such", "1")))
    )
    with pytest.raises((RunFailure, ValueError), match=r"ended at start[\s\S]*answer_lines.py[\s\S]*no_such"):
        evaluate([run], wrong, notify=print)
