"""What `swift-cl deploy --route` refuses before anything starts."""

from dataclasses import replace
from pathlib import Path

import pytest

from swift_cl.cli.main import main
from swift_cl.stages import load_stage
from tests.eval.test_routes import make_routed


def refused(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    with pytest.raises(SystemExit) as stop:
        main(["deploy", "--route", *argv])
    assert stop.value.code == 2
    return capsys.readouterr().err


def test_a_run_that_answers_itself_is_refused(make_run, capsys):
    assert "answers every question with its own adapter (method 'seq')" in refused(capsys, str(make_run()))


def test_a_run_that_must_be_told_the_task_is_refused(make_run, capsys):
    run = make_routed(make_run(), task_id_given=True)
    assert "needs the task of every question; serve without --route" in refused(capsys, str(run))


def test_what_cannot_choose_is_refused(make_run, capsys):
    run = make_routed(make_run())
    assert "needs --infer_backend pt" in refused(capsys, str(run), "--infer_backend", "vllm")
    assert "--route serves one run, found 2" in refused(capsys, str(run), str(make_run("other")))


def test_candidates_of_no_stage_are_served_too(make_run: Path):
    """A method may choose among files that are no stage's own adapter."""
    from swift_cl.serving.adapters import run_adapters

    run = make_routed(make_run())
    stage = load_stage(run / "stage_2_new")
    extra = make_run("other", seed=5) / "stage_1_old" / "adapter"
    from swift_cl.io import sha256_file

    entry = {"name": "x", "tasks": ["new"], "dir": str(extra), "system": "s"}
    entry["sha256"] = sha256_file(extra / "adapter_model.safetensors")
    candidates = [*stage.route["candidates"], entry]
    replace(stage, route={**stage.route, "candidates": candidates}).save()
    stages = [load_stage(folder) for folder in sorted(run.glob("stage_*"))]
    found = run_adapters(stages)
    assert [adapter.sha256 for adapter in found] == [
        stages[0].weights_sha256,
        stages[1].weights_sha256,
        entry["sha256"],
    ]
    assert len({adapter.name for adapter in found}) == 3
