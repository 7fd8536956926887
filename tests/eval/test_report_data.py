"""What a report makes of a run folder: rows to read a matrix against, shades, questions, curves, commands."""

import json
from pathlib import Path
from typing import Any

import pytest

from swift_cl.errors import UserError
from swift_cl.report.charts import HEIGHT, LEFT, TOP, WIDTH, Line, chart
from swift_cl.report.curves import task_curves
from swift_cl.report.files import write_reports
from swift_cl.report.heatmap import heatmap
from swift_cl.report.html import by_order, render_html
from swift_cl.report.overview import sample_size
from swift_cl.report.questions import question_data, script_json
from swift_cl.report.runs import ReportRun, load_results, load_runs
from swift_cl.report.tables import grid_tables, labels
from swift_cl.report.training import duration, loss_curves, training_record
from tests.eval.report_runs import answer, full_run, results, save, scored, write_jsonl

FULL = [[80.0, 30.0], [60.0, 90.0]]


def run_of(folder: Path, scorers: dict[str, Any], **more: Any) -> ReportRun:
    return load_runs([save(folder, results(scorers, **more))])[0]


# --- matrix ----------------------------------------------------------------------------------------------------------


def test_floor_and_joint_training_stand_beside_the_matrix(tmp_path):
    entry = scored(FULL, [10.0, 20.0]) | {
        "floor": [5.0, None],
        "ceiling": {"new_acc": [80.0, 90.0], "mtl": [85.0, 95.0]},
    }
    run = run_of(tmp_path / "run", {"similarity": entry})
    assert [row[1:] for row in grid_tables([run.results])[0].rows] == [
        ["floor", "5.00", "-"],
        ["base", "10.00", "20.00"],
        ["after old", "80.00", "30.00"],
        ["after new", "60.00", "90.00"],
        ["joint", "85.00", "95.00"],
    ]
    found = heatmap([run], run, "similarity")
    assert [name for name, _, _ in found.rows] == ["floor", "base", "after old", "after new", "joint"]
    assert [[cell.kind for cell in cells] for _, _, cells in found.rows] == [
        ["reference"] * 2, ["reference"] * 2, ["own", "unseen"], ["seen", "own"], ["reference"] * 2
    ]  # fmt: skip
    html = render_html([run])
    assert "shuffled references" in html
    assert "one training on all tasks together" in html


@pytest.mark.parametrize("floor", [None, [None, None]])
def test_what_was_not_measured_is_not_shown(tmp_path, floor):
    entry = scored(FULL, [10.0, 20.0]) | {"floor": floor, "ceiling": {"new_acc": [80.0, 90.0], "mtl": None}}
    run = run_of(tmp_path / "run", {"similarity": entry})
    assert [name for name, _, _ in heatmap([run], run, "similarity").rows] == ["base", "after old", "after new"]
    assert "shuffled references" not in render_html([run])


def test_shades_follow_the_direction(tmp_path):
    higher = run_of(tmp_path / "a", {"s": scored(FULL, [0.0, 20.0])})
    assert [cell.shade for cell in heatmap([higher], higher, "s").rows[1][2]] == [0.8, 0.3]
    lower = run_of(tmp_path / "b", {"s": scored([[10.0, 40.0], [20.0, 0.0]], [40.0, 40.0], higher=False)})
    found = heatmap([lower], lower, "s")
    assert [[cell.shade for cell in cells] for _, _, cells in found.rows] == [[0.0, 0.0], [0.75, 0.0], [0.5, 1.0]]
    assert [cell.dark for cell in found.rows[2][2]] == [False, True]


def test_runs_share_the_colours(tmp_path):
    low = run_of(tmp_path / "a", {"s": scored([[1.0, 2.0], [3.0, 4.0]], None, higher=False)})
    high = run_of(tmp_path / "b", {"s": scored([[1.0, 2.0], [3.0, 8.0]], None, higher=False)})
    assert heatmap([low, high], low, "s").rows[2][2][1].shade == 0.5


