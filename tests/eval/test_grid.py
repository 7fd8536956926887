"""The whole grid against a mock endpoint: what is asked, what is stored, what is scored, and what stops it."""

import json
import random

import pytest

from swift_cl.cli.main import main
from swift_cl.errors import RunFailure, UserError
from swift_cl.evaluation.client import RetryPolicy
from swift_cl.evaluation.grid import EvalOptions, evaluate
from swift_cl.evaluation.plan import GridOptions, load_grid
from tests.eval.conftest import write_rows
from tests.eval.mock_endpoint import Fault, MockEndpoint

FAST = RetryPolicy(attempts=3, longest_wait=0.01, timeout=0.5)
REFERENCES = {"q0": "a0", "q1": "a1", "q1b": "a1b", "q2": "a2", "r0": "b0", "r1": "b1"}
TURNS = 6


def names(run):
    """The served names of a run, the base first."""
    grid = load_grid(run, GridOptions())
    return [target.served for target in grid.targets]


def right(model, messages):
    return REFERENCES[messages[-1]["content"]]


def go(run, mock, **options):
    runs = run if isinstance(run, list) else [run]
    return evaluate(runs, EvalOptions(base_url=mock.base_url, retry=FAST, **options), notify=lambda line: None)


def scorer(evaluation, index=0):
    return evaluation.results[index]["scorers"]["exact_match"]


def test_full_grid(make_run):
    run = make_run()

    def answer(model, messages):
        text = REFERENCES[messages[-1]["content"]]
        knows = {"base": "", "stage_1": "a", "stage_2": "b"}[
            next(k for k in ("stage_1", "stage_2", "base") if k in model)
        ]
        return text if text[0] == knows else "no idea"

    with MockEndpoint(names(run), answer) as mock:
        found = go(run, mock)
    assert scorer(found)["base"] == [0, 0]
    assert scorer(found)["matrix"] == [[100, 0], [0, 100]]
    assert scorer(found)["n"] == [[4, 2], [4, 2]]
    assert scorer(found)["metrics"]["forgetting"] == 100
    assert scorer(found)["metrics"]["new_acc"] == 100
    assert found.complete
    assert len(mock.requests) == 3 * TURNS
    on_disk = json.loads((run / "results.json").read_text())
    assert on_disk == found.results[0]
    assert {k: on_disk[k] for k in ("schema", "benchmark", "order", "method", "seed")} == {
        "schema": 1, "benchmark": "tiny", "order": ["old", "new"], "method": "seq", "seed": 42,
    }  # fmt: skip


def test_the_history_is_the_models_own_answers_and_the_system_prompt_is_the_stages(make_run):
    run = make_run()
    with MockEndpoint(names(run), lambda model, messages: f"own {messages[-1]['content']}") as mock:
        go(run, mock)
    second = [body for body in mock.requests if body["messages"][-1]["content"] == "q1b"]
    for body in second:
        assert [m["role"] for m in body["messages"]] == ["system", "user", "assistant", "user"]
        assert body["messages"][2]["content"] == "own q1"
        assert body["temperature"] == 0
        assert body["max_tokens"] == 8
    systems = {(body["model"].split("-")[0], body["messages"][0]["content"]) for body in mock.requests}
    assert systems == {("base", "sys old"), ("base", "sys new"), ("stage_1_old", "sys old"), ("stage_2_new", "sys new")}


@pytest.mark.parametrize(("policy", "expected"), [("task", {"sys old", "sys new"}), ("none", set())])
def test_other_system_policies(make_run, policy, expected):
    run = make_run()
    with MockEndpoint(names(run), right) as mock:
        go(run, mock, system=policy)
    assert {m["content"] for b in mock.requests for m in b["messages"] if m["role"] == "system"} == expected


def test_a_rows_own_system_prompt_wins(make_run, benchmark):
    write_rows(benchmark.parent / "new-test.json", [("n0", [("r0", "b0")])], system="row's own")
    run = make_run()
    with MockEndpoint(names(run), right) as mock:
        go(run, mock)
    assert {b["messages"][0]["content"] for b in mock.requests if b["messages"][-1]["content"] == "r0"} == {"row's own"}


def test_second_run_asks_nothing_and_needs_no_server(make_run):
    run = make_run()
    with MockEndpoint(names(run), right) as mock:
        first = go(run, mock)
        count = len(mock.requests)
        second = go(run, mock)
        assert len(mock.requests) == count
        assert len(mock.probes) == 2 * 4  # two probes for each of base (twice) and two stages, first time only
    assert first.results == second.results
    third = evaluate([run], EvalOptions(base_url=mock.base_url, retry=FAST), notify=lambda line: None)
    assert third.results == first.results  # the endpoint is gone by now


