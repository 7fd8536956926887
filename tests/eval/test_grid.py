"""The whole grid against a mock endpoint: what is asked, what is stored, what is scored, and what stops it."""

import json
import random
import socket

import pytest

from swift_cl.cli.main import main
from swift_cl.evaluation.grid import EvalOptions, evaluate
from swift_cl.evaluation.plan import GridOptions, load_grid
from swift_cl.evaluation.results import collect
from tests.eval.conftest import write_rows
from tests.eval.helpers import FAST, REFERENCES, TURNS, go, names, right, scorer
from tests.eval.mock_endpoint import MockEndpoint


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


def test_the_base_model_is_never_asked_together_with_an_adapter(make_run):
    """vLLM on the CPU would give it the last adapter's weights in a mixed batch."""
    run = make_run()
    base, *adapters = names(run)
    # Long enough for two questions to meet on a busy machine too.
    with MockEndpoint([base, *adapters], right, delay=0.2) as mock:
        go(run, mock, concurrency=8)
    assert frozenset(adapters) in mock.together  # adapters share batches
    assert [seen for seen in mock.together if base in seen] == [{base}]


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


def test_equal_stages_under_two_system_prompts_are_asked_apart(make_run):
    """Two runs have equal weights; one of them was trained its first task under another system prompt."""
    one, two = make_run("one"), make_run("two")
    stage = two / "stage_1_old" / "stage.json"
    stage.write_text(json.dumps(json.loads(stage.read_text()) | {"system": "sys other"}))

    def answer(model, messages):
        return "wrong" if messages[0]["content"] == "sys other" else right(model, messages)

    with MockEndpoint(sorted({*names(one), *names(two)}), answer) as mock:
        found = go([one, two], mock)
        assert len(mock.requests) == (1 + 2 + 1) * TURNS
    assert scorer(found, 0)["matrix"] == [[100, 100], [100, 100]]
    assert scorer(found, 1)["matrix"] == [[0, 0], [100, 100]]


def test_a_turn_after_an_answer_that_does_not_count_does_not_count(make_run):
    """Its history is not known: the first turn's answer was asked with other settings."""
    run = make_run()
    with MockEndpoint(names(run), right) as mock:
        go(run, mock)
    path = run / "answers" / "base" / "old.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    (first,) = (row for row in rows if (row["id"], row["turn"]) == ("o1", 0))
    first["key"] = "of other settings"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (problem,) = collect(load_grid(run, GridOptions()))[1]
    assert problem.startswith("base x old: 2 of 4 answers missing (2 x the stored answer was asked with other settings")


def test_unfinished_run_has_null_rows(make_run):
    run = make_run(stages=1)
    with MockEndpoint(names(run), right) as mock:
        found = go(run, mock)
    assert scorer(found)["matrix"] == [[100, 100], [None, None]]
    assert scorer(found)["metrics"]["avg_acc"] is None
    assert not found.complete
    assert "stage 2 (new) is not trained yet" in found.scored[0].problems[0]


def test_an_empty_answer_is_an_answer(make_run):
    run = make_run()
    with MockEndpoint(names(run), lambda model, messages: "") as mock:
        found = go(run, mock)
    assert scorer(found)["matrix"] == [[0, 0], [0, 0]]
    assert found.complete


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


def test_port_taken_is_found_before_a_server_starts(make_run, capsys):
    run = make_run()
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(SystemExit) as done:
        main(["eval", str(run), "--port", str(taken.getsockname()[1])])
    assert done.value.code == 2
    assert "cannot be used on 127.0.0.1 (Address already in use)" in capsys.readouterr().err
    assert not (run / "logs").exists()


def test_base_model_that_moved(make_run, tmp_path, capsys):
    run = make_run()
    (tmp_path / "base").rename(tmp_path / "moved")
    with pytest.raises(SystemExit) as done:
        main(["eval", str(run)])
    assert done.value.code == 2
    assert "the base model's folder was not found; pass --model" in capsys.readouterr().err
    listed = [name.replace("base", "moved") for name in names(run)]
    with MockEndpoint(listed, right) as mock, pytest.raises(SystemExit) as done:
        main(["eval", str(run), "--base_url", mock.base_url, "--model", str(tmp_path / "moved")])
    assert done.value.code == 0


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"messages": [{"role": "user", "content": "q"}]}, "old-test.json, row 1: no assistant turn"),
        ({"question": "q"}, "old-test.json, row 1: expected an object with a 'messages' list"),
    ],
)
def test_malformed_test_data_names_the_row(make_run, benchmark, capsys, row, says):
    run = make_run()
    path = benchmark.parent / "old-test.json"
    rows = json.loads(path.read_text())
    path.write_text(json.dumps([rows[0], row]))
    with pytest.raises(SystemExit) as done:
        main(["eval", str(run)])
    assert done.value.code == 2
    assert says in capsys.readouterr().err
