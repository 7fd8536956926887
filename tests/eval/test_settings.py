"""Only what was asked under the settings of today counts; and how many answers may be missing."""

import json
import time

import pytest

from swift_cl.cli.main import main
from swift_cl.errors import RunFailure, UserError
from swift_cl.evaluation.budget import ErrorBudget, parse_budget
from swift_cl.evaluation.client import Endpoint, Generation, RetryPolicy
from swift_cl.evaluation.faults import retry_after
from swift_cl.evaluation.settings import Settings, load_settings
from tests.eval.helpers import TURNS, go, names, right, scorer
from tests.eval.mock_endpoint import Fault, MockEndpoint

MESSAGES = [{"role": "user", "content": "q"}]


@pytest.mark.parametrize(
    "change",
    [
        {"base": "other"},
        {"weights": "other"},
        {"messages": [{"role": "user", "content": "q "}]},
        {"messages": [{"role": "system", "content": ""}, *MESSAGES]},
        {"settings": Settings(Generation(max_tokens=513), "vllm 1")},
        {"settings": Settings(Generation(temperature=0.1), "vllm 1")},
        {"settings": Settings(Generation(extra={"repetition_penalty": 1.1}), "vllm 1")},
        {"settings": Settings(Generation(), "vllm 2")},
    ],
)
def test_everything_that_shapes_an_answer_is_in_its_key(change):
    asked = {"settings": Settings(Generation(), "vllm 1"), "base": "b", "weights": "w", "messages": MESSAGES}

    def key(settings, base, weights, messages):
        return settings.key(base, weights, messages)

    assert key(**asked) == key(**asked)
    assert key(**{**asked, **change}) != key(**asked)


def test_settings_are_kept_beside_the_answers(tmp_path):
    settings = Settings(Generation(7, 0.5, {"top_p": 0.9}), "vllm 1", "reference", "task")
    settings.save(tmp_path, "base")
    assert load_settings(tmp_path) == (settings, "base")
    assert load_settings(tmp_path / "never asked") is None


def test_answers_under_other_settings_do_not_count(make_run):
    """A second evaluation with other settings breaks off: what the first one left is not mixed into its table."""
    run = make_run()
    with MockEndpoint(names(run), right) as mock:
        first = go(run, mock)
        mock.fault = lambda body, before: None if body["model"].startswith("base") else Fault(500, "gone")
        with pytest.raises(RunFailure, match="questions in a row failed"):
            go(run, mock, max_tokens=9, concurrency=1)
        found = json.loads((run / "results.json").read_text())
        assert found["scorers"]["exact_match"]["base"] == [100, 100]
        assert found["scorers"]["exact_match"]["matrix"] == [[None, None], [None, None]]
        assert any("asked with other settings" in line for line in found["problems"])
        # Back to the first settings: everything is there, nothing is asked.
        before = len(mock.requests)
        assert go(run, mock).results == first.results
        assert len(mock.requests) == before


def test_teacher_forced_history(make_run):
    run = make_run()
    with MockEndpoint(names(run), lambda model, messages: f"own {messages[-1]['content']}") as mock:
        go(run, mock, history="reference")
        second = [body for body in mock.requests if body["messages"][-1]["content"] == "q1b"]
        assert len(second) == 3
        assert all(body["messages"][2] == {"role": "assistant", "content": "a1"} for body in second)
        before = len(mock.requests)
        go(run, mock)  # the first turns have no history, so only the second ones are asked again
        assert len(mock.requests) - before == 3
        go(run, mock, history="reference")
        assert len(mock.requests) - before == 3


def test_with_teacher_forced_history_a_later_turn_survives_a_failed_one(make_run):
    run = make_run()

    def fail_q1(body, before):
        return Fault(400, "too long") if body["messages"][-1]["content"] == "q1" else None

    with MockEndpoint(names(run), right, fail_q1) as mock:
        found = go(run, mock, history="reference")
    assert scorer(found)["n"] == [[3, 2], [3, 2]]
    assert scorer(found)["base"] == [None, 100]