@pytest.mark.parametrize(
    ("problem", "shown"),
    [
        ("stage_2_new x old: 1 of 4 answers missing (1 x HTTP 500)", True),
        ("similarity, stage_2_new x old: 2 of 4 answers have no score (judge: no verdict)", True),
        ("stage 2 (new) is not trained yet; its row is null", True),
        ("exact_match, stage_2_new x old: 2 of 4 answers have no score", False),
        ("stage_2_new x new: 1 of 4 answers missing", False),
    ],
)
def test_the_reason_of_an_empty_cell(tmp_path, problem, shown):
    run = run_of(tmp_path / "run", {"similarity": scored([FULL[0], [None, 90.0]], [1.0, 2.0])}, problems=[problem])
    found = heatmap([run], run, "similarity")
    cell = found.rows[2][2][0]
    assert (cell.text, cell.shade, cell.note) == ("–", None, 1)
    assert found.notes == [problem if shown else "stage_2_new x old: not measured"]


def test_n_is_said_where_it_differs(tmp_path):
    entry = scored([FULL[0], [None, 90.0]], [1.0, 2.0]) | {"n": [[4, 6], [3, 6]], "n_base": [4, 6]}
    run = run_of(tmp_path / "run", {"similarity": entry})
    found = heatmap([run], run, "similarity")
    assert found.counts == [4, 6]
    assert found.rows[2][2][0].n == 3
    assert "n = 4 to 6 answers" in sample_size([run])  # the null cell's 3 stand behind no number
    assert "between the methods" not in sample_size([run])
    other = run_of(tmp_path / "other", {"similarity": entry}, method="replay")
    assert "between the methods" in sample_size([run, other])
    assert "one run. Differences between single runs may be chance" in sample_size([run, run])


def test_labels_are_unique():
    def three(**keys: list[Any]) -> list[str]:
        return labels([{"method": "seq"} | {key: values[i] for key, values in keys.items()} for i in range(3)])

    assert three(name=["a", "b", "c"], seed=[1, 1, 1]) == ["seq (a)", "seq (b)", "seq (c)"]
    assert three(name=["a", "a", "a"], seed=[1, 2, 3]) == ["seq (seed 1)", "seq (seed 2)", "seq (seed 3)"]
    assert three(name=["a", "a", "b"], seed=[1, 1, 3]) == ["seq (1)", "seq (2)", "seq (3)"]


def test_runs_of_two_orders_are_kept_apart(tmp_path):
    one = save(tmp_path / "a", results({"s": scored(FULL, [1.0, 2.0])}, "seq"))
    two = save(tmp_path / "b", results({"s": scored(FULL, [1.0, 2.0])}, "ewc") | {"order": ["new", "old"]})
    runs, _ = load_runs([one, two]), write_reports([one, two])
    assert [[run.label for run in group] for group in by_order(runs)] == [["seq"], ["ewc"]]
    html = (tmp_path / "report.html").read_text()
    assert "matrix: old → new" in html
    assert "matrix: new → old" in html


def test_a_comparison_is_not_a_run(tmp_path):
    save(tmp_path, {"schema": 1, "runs": []})
    with pytest.raises(UserError, match="holds several runs; pass the folders"):
        load_results(tmp_path)


# --- questions -------------------------------------------------------------------------------------------------------


def one_question(folder: Path, *answers: dict[str, Any], scores: list[dict[str, Any]] | None = None) -> dict[str, Any]:
    """Question data of a run whose stage 1 gave these answers to task old."""
    run = run_of(folder, {"exact_match": scored(FULL, [10.0, 20.0])})
    write_jsonl(folder / "answers" / "stage_1_old" / "old.jsonl", answers)
    (folder / "stage_1_old").mkdir()
    (folder / "stage_1_old" / "stage.json").write_text(json.dumps({"schema": 1, "weights_sha256": "w"}))
    if scores is not None:
        write_jsonl(folder / "scores" / "exact_match" / "stage_1_old" / "old.jsonl", scores)
    data = question_data([run])
    assert data is not None
    return data


