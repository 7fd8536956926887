"""Scores and metrics in TensorBoard: one step a stage, read back from its files."""

import json
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from swift_cl.cli.main import build_parser, main
from swift_cl.errors import UserError
from swift_cl.evaluation import trackers
from swift_cl.evaluation.trackers import check_trackers, steps, track
from swift_cl.workflow.config import load_config
from swift_cl.workflow.plan import make_plans
from swift_cl.workflow.run import eval_argv
from tests.eval.helpers import names, right
from tests.eval.mock_endpoint import MockEndpoint
from tests.eval.report_runs import results, scored
from tests.support.commands import environment
from tests.support.two_tasks import make_folder, write_config


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """(step, value) of every tag in a folder of event files."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_steps() -> None:
    found = steps(results({"em": scored([[80, 30], [60, 90]], [10, None])}))
    assert found[0] == {"em/old": 10}
    assert found[1] == {"em/old": 80, "em/new": 30, "em/mean_so_far": 80}
    assert {k: v for k, v in found[2].items() if "metrics" not in k} == {
        "em/old": 60, "em/new": 90, "em/mean_so_far": 75
    }  # fmt: skip
    # Forgetting of the old task: 80 - 60; fwt needs the cell that is missing.
    assert (found[2]["em/metrics/avg_acc"], found[2]["em/metrics/forgetting"]) == (75, 20)
    assert "em/metrics/fwt" not in found[2]


def test_a_hole_is_no_point_and_no_part_of_a_mean() -> None:
    found = steps(results({"em": scored([[None, 30], [60, 90]], None)}))
    assert found[1] == {"em/new": 30}


def test_tensorboard_holds_the_matrix(tmp_path: Path) -> None:
    value = results({"em": scored([[80, 30], [60, 90]], [10, 20])})
    for _ in range(2):  # the second time replaces the first
        track(value, tmp_path, ["tensorboard"])
    found = scalars(tmp_path / "trackers" / "tensorboard")
    assert found["em/old"] == [(0, 10), (1, 80), (2, 60)]
    assert found["em/new"] == [(0, 20), (1, 30), (2, 90)]
    assert found["em/mean_so_far"] == [(1, 80), (2, 75)]
    assert found["em/metrics/avg_acc"] == [(2, 75)]


def test_the_command(make_run: Any) -> None:
    run = make_run()
    with MockEndpoint(names(run), right) as mock, pytest.raises(SystemExit) as stopped:
        main(["eval", str(run), "--base_url", mock.base_url, "--report_to", "tensorboard", "--no_report"])
    assert stopped.value.code == 0
    assert scalars(run / "trackers" / "tensorboard")["exact_match/new"] == [(0, 100), (1, 100), (2, 100)]
    assert not (run / "report.html").exists(), "--no_report"


def test_unknown_or_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"'tensorbord' is unknown, allowed: .*; did you mean 'tensorboard'\?"):
        check_trackers(["tensorbord"])
    monkeypatch.setattr(trackers, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="--report_to wandb: the package is not installed; pip install wandb"):
        check_trackers(["wandb"])


@pytest.mark.parametrize(
    ("train", "evaluation", "expected"),
    [
        ({"report_to": "tensorboard"}, {}, ["tensorboard"]),
        ({"report_to": ["tensorboard", "wandb"]}, {}, ["tensorboard", "wandb"]),
        ({"report_to": "tensorboard"}, {"report_to": ["swanlab"]}, ["swanlab"]),
        ({"report_to": "none"}, {}, []),
        ({}, {}, []),
    ],
)
def test_a_run_logs_where_its_training_does(
    tmp_path: Path, train: dict[str, Any], evaluation: dict[str, Any], expected: list[str]
) -> None:
    config, benchmark = load_config(write_config(make_folder(tmp_path), train=train, eval=evaluation), [])
    argv = eval_argv(config, make_plans(config, benchmark))
    assert build_parser().parse_args(["eval", *argv]).report_to == expected


@pytest.mark.parametrize(
    ("name", "mode", "suffix"), [("wandb", "WANDB_MODE", "wandb"), ("swanlab", "SWANLAB_MODE", "swanlab")]
)
def test_trackers_with_an_offline_mode(name: str, mode: str, suffix: str, tmp_path: Path) -> None:
    """The names and values of every step are in the file that `wandb sync` and `swanlab sync` send.

    A process of its own, for both leave threads behind.
    """
    pytest.importorskip(name, reason=f"{name} is not installed (pip install 'swift_cl[trackers]')")
    values = results({"em": scored([[80.125, 30.5], [60.25, 90.75]], [10.5, 20.5])})
    code = "import json, pathlib, sys; from swift_cl.evaluation.trackers import track; "
    code += "track(json.loads(sys.argv[1]), pathlib.Path(sys.argv[2]), [sys.argv[3]])"
    command = [sys.executable, "-c", code, json.dumps(values), str(tmp_path), name]
    done = subprocess.run(
        command, env={**environment(), f"{name.upper()}_MODE": "offline"}, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    (file,) = (tmp_path / "trackers" / name).rglob(f"*.{name}")
    content = file.read_bytes()
    for tag in ("em/old", "em/new", "em/mean_so_far", "em/metrics/avg_acc", "em/metrics/forgetting"):
        assert tag.encode() in content, tag
    for value in (80.125, 30.5, 60.25, 90.75, 10.5, 20.5, 75.5):
        assert str(value).encode() in content or struct.pack("<d", value) in content, value