@pytest.mark.parametrize(
    ("text", "budget", "allowed", "not_allowed"),
    [
        ("true", ErrorBudget(0), 0, 1),
        ("False", ErrorBudget(None), 200, None),
        ("3", ErrorBudget(3), 3, 4),
        ("0", ErrorBudget(0), 0, 1),
        ("1", ErrorBudget(1), 1, 2),
        ("0.01", ErrorBudget(None, 0.01), 2, 3),
    ],
)
def test_budget(text, budget, allowed, not_allowed):
    assert parse_budget(text) == budget
    assert budget.allows(allowed, 200)
    assert not_allowed is None or not budget.allows(not_allowed, 200)


@pytest.mark.parametrize("text", ["maybe", "-1", "1.5", "nan", "1.0", ""])
def test_wrong_budget(text):
    with pytest.raises(UserError, match=r"--fail_on_error .*expected true, false, a number"):
        parse_budget(text)


@pytest.mark.parametrize(("budget", "code"), [("true", 1), ("1", 1), ("2", 0), ("0.1", 1), ("0.2", 0), ("false", 0)])
def test_exit_code_follows_the_budget_and_the_cell_stays_null(make_run, budget, code, capsys):
    """Two of 18 turns have no answer: the failed one and the turn after it."""
    run = make_run()

    def fail_one(body, before):
        last = body["messages"][-1]["content"]
        return Fault(400, "too long") if last == "q1" and body["model"].startswith("stage_1") else None

    with MockEndpoint(names(run), right, fail_one) as mock, pytest.raises(SystemExit) as done:
        main(["eval", str(run), "--base_url", mock.base_url, "--fail_on_error", budget])
    assert done.value.code == code
    out = capsys.readouterr().out
    assert "2 of 4 answers missing" in out
    assert json.loads((run / "results.json").read_text())["scorers"]["exact_match"]["matrix"][0][0] is None


def test_an_untrained_stage_is_beyond_every_budget(make_run):
    run = make_run(stages=1)
    with MockEndpoint(names(run), right) as mock, pytest.raises(SystemExit) as done:
        main(["eval", str(run), "--base_url", mock.base_url, "--fail_on_error", "false"])
    assert done.value.code == 1


def test_retry_after_is_waited_for(make_run):
    """Longer than the longest wait of our own."""
    fault = Fault(429, "slow down", headers={"Retry-After": "0.4"})
    retry = RetryPolicy(attempts=2, longest_wait=0.01, timeout=5)
    with MockEndpoint(["m"], fault=lambda body, before: fault if before == 0 else None) as mock:
        endpoint = Endpoint(mock.base_url, retry)
        assert endpoint.ask("m", MESSAGES, Generation()).text
        assert mock.times[1] - mock.times[0] >= 0.4


@pytest.mark.parametrize(
    ("header", "low", "high"),
    [("3", 3, 3), ("2.5", 2.5, 2.5), ("100000", 120, 120), ("-1", 0, 0), ("nan", 0, 0), ("soon", 0, 0), ("", 0, 0)],
)
def test_retry_after_header(header, low, high):
    assert low <= retry_after(failure(header)) <= high


def test_retry_after_as_a_date():
    from email.utils import formatdate

    assert 50 < retry_after(failure(formatdate(time.time() + 60, usegmt=True))) <= 60
    assert retry_after(failure(formatdate(time.time() - 60, usegmt=True))) == 0


def failure(header):
    """An error whose cause is a response with that header."""
    import httpx

    error = RuntimeError()
    error.__cause__ = RuntimeError()
    error.__cause__.response = httpx.Response(429, headers={"retry-after": header})
    return error


def test_turns_of_the_helpers_are_what_the_budget_test_says():
    assert 3 * TURNS == 18