def test_an_answer_its_error_and_its_score(tmp_path):
    failed = answer("b", "") | {"error": "HTTP 500"}
    del failed["answer"]
    first = answer("a", "yes", "why?", "no")
    scores = [{"id": "a", "turn": 0, "key": first["key"], "score": 33.333}, {"id": "b", "turn": 0, "score": None}]
    data = one_question(tmp_path, first, failed, scores=scores)
    texts = data["texts"]
    (task, sample, turn, question, reference, answers, values), (*_, second, _) = data["questions"]
    assert (task, sample, turn, texts[question], texts[reference]) == (0, "a", 0, "why?", "no")
    assert answers == [[-1, texts.index("yes"), -1]]
    assert values == [[[None, 33.33, None]]]
    assert second == [[-1, -2 - texts.index("HTTP 500"), -1]]
    assert data["runs"] == [{"label": "seq", "rows": ["base", "after old", "after new"], "own": [1, 2]}]
    assert data["scorers"] == [{"name": "exact_match", "better": "higher", "right": 80.0, "low": 0.0, "high": 100.0}]
    assert data["notes"] == []


def test_the_last_answer_of_a_turn_counts(tmp_path):
    data = one_question(tmp_path, answer("a", "first"), answer("a", "second"), answer("a", "other", turn=1))
    assert [(entry[2], data["texts"][entry[5][0][1]]) for entry in data["questions"]] == [(0, "second"), (1, "other")]


def test_answers_of_other_weights_are_left_out_and_named(tmp_path):
    data = one_question(tmp_path, answer("a", "now"), answer("b", "then", weights="older"))
    assert [entry[1] for entry in data["questions"]] == ["a"]
    assert "1 answers are from other weights" in data["notes"][0]


def test_scores_of_other_answers_are_left_out_and_named(tmp_path):
    data = one_question(tmp_path, answer("a", "now"), scores=[{"id": "a", "turn": 0, "key": "older", "score": 100.0}])
    assert data["scorers"] == []
    assert "1 scores are of other answers" in data["notes"][0]


def test_damaged_scores_are_named_and_stop_nothing(tmp_path):
    data = one_question(tmp_path, answer("a", "now"), scores=[{"turn": 0}])
    assert data["scorers"] == []
    assert "not scores of answers" in data["notes"][0]


def test_lower_is_better_is_right_up_to_a_limit(tmp_path):
    run = run_of(tmp_path / "run", {"loss": scored([[1.0, 5.0], [2.0, 0.5]], [5.0, 5.0], higher=False)})
    write_jsonl(run.dir / "answers" / "base" / "old.jsonl", [answer("a", "x")])
    write_jsonl(run.dir / "scores" / "loss" / "base" / "old.jsonl", [{"id": "a", "turn": 0, "score": 4.0}])
    data = question_data([run])
    assert data is not None
    assert data["scorers"] == [{"name": "loss", "better": "lower", "right": 1.0, "low": 0.0, "high": 5.0}]


def test_without_answers_there_is_no_list(tmp_path):
    run = run_of(tmp_path / "run", {"exact_match": scored(FULL, [10.0, 20.0])})
    assert question_data([run]) is None
    assert 'id="questions"' not in render_html([run])


def test_json_in_a_script_element():
    hostile = "</script><!-- <script> & \u2028\u2029 \ud83d\ude00 \ud800"
    text = script_json({"a": [hostile, 1.5, None]})
    assert not set("<>&\u2028\u2029") & set(text)
    text.encode()
    assert json.loads(text) == {"a": [hostile.replace("\ud83d\ude00", "😀").replace("\ud800", "\ufffd"), 1.5, None]}


# --- charts and training ---------------------------------------------------------------------------------------------


def test_a_chart_has_gaps_where_nothing_was_measured():
    line = Line("seq", 0, [(0.0, 0.0), (1.0, None), (2.0, 100.0), (3.0, 50.0)], ["a", "b", "c", "d"])
    found = chart("old", [line], (0.0, 100.0), ["base", "x", "y", "z"], levels=[(100.0, "floor")])
    right, bottom = WIDTH - 10, HEIGHT - 24
    third = round(LEFT + 2 / 3 * (right - LEFT), 1)
    middle = TOP + (bottom - TOP) / 2
    assert found.lines[0].path == f"M{LEFT:.1f} {bottom:.1f}M{third} {TOP:.1f}L{right:.1f} {middle:.1f}"
    assert [title for _, _, title in found.lines[0].dots] == ["a", "c", "d"]
    assert found.levels == [(TOP, "floor")]
    assert [label for _, label in found.x_ticks] == ["base", "x", "y", "z"]
    assert found.summary == "old: seq from 0 (base) to 50 (z)"


