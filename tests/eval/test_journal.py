"""What asking took is written into the run, and the report shows it; results.json knows nothing of it."""

import json
import shlex
import sys

import pytest

from swift_cl.errors import RunFailure
from swift_cl.evaluation.journal import journal_path, read_journal
from swift_cl.report.files import write_reports
from swift_cl.report.runs import load_runs
from swift_cl.report.training import training_record
from tests.eval.helpers import TURNS, go, names, right
from tests.eval.mock_endpoint import Fault, MockEndpoint

ALL = 3 * TURNS


def test_a_line_each_time_that_questions_were_asked(make_run, monkeypatch):
    run = make_run()
    monkeypatch.setattr(sys, "argv", ["/usr/bin/swift-cl", "eval", "my run"])
    with MockEndpoint(names(run), right) as mock:
        first = go(run, mock)
        assert go(run, mock).results == first.results  # nothing is asked, nothing is noted
    (row,) = read_journal(run)
    assert row["asked"] == ALL
    assert row["failed"] == 0
    assert shlex.split(row["command"]) == ["swift-cl", "eval", "my run"]
    assert row["runs"] == [run.name]
    assert row["servers"] == []
    assert row["versions"]["ms-swift"]


def test_asking_that_broke_off_is_noted_too(make_run):
    run = make_run()

    def gone(body, before):
        return None if body["model"].startswith("base") else Fault(500, "gone")

    with MockEndpoint(names(run), right, gone) as mock:
        with pytest.raises(RunFailure, match="in a row failed"):
            go(run, mock, concurrency=1)
        mock.fault = lambda body, before: None
        go(run, mock)
    broken, rest = read_journal(run)
    assert broken["asked"] > TURNS  # those of the base, and some that failed
    assert broken["failed"] > 0
    assert rest["asked"] == ALL - TURNS


def test_half_a_line_of_a_crash_costs_no_other(make_run):
    run = make_run()
    with MockEndpoint(names(run), right) as mock:
        go(run, mock)
        journal_path(run).write_bytes(journal_path(run).read_bytes() + b'{"schema": 1, "as')
        go(run, mock, max_tokens=9)
    assert [row["asked"] for row in read_journal(run)] == [ALL, ALL]


def test_the_report_shows_time_tokens_and_commands(make_run):
    run = make_run()
    with MockEndpoint(names(run), right) as mock:
        found = go(run, mock)
    assert found.results[0]["answers"]["tokens"] == 3 * ALL  # the mock counts three tokens an answer
    row = json.loads(journal_path(run).read_text()) | {
        "seconds": 65.0, "command": "swift-cl eval r", "servers": [{"command": "python serve.py", "ready_seconds": 5}],
    }  # fmt: skip
    journal_path(run).write_text(json.dumps(row) + "\n" + json.dumps(row | {"asked": 2, "seconds": 5.0}) + "\n")
    record = training_record(load_runs([run])[0])
    assert ("Asking time", f"1 min 10 s for {ALL + 2} questions, server starts included") in record.cost
    assert ("Answer tokens", "54") in record.cost
    assert record.eval_commands == ["swift-cl eval r", "# server: python serve.py"]
    write_reports([run])
    for file in ("report.md", "report.html"):
        text = (run / file).read_text()
        assert "swift-cl eval r" in text
        assert "1 min 10 s for 20 questions" in text


def test_answers_without_a_count_have_no_total(make_run):
    run = make_run()
    with MockEndpoint(names(run), right) as mock:
        go(run, mock)
    store = run / "answers" / "base" / "old.jsonl"
    rows = [json.loads(line) for line in store.read_text().splitlines()]
    del rows[0]["tokens"]
    store.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with MockEndpoint(names(run), right) as mock:
        assert go(run, mock).results[0]["answers"]["tokens"] is None
        assert mock.requests == []


def test_the_version_of_an_endpoint_is_part_of_the_keys(make_run):
    run = make_run()
    with MockEndpoint(names(run), right, version="1.0") as mock:
        first = go(run, mock, backend="vllm")
        assert read_journal(run)[0]["backend"] == "vllm 1.0"
        assert go(run, mock, backend="vllm").results == first.results
        assert len(mock.requests) == ALL
        mock.version = "1.1"
        go(run, mock, backend="vllm")
        assert len(mock.requests) == 2 * ALL
    # The endpoint is gone, and nothing is missing.
    assert go(run, mock, backend="vllm").results == first.results
