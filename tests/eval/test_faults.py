"""An endpoint that fails: asked again where sensible, else recorded as failed and null, never 0."""

import json

import pytest

from swift_cl.errors import RunFailure, UserError
from swift_cl.evaluation.grid import EvalOptions, evaluate
from tests.eval.helpers import FAST, TURNS, go, names, right, scorer
from tests.eval.mock_endpoint import Fault, MockEndpoint


@pytest.mark.parametrize(
    "fault",
    [
        Fault(429, "slow down", headers={"Retry-After": "0"}),
        Fault(500, "oops"),
        Fault(503, "busy"),
        Fault(408, "late"),
        Fault(drop=True),
        Fault(hang=0.8),
        Fault(raw="not json"),
        Fault(raw='{"choices": []}'),
    ],
)
def test_a_passing_fault_is_asked_again(make_run, fault):
    run = make_run()
    with MockEndpoint(names(run), right, lambda body, before: fault if before == 0 else None) as mock:
        found = go(run, mock, concurrency=8)
    assert found.complete
    assert scorer(found)["base"] == [100, 100]


@pytest.mark.parametrize(
    ("fault", "tries", "says"),
    [
        (Fault(400, "the prompt is too long"), 1, "HTTP 400: "),
        (Fault(422, "bad field"), 1, "HTTP 422"),
        (Fault(500, "oops"), 3, "HTTP 500"),
        (Fault(429, "slow down"), 3, "HTTP 429"),
        (Fault(drop=True), 3, "APIConnectionError"),
        (Fault(hang=0.8), 3, "APITimeoutError"),
    ],
)
def test_a_lasting_fault_of_one_question_is_recorded_and_the_cell_is_null(make_run, fault, tries, says):
    run = make_run()

    def on_q1(body, before):
        return fault if body["messages"][-1]["content"] == "q1" and body["model"].startswith("stage_1") else None

    with MockEndpoint(names(run), right, on_q1) as mock:
        found = go(run, mock)
        asked = [b for b in mock.requests if b["messages"][-1]["content"] == "q1" and b["model"].startswith("stage_1")]
        assert len(asked) == tries
        assert scorer(found)["matrix"] == [[None, 100], [100, 100]]
        assert scorer(found)["n"] == [[2, 2], [4, 2]]  # the later turn of the dialogue is lost with it
        assert scorer(found)["metrics"]["avg_acc"] == 100
        assert scorer(found)["metrics"]["new_acc"] is None
        assert not found.complete
        rows = [json.loads(line) for line in (run / "answers/stage_1_old/old.jsonl").read_text().splitlines()]
        failed = {(row["id"], row["turn"]): row["error"] for row in rows if "error" in row}
        assert says in failed["o1", 0]
        assert failed["o1", 1] == "not asked, because turn 0 of the dialogue failed"
        # The next run asks the failed ones only.
        mock.fault = lambda body, before: None
        before = len(mock.requests)
        assert go(run, mock).complete
        assert len(mock.requests) - before == 2


def test_a_dead_endpoint_stops_the_run_and_what_was_answered_is_kept(make_run):
    run = make_run()

    def gone_after_base(body, before):
        return None if body["model"].startswith("base") else Fault(500, "gone")

    with (
        MockEndpoint(names(run), right, gone_after_base) as mock,
        pytest.raises(RunFailure, match=r"8 questions in a row failed.*run again to continue"),
    ):
        go(run, mock, concurrency=1)
    results = json.loads((run / "results.json").read_text())
    assert results["scorers"]["exact_match"]["base"] == [100, 100]
    assert results["scorers"]["exact_match"]["matrix"] == [[None, None], [None, None]]
    assert results["scorers"]["exact_match"]["metrics"]["avg_acc"] is None
    with MockEndpoint(names(run), right) as mock:
        assert go(run, mock).complete
        assert len(mock.requests) == 2 * TURNS


def test_unknown_model_stops_the_run_at_once(make_run):
    run = make_run()
    listed = names(run)
    text = "`stage` is not in the model_list: `[]`."
    with (
        MockEndpoint(listed, right, lambda body, before: Fault(400, text)) as mock,
        pytest.raises(RunFailure, match="does not serve"),
    ):
        go(run, mock, concurrency=1)
    assert len(mock.requests) == 1


def test_a_refused_key_stops_the_run(make_run):
    run = make_run()
    with (
        MockEndpoint(names(run), right, lambda body, before: Fault(401, "who are you")) as mock,
        pytest.raises(RunFailure, match="refuses the key"),
    ):
        go(run, mock, concurrency=1)


def test_a_name_that_is_not_listed_is_refused_before_anything_is_asked(make_run):
    run = make_run()
    with MockEndpoint(names(run)[:2], right) as mock:
        with pytest.raises(
            UserError, match=r"lists no model stage_2_new-.* or stage_2_new .*--served_name stage_2_new=NAME"
        ):
            go(run, mock)
        assert mock.requests == mock.probes == []


def test_served_names_of_another_endpoint(make_run):
    run = make_run()
    with MockEndpoint(["B", "S1", "stage_2_new"], right) as mock:
        found = go(run, mock, served_names={"base": "B", "stage_1_old": "S1"})
    assert found.complete
    assert {body["model"] for body in mock.requests} == {"B", "S1", "stage_2_new"}


def test_endpoint_that_is_not_there(make_run):
    with pytest.raises(UserError, match="not an endpoint that lists its models"):
        evaluate([make_run()], EvalOptions(base_url="http://127.0.0.1:9/v1", retry=FAST), lambda line: None)