def test_crash_and_resume_ask_only_what_is_missing(make_run):
    run = make_run()
    with MockEndpoint(names(run), right) as mock:
        go(run, mock)
        path = run / "answers" / "stage_1_old" / "old.jsonl"
        lines = path.read_bytes().splitlines(keepends=True)
        path.write_bytes(b"".join(lines[:2]) + lines[2][:20])  # killed in the middle of a line
        before = len(mock.requests)
        found = go(run, mock)
        assert len(mock.requests) - before == 2
    assert scorer(found)["matrix"] == [[100, 100], [100, 100]]
    assert all(json.loads(line) for line in path.read_bytes().splitlines())


def test_only_what_changed_is_asked_again(make_run, benchmark):
    run = make_run()
    with MockEndpoint(names(run), right) as mock:
        go(run, mock)
        before = len(mock.requests)
        go(run, mock, max_tokens=9)
        assert len(mock.requests) - before == 3 * TURNS
        before = len(mock.requests)
        # Another question under the same id.
        write_rows(benchmark.parent / "new-test.json", [("n0", [("q0", "a0")]), ("n1", [("r1", "b1")])])
        found = go(run, mock, max_tokens=9)
        assert len(mock.requests) - before == 3
        before = len(mock.requests)
        # Only a reference changed: nothing to ask, but another score.
        write_rows(benchmark.parent / "new-test.json", [("n0", [("q0", "zz")]), ("n1", [("r1", "b1")])])
        found = go(run, mock, max_tokens=9)
        assert len(mock.requests) == before
    assert scorer(found)["base"] == [100, 50]


def test_a_stage_trained_again_is_asked_again(make_run, tmp_path):
    run = make_run()
    with MockEndpoint(names(run), right) as mock:
        go(run, mock)
    other = make_run("other", seed=7)
    (run / "stage_2_new").rename(tmp_path / "gone")
    (other / "stage_2_new").rename(run / "stage_2_new")
    with MockEndpoint(names(run), right) as mock:
        go(run, mock)
        assert len(mock.requests) == TURNS


def test_order_of_rows_and_answers_changes_nothing(make_run, benchmark):
    run = make_run()
    with MockEndpoint(
        names(run), lambda model, m: REFERENCES[m[-1]["content"]] if m[-1]["content"] != "q2" else "x"
    ) as mock:
        first = go(run, mock)
        rows = json.loads((benchmark.parent / "old-test.json").read_text())
        random.Random(3).shuffle(rows)
        (benchmark.parent / "old-test.json").write_text(json.dumps(rows))
        for path in (run / "answers").rglob("*.jsonl"):
            lines = path.read_text().splitlines(keepends=True)
            random.Random(4).shuffle(lines)
            path.write_text("".join([*lines, lines[0]]))  # reordered, and one row twice
        before = len(mock.requests)
        second = go(run, mock)
        assert len(mock.requests) == before
    assert first.results == second.results
    assert scorer(first)["base"] == [75, 100]


def test_equal_first_questions_are_not_confused(make_run, benchmark):
    write_rows(benchmark.parent / "new-test.json", [("n0", [("q0", "a0")]), ("n1", [("q0", "zz")])])
    run = make_run()
    with MockEndpoint(names(run), right) as mock:
        found = go(run, mock)
    assert scorer(found)["base"] == [100, 50]


def test_concurrency(make_run):
    run = make_run()
    with MockEndpoint(names(run), right, delay=0.03) as mock:
        go(run, mock, concurrency=5)
        assert 2 <= mock.most_in_flight <= 5


def test_runs_share_the_base_and_equal_stages(make_run):
    """Two methods often share the first stage bit for bit: it and the base are asked once, stored for both."""
    one, two = make_run("one", "seq", seed=0), make_run("two", "replay", seed=0)
    (two / "stage_2_new" / "adapter" / "adapter_model.safetensors").unlink()
    three = make_run("three", seed=5)
    for name in ("adapter/adapter_model.safetensors", "stage.json"):
        (three / "stage_2_new" / name).replace(two / "stage_2_new" / name)
    with MockEndpoint(sorted({*names(one), *names(two)}), right) as mock:
        found = go([one, two], mock)
        assert len(mock.requests) == (1 + 1 + 2) * TURNS
        before = len(mock.requests)
        go([two], mock)
        assert len(mock.requests) == before
    assert found.complete
    assert scorer(found, 0)["base"] == scorer(found, 1)["base"] == [100, 100]


def test_unfinished_run_has_null_rows(make_run):
    run = make_run(stages=1)
    with MockEndpoint(names(run), right) as mock:
        found = go(run, mock)
    assert scorer(found)["matrix"] == [[100, 100], [None, None]]
    assert scorer(found)["metrics"]["avg_acc"] is None
    assert not found.complete
    assert "stage 2 (new) is not trained yet" in found.scored[0].problems[0]


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


