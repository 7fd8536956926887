"""Between the command and the training process: flags and environment go in, exit code and error message come out."""

import importlib
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from swift_cl.errors import RunFailure, UserError
from swift_cl.workflow import worker
from swift_cl.workflow.launch import launch
from swift_cl.workflow.worker import COMMAND, ERROR_FILE, report_error

Fake = Callable[..., list[Any]]


@pytest.fixture
def cli_main(monkeypatch: pytest.MonkeyPatch) -> Fake:
    """cli_main(work): stands for ms-swift's launcher; `work` runs in place of the worker process."""
    launcher = importlib.import_module("swift.cli.main")

    def install(work: Callable[[], None] = lambda: None) -> list[Any]:
        calls: list[Any] = []

        def fake(route_mapping: dict[str, str]) -> None:
            calls.append((list(sys.argv), route_mapping, os.environ[COMMAND], os.environ[ERROR_FILE]))
            work()

        monkeypatch.setattr(launcher, "cli_main", fake)
        return calls

    return install


@pytest.mark.parametrize(
    ("command", "route"), [("sft", "sft"), ("chain", "sft"), ("infer", "infer"), ("merge-lora", "merge-lora")]
)
def test_route_and_command(cli_main: Fake, command: str, route: str) -> None:
    """The chain goes by the name of sft, so that NPROC_PER_NODE starts torchrun for it."""
    calls = cli_main()
    before = list(sys.argv)
    assert launch(command, ["--a", "1"]) == 0
    argv, mapping, named, error_file = calls[0]
    assert argv == ["swift-cl", route, "--a", "1"]
    assert mapping == {route: "swift_cl.workflow.worker"}
    assert named == command
    assert sys.argv == before
    assert COMMAND not in os.environ
    assert ERROR_FILE not in os.environ
    assert not Path(error_file).exists()


@pytest.mark.parametrize(("error", "code"), [(UserError("row 3 is wrong"), 2), (RunFailure("died"), 1)])
def test_error_of_the_worker_comes_back(cli_main: Fake, error: Exception, code: int) -> None:
    def work() -> None:
        report_error(error, code)
        sys.exit(1)  # torchrun passes on no exit code but 1

    cli_main(work)
    with pytest.raises(type(error), match=str(error)):
        launch("sft", [])
    assert COMMAND not in os.environ


def test_exit_code_of_a_worker_that_reports_nothing(cli_main: Fake) -> None:
    cli_main(lambda: sys.exit(-9))
    assert launch("sft", []) == -9


def test_every_rank_may_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file holds one whole report, the first one: the others fail because one did."""
    path = tmp_path / "error.json"
    monkeypatch.setenv(ERROR_FILE, str(path))
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    report_error(RunFailure("新闻"), 1)
    monkeypatch.setenv("RANK", "0")
    report_error(RuntimeError("Connection closed by peer"), 1)
    assert json.loads(path.read_text(encoding="utf-8")) == {"code": 1, "message": "rank 1 of 2: 新闻"}
    assert list(tmp_path.iterdir()) == [path]


def test_an_unforeseen_error_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "error.json"
    monkeypatch.setenv(ERROR_FILE, str(path))
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    report_error(ValueError("first\nsecond"), 1)
    assert json.loads(path.read_text())["message"] == "ValueError: first; the traceback is above"


def test_a_rank_that_was_killed_is_told_by_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "error.json"
    monkeypatch.setenv(ERROR_FILE, str(path))
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    report_error(
        RuntimeError("[/gloo/tcp/pair.cc:537] Read error [127.0.0.1]:39818: Connection reset by peer. Ask!"), 1
    )
    assert json.loads(path.read_text())["message"].startswith(
        "rank 0 of 2: lost the connection to another rank, which "
    )


def test_worker_without_a_parent_says_it_itself(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv(ERROR_FILE, raising=False)
    report_error(UserError("wrong"), 2)
    assert capsys.readouterr().err == "swift-cl: error: wrong\n"


def test_worker_runs_ms_swifts_command(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []
    monkeypatch.setenv(COMMAND, "export")
    monkeypatch.setattr(worker.runpy, "run_module", lambda name, **kwargs: ran.append(name))
    worker._run()
    assert ran == ["swift.cli.export"]