def test_many_names_on_an_axis_are_thinned_out():
    names = ["base", *(f"a long task {index}" for index in range(15))]
    ticks = chart("t", [Line("seq", 0, [(x, 1.0) for x in range(16)])], (0.0, 1.0), names).x_ticks
    # 254 units of axis for labels of 9 x 6.2 + 8 units.
    assert [label for _, label in ticks] == ["base", "a lo…sk 7", "a lo…k 14"]


def test_curves_of_the_tasks(tmp_path):
    run = run_of(tmp_path / "run", {"s": scored([FULL[0], [None, 90.0]], [10.0, 20.0])})
    mean, old, new = task_curves([run], "s", {"seq": 0})
    titles = [[dot[2] for dot in found.lines[0].dots] for found in (mean, old, new)]
    assert titles[0] == ["seq, after old, mean of the tasks seen: 80.00"]  # after new: a cell is missing
    assert titles[1] == ["seq, base, task old: 10.00", "seq, after old, task old: 80.00"]
    assert titles[2] == [
        "seq, base, task new: 20.00",
        "seq, after old, task new: 30.00",
        "seq, after new, task new: 90.00",
    ]
    assert (old.shaded_to, new.shaded_to) == (new.x_ticks[1][0], new.x_ticks[2][0])


def test_training_of_a_run(tmp_path):
    run = load_runs([full_run(tmp_path / "run")])[0]
    asked = {"schema": 1, "generation": {"max_tokens": 64}, "history": "own", "system": "stage", "base": "x"}
    (run.dir / "answers" / "settings.json").write_text(json.dumps(asked))
    record = training_record(run)
    assert record.asked == {"Generation": '{"max_tokens": 64}', "Earlier turns": "own", "System prompt of": "stage"}
    assert record.stages[0].losses == [(1.0, 4.0), (10.0, 0.4), (20.0, 0.2)]
    assert record.table[1] == ["stage_2_new", "60", "2", "30", "0.2500", "65.4", "1", "2e+09", "w", "w"]
    assert record.cost == [("Training time", "2 min 11 s"), ("Optimizer steps", "60"), ("Training FLOPs", "4e+09")]
    assert record.versions == {"ms-swift": "4.6.0"}
    assert record.settings == {"learning_rate": "0.0001"}
    assert record.commands == [
        "swift-cl sft --model models/tiny --system 'News of 2022.'",
        "swift-cl sft --model models/tiny --system 'News of 2022.' --cl_previous runs/stage_1_old",
    ]
    assert [found.title for found in loss_curves([run], {"seq": record}, {"seq": 0})] == [
        "stage 1: old",
        "stage 2: new",
    ]


def test_a_step_that_was_trained_twice_counts_once(tmp_path):
    run = load_runs([full_run(tmp_path / "run")])[0]
    rows = [
        {"loss": loss, "global_step/max_steps": f"{step}/3"} for step, loss in ((1, 3.0), (2, 2.0), (2, 2.5), (3, 1.0))
    ]
    write_jsonl(run.dir / "stage_1_old" / "logging.jsonl", rows)
    assert training_record(run).stages[0].losses == [(1.0, 3.0), (2.0, 2.5), (3.0, 1.0)]


def test_a_damaged_log_is_a_note(tmp_path):
    run = load_runs([full_run(tmp_path / "run")])[0]
    (run.dir / "stage_1_old" / "logging.jsonl").write_text('{"loss": 1.0')
    write_reports([run.dir])
    assert "logging.jsonl, line 1: not valid JSON" in (run.dir / "report.md").read_text()
    assert "logging.jsonl, line 1: not valid JSON" in (run.dir / "report.html").read_text()


@pytest.mark.parametrize(
    ("seconds", "text"), [(41.23, "41.2 s"), (59.99, "1 min 0 s"), (185, "3 min 5 s"), (7830, "2 h 10 min")]
)
def test_duration(seconds, text):
    assert duration(seconds) == text