def test_an_empty_answer_is_an_answer(make_run):
    run = make_run()
    with MockEndpoint(names(run), lambda model, messages: "") as mock:
        found = go(run, mock)
    assert scorer(found)["matrix"] == [[0, 0], [0, 0]]
    assert found.complete


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


@pytest.mark.parametrize("logprobs", [True, False])
def test_base_model_answering_in_an_adapters_place_stops_the_run(make_run, logprobs):
    run = make_run()
    listed = names(run)
    with MockEndpoint(
        listed, weights=lambda name: listed[0] if name.startswith("stage_2") else name, logprobs=logprobs
    ) as mock:
        with pytest.raises(RunFailure, match=r"'stage_2_new-.*' answers exactly as the base model does"):
            go(run, mock)
        assert len(mock.requests) == 0 or not logprobs
        assert not go(run, mock, identity_check=False).scored[0].problems


def test_another_adapters_weights_stop_the_run(make_run):
    run = make_run()
    listed = names(run)
    with (
        MockEndpoint(listed, weights=lambda name: listed[1] if name.startswith("stage_2") else name) as mock,
        pytest.raises(RunFailure, match=r"'stage_2_new-.*' answers exactly as 'stage_1_old-"),
    ):
        go(run, mock)


def test_swapped_adapters_are_found_by_their_earlier_fingerprints(make_run):
    run = make_run()
    listed = names(run)
    with MockEndpoint(listed, right) as mock:
        go(run, mock)
    swap = {listed[1]: listed[2], listed[2]: listed[1], listed[0]: listed[0]}
    with (
        MockEndpoint(listed, right, weights=swap.__getitem__) as mock,
        pytest.raises(RunFailure, match="does not answer as it did when it was evaluated first"),
    ):
        go(run, mock, max_tokens=9)


def test_another_adapters_name_in_the_response_stops_the_run(make_run):
    run = make_run()
    listed = names(run)
    with (
        MockEndpoint(listed, right, reported=lambda name: listed[1] if name != listed[0] else name) as mock,
        pytest.raises(RunFailure, match=r"asked 'stage_2_new-.*', but 'stage_1_old-.*' answered"),
    ):
        go(run, mock)


def test_the_base_models_name_in_every_response_is_what_ms_swift_does(make_run):
    run = make_run()
    listed = names(run)
    with MockEndpoint(listed, right, reported=lambda name: listed[0]) as mock:
        assert go(run, mock).complete


def test_command_exit_codes_and_reports(make_run, capsys, monkeypatch):
    run = make_run()
    with MockEndpoint(names(run), right) as mock, pytest.raises(SystemExit) as done:
        main(["eval", str(run), "--base_url", mock.base_url])
    assert done.value.code == 0
    out = capsys.readouterr().out
    assert "Avg.ACC" in out
    assert "after new" in out
    assert {"report.md", "report.html", "matrix.png", "results.json"} <= {path.name for path in run.iterdir()}
    (run / "answers" / "base" / "old.jsonl").unlink()
    with pytest.raises(SystemExit) as done:
        main(["report", str(run)])
    assert done.value.code == 0  # the report shows results.json as it is


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["nowhere"], "run folder not found"),
        (["RUN", "--scorer", "exact_mach"], "did you mean 'exact_match'?"),
        (["RUN", "--order", "x"], "order 'x' is unknown"),
        (["RUN", "--benchmark", "none.yaml"], "none.yaml: file not found"),
        (["RUN", "--data_dir", "none"], "data file not found"),
        (["RUN", "--infer_backend", "vlm"], "did you mean 'vllm'?"),
        (["RUN", "--infer_backend", "lmdeploy"], "cannot serve adapters"),
        (["RUN", "--infer_backend", "vllm"], "has no vLLM"),
        (["RUN", "--server_python", "/nowhere/python"], "cannot be run"),
        (["RUN", "--served_name", "x"], "expected ROW=NAME"),
        (["RUN", "--base_url", "http://127.0.0.1:1/v1", "--port", "80"], "choose"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(make_run, capsys, argv, says):
    run = make_run()
    with pytest.raises(SystemExit) as done:
        main(["eval", *[str(run) if word == "RUN" else word for word in argv]])
    err = capsys.readouterr().err.replace("\r", "\n")
    lines = [
        line for line in err.splitlines() if line.strip() and not line.startswith(" ") and "questions:" not in line
    ]
    assert done.value.code == 2
    assert len(lines) == 1
    assert says in lines[0]
    assert not (run / "logs").exists()
