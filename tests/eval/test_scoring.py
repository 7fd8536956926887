"""Scorers in a grid: settings by task, null where a score is missing, floors, ceilings, scores of single answers."""

import json
import sys
from collections import Counter

import pytest

from swift_cl.cli.main import main
from swift_cl.errors import RunFailure, UserError
from swift_cl.evaluation import scorers
from swift_cl.evaluation.floors import joint_row, shuffled
from swift_cl.evaluation.grid import EvalOptions, prepare
from swift_cl.evaluation.score_files import read_scores, score_path
from swift_cl.evaluation.scorers import Item, Unscored
from swift_cl.evaluation.scoring import GridScorer, _cell, score_cells
from tests.eval.conftest import write_rows
from tests.eval.helpers import REFERENCES, go, names, right
from tests.eval.mock_endpoint import Fault, MockEndpoint


@pytest.fixture
def edit(benchmark):
    """edit(text, task=text): add lines to the benchmark file, `task` ones to the task `old`."""

    def do(top="", old=""):
        text = benchmark.read_text().replace("system: sys old}", f"system: sys old{', ' if old else ''}{old}}}")
        benchmark.write_text(f"{text}{top}\n")

    return do


def entry(found, name, index=0):
    return found.results[index]["scorers"][name]


# --- settings --------------------------------------------------------------------------------------------------------


def test_settings_of_a_task_win_over_the_benchmarks_and_the_command_line_over_both(make_run, edit):
    edit("scorer_options: {numeric_match: {tolerance: 1.0}}", "scorer_options: {numeric_match: {tolerance: 5}}")
    run = make_run()
    # References are a0, a1, ... and b0, b1: numbers; answers are off by 2.
    answer = lambda model, messages: str(int(REFERENCES[messages[-1]["content"]].strip("ab")) + 2)  # noqa: E731
    with MockEndpoint(names(run), answer) as mock:
        found = go(run, mock, scorers=("numeric_match",))
        assert entry(found, "numeric_match")["base"] == [100, 0]
        over = go(run, mock, scorers=("numeric_match",), scorer_options={"numeric_match": {"tolerance": 2}})
        assert entry(over, "numeric_match")["base"] == [100, 100]


@pytest.mark.parametrize(
    ("top", "old", "says"),
    [
        ("scorer_options: {label_choise: {}}", "", "scorer_options: scorer 'label_choise' is unknown"),
        ("scorer_options: {label_choice: {lables: [a]}}", "", "label_choice.lables is unknown, allowed: labels; did "
         "you mean 'labels'?"),
        ("", "scorer_options: {numeric_match: {tolerance: -1}}", "task old, scorer_options: numeric_match.tolerance: "
         "Input should be greater than or equal to 0, found -1"),
        ("scorer_options: {exact_match: {x: 1}}", "", "exact_match.x is unknown, scorer 'exact_match' has no settings"),
        ("scorer_options: 3", "", "scorer_options: Input should be a valid dictionary, found 3"),
        ("", "scorer_options: {bleu: 3}", "tasks.0.scorer_options.bleu: Input should be a valid dictionary, found 3"),
    ],
)  # fmt: skip
def test_wrong_settings_are_one_line_before_anything_starts(make_run, edit, capsys, top, old, says):
    edit(top, old)
    run = make_run()
    with pytest.raises(SystemExit) as done:
        main(["eval", str(run), "--base_url", "http://127.0.0.1:9/v1"])
    err = capsys.readouterr().err
    assert done.value.code == 2
    assert says in err
    assert "benchmark.yaml" in err
    assert len(err.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("flag", "says"),
    [
        ("numeric_match.tolerance", "expected SCORER.KEY=VALUE"),
        ("tolerance=1", "expected SCORER.KEY=VALUE"),
        ("numeric_match.tolerance=[", "not a YAML value"),
        ("numeric_match.tolerence=1", "did you mean 'tolerance'?"),
        ("numeric_mach.tolerance=1", "did you mean 'numeric_match'?"),
        ("numeric_match.tolerance=x", "--scorer_option: numeric_match.tolerance: Input should be a valid number"),
    ],
)
def test_wrong_scorer_option(make_run, capsys, flag, says):
    with pytest.raises(SystemExit) as done:
        main(["eval", str(make_run()), "--base_url", "http://127.0.0.1:9/v1", "--scorer_option", flag])
    assert done.value.code == 2
    assert says in capsys.readouterr().err


def test_scorer_option_on_the_command_line(make_run, capsys):
    run = make_run()
    flags = ["--scorer", "label_choice", "--scorer_option", "label_choice.labels=[a0, a1, a1b, a2, b0, b1]"]
    with MockEndpoint(names(run), right) as mock, pytest.raises(SystemExit) as done:
        main(["eval", str(run), "--base_url", mock.base_url, *flags])
    assert done.value.code == 0
    assert json.loads((run / "results.json").read_text())["scorers"]["label_choice"]["base"] == [100, 100]


def test_direction_is_the_benchmarks_and_one_for_all_tasks(make_run, edit):
    edit("scorer_options: {refusal_rate: {higher_is_better: true}}")
    run = make_run()
    refuses = lambda model, messages: "I cannot help with that." if "stage_2" in model else "Sure."  # noqa: E731
    with MockEndpoint(names(run), refuses) as mock:
        found = entry(go(run, mock, scorers=("refusal_rate",)), "refusal_rate")
        assert found["higher_is_better"] is True
        assert found["metrics"]["forgetting"] == -100  # task `old` is refused more, which is better
        lower = {"refusal_rate": {"higher_is_better": False}}
        other = entry(go(run, mock, scorers=("refusal_rate",), scorer_options=lower), "refusal_rate")
        assert other["metrics"]["forgetting"] == 100
        assert other["floor"] == [None, None]


def test_directions_that_differ_between_tasks_are_refused(make_run, edit):
    edit("", "scorer_options: {refusal_rate: {higher_is_better: true}}")
    with pytest.raises(UserError, match="must have one direction for all tasks, found old: higher, new: lower"):
        prepare([make_run()], EvalOptions(scorers=("refusal_rate",)))


def test_a_missing_library_is_one_line_before_anything_starts(make_run, monkeypatch, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for scorer, library in (("bleu", "sacrebleu"), ("rouge_l", "rouge_score"), ("edit_similarity", "rapidfuzz")):
        with pytest.raises(UserError) as caught:
            scorers.load(scorer)
        assert str(caught.value) == (
            f"scorer {scorer!r} needs the library {library}, which is not installed: pip install 'swift_cl[scorers]'"
        )


# --- null, never 0 ---------------------------------------------------------------------------------------------------


def test_an_answer_without_a_score_makes_its_cell_null(make_run, benchmark):
    write_rows(benchmark.parent / "new-test.json", [("n0", [("r0", "no number")]), ("n1", [("r1", "7")])])
    run = make_run()
    with MockEndpoint(names(run), lambda model, messages: "7") as mock:
        found = go(run, mock, scorers=("numeric_match", "exact_match"))
    numeric = entry(found, "numeric_match")
    assert [row[1] for row in numeric["matrix"]] == [None, None]
    assert numeric["n"] == [[4, 1], [4, 1]]
    assert numeric["metrics"]["avg_acc"] is None
    assert numeric["matrix"][0][0] == 0
    assert entry(found, "exact_match")["matrix"][0] == [0, 50]
    assert not found.complete
    assert (
        "numeric_match, stage_1_old x new: 1 of 2 answers have no score (1 x the reference 'no number' holds no number)"
        in found.scored[0].problems
    )
    assert read_scores(run, "numeric_match", "base", "new") == [
        {"id": "n0", "turn": 0, "key": found_key(run, "n0"), "score": None,
         "problem": "the reference 'no number' holds no number"},
        {"id": "n1", "turn": 0, "key": found_key(run, "n1"), "score": 100},
    ]  # fmt: skip


def found_key(run, sample):
    lines = (run / "answers" / "base" / "new.jsonl").read_text().splitlines()
    return next(json.loads(line)["key"] for line in lines if json.loads(line)["id"] == sample)


def test_the_judge_in_a_grid(make_run, monkeypatch, tmp_path):
    """Its failure leaves its cells null and the other scorers' alone; the second run asks only what is missing."""
    monkeypatch.setenv("SWIFT_CL_CACHE", str(tmp_path / "cache"))
    run = make_run()
    broken = {"r0"}

    def fault(body, before):
        return (
            Fault(500, "no") if any(f"<question>\n{q}\n" in body["messages"][-1]["content"] for q in broken) else None
        )

    with (
        MockEndpoint(names(run), right) as mock,
        MockEndpoint(["judge"], lambda model, messages: "Verdict: 9", fault) as judge,
    ):
        options = {"llm_judge": {"base_url": judge.base_url, "model": "judge", "attempts": 1}}
        found = go(run, mock, scorers=("llm_judge", "exact_match"), scorer_options=options)
        assert entry(found, "llm_judge")["matrix"] == [[90, None], [90, None]]
        assert entry(found, "llm_judge")["floor"] == [None, None]
        assert entry(found, "exact_match")["matrix"] == [[100, 100], [100, 100]]
        # All rows answered alike, so each of the six questions was asked once (the broken one once a row's text).
        assert len(judge.requests) == 6
        broken.clear()
        again = go(run, mock, scorers=("llm_judge",), scorer_options=options)
        assert entry(again, "llm_judge")["matrix"] == [[90, 90], [90, 90]]
        assert len(judge.requests) == 7
    assert entry(again, "llm_judge")["facts"]["judge"] == "judge"


# --- scores of single answers ----------------------------------------------------------------------------------------


def test_scores_of_single_answers(make_run):
    run = make_run()
    with MockEndpoint(names(run), lambda m, q: "a1" if q[-1]["content"] == "q1" else "x") as mock:
        go(run, mock, scorers=("exact_match", "token_f1"))
    lines = read_scores(run, "exact_match", "stage_1_old", "old")
    assert [(line["id"], line["turn"], line["score"]) for line in lines] == [
        ("o0", 0, 0), ("o1", 0, 100), ("o1", 1, 0), ("o2", 0, 0),
    ]  # fmt: skip
    stored = [json.loads(line) for line in (run / "answers/stage_1_old/old.jsonl").read_text().splitlines()]
    assert {(a["id"], a["turn"]): a["key"] for a in stored} == {(x["id"], x["turn"]): x["key"] for x in lines}
    folders = {path.relative_to(run / "scores").as_posix() for path in (run / "scores").rglob("*.jsonl")}
    assert folders == {
        f"{scorer}/{row}/{task}.jsonl"
        for scorer in ("exact_match", "token_f1") for row in ("base", "stage_1_old", "stage_2_new")
        for task in ("old", "new")
    }  # fmt: skip


def test_a_cell_without_answers_has_no_value():
    scorer = GridScorer("exact_match", True, {"old": scorers.load("exact_match", None, {}, "here")})
    answered = Item("yes", "yes", "?", "old", None, "o0", 0)
    found = score_cells(scorer, {("base", "old"): [answered], ("stage_1", "old"): []})
    assert {row: cell.value for (row, _), cell in found.items()} == {"base": 100.0, "stage_1": None}


def test_the_most_frequent_reason_comes_first():
    loaded = scorers.load("exact_match", None, {}, "here")
    items = [Item("yes", "yes", "?", "old", None, f"o{i}", 0) for i in range(4)]
    found = _cell(loaded, items, [Unscored("rare"), 100.0, Unscored("often"), Unscored("often")])
    assert (found.value, found.unscored, found.problems) == (None, 3, ["2 x often", "1 x rare"])


def test_an_incomplete_cell_has_scores_but_no_value_and_without_answers_no_file(make_run):
    run = make_run()
    fault = lambda body, before: Fault(400, "bad") if body["messages"][-1]["content"] in broken else None  # noqa: E731
    broken = {"q2", "r0", "r1"}
    with MockEndpoint(names(run), right, fault) as mock:
        found = go(run, mock)
        assert entry(found, "exact_match")["matrix"] == [[None, None], [None, None]]
        assert [line["id"] for line in read_scores(run, "exact_match", "base", "old")] == ["o0", "o1", "o1"]
        assert not score_path(run, "exact_match", "base", "new").exists()
        broken.clear()
        go(run, mock)
        assert len(read_scores(run, "exact_match", "base", "new")) == 2


def test_corpus_scores_fill_the_cells(make_run, benchmark):
    write_rows(benchmark.parent / "new-test.json", [("n0", [("r0", "a b c d f")]), ("n1", [("r1", "g h i j")])])
    run = make_run()
    replies = {"r0": "a b c d e", "r1": "g h i j"}
    with MockEndpoint(names(run), lambda m, q: replies.get(q[-1]["content"], "x")) as mock:
        found = entry(go(run, mock, scorers=("bleu",)), "bleu")
    assert found["matrix"][0][1] == pytest.approx(100 * (8 / 9 * 6 / 7 * 4 / 5 * 2 / 3) ** 0.25)
    assert found["cell"] == "corpus BLEU of the cell's answers"
    assert "tok:13a" in next(iter(found["facts"]["signatures"]))
    assert [x["score"] for x in read_scores(run, "bleu", "base", "new")] == pytest.approx([100 * 0.2**0.25, 100])


# --- floors and ceilings ---------------------------------------------------------------------------------------------


def ring(*references):
    return [Item(text, text, question=f"q{n}", task="t", id=str(n)) for n, text in enumerate(references)]


@pytest.mark.parametrize(
    ("references", "pairs"),
    [
        ("abcdef", 6), ("ab", 2), ("aabb", 4), ("aabc", 4), ("aaabbb", 6), ("aabbcc", 6), ("aaab", 2), ("aaaab", 2),
        ("aaaabb", 4), ("a", 0), ("aaa", 0), ("", 0), ("abcab" * 20, 100),
    ],
)  # fmt: skip
def test_as_few_as_possible_keep_their_own_text(references, pairs):
    """A text that is more than half of n turns, m of them, leaves 2 * (n - m) wrong pairs."""
    found = shuffled(ring(*references))
    assert len(found) == pairs
    assert all(item.answer != item.reference for item in found)
    assert len({item.id for item in found}) == pairs
    if pairs == len(references):
        assert Counter(item.answer for item in found) == Counter(references)


def test_the_shuffle_is_seeded_and_knows_no_order():
    items = ring(*"abcdefghij")
    key = lambda found: {(item.id, item.answer) for item in found}  # noqa: E731
    assert key(shuffled(items)) == key(shuffled(items[::-1]))
    assert key(shuffled(items)) != key(shuffled(items, seed=1))


def test_floor_and_ceiling_in_results(make_run, benchmark):
    rows = [("n0", [("r0", "the red cat")]), ("n1", [("r1", "the red dog")]), ("n2", [("r2", "the red dog")])]
    write_rows(benchmark.parent / "new-test.json", rows)
    run = make_run()
    with MockEndpoint(names(run), lambda model, messages: REFERENCES.get(messages[-1]["content"], "x")) as mock:
        found = go(run, mock, scorers=("exact_match", "token_f1"))
    exact, f1 = entry(found, "exact_match"), entry(found, "token_f1")
    assert exact["floor"] == [0, 0]
    assert f1["floor"] == [0, 50]  # red is one of two words; cat against dog and dog against cat
    assert f1["n_floor"] == exact["n_floor"] == [4, 2]  # one dog gets the other dog's text and is left out
    assert exact["ceiling"] == {"new_acc": [100, 0], "mtl": None, "mtl_run": None}
    assert exact["range"] == [0, 100]


def test_joint_training_is_a_ceiling_given_or_beside(make_run):
    run, joint = make_run("seq_run"), make_run("joint_run", "mtl", seed=9)
    with MockEndpoint(sorted({*names(run), *names(joint)}), right) as mock:
        alone = go(run, mock)
        assert entry(alone, "exact_match")["ceiling"]["mtl"] is None
        both = go([run, joint], mock)
        wanted = {"new_acc": [100, 100], "mtl": [100, 100], "mtl_run": "joint_run"}
        assert entry(both, "exact_match")["ceiling"] == wanted
        assert json.loads((run / "results.json").read_text()) == both.results[0]
        beside = go(run, mock)
        assert entry(beside, "exact_match")["ceiling"] == wanted
        # Another base model, benchmark or test set, or another scorer, is no ceiling for this one.
        path = joint / "results.json"
        saved = path.read_text()
        answers = json.loads(saved)["answers"]
        for change in ({"model_id": "x"}, {"benchmark": "x"}, {"answers": answers | {"expected": [4, 3]}}):
            path.write_text(json.dumps(json.loads(saved) | change))
            assert entry(go(run, mock), "exact_match")["ceiling"]["mtl"] is None, change
        path.write_text(saved)
        assert entry(go(run, mock, scorers=("token_f1",)), "token_f1")["ceiling"]["mtl"] is None
        (joint / "results.json").write_text("{")
        assert entry(go(run, mock), "exact_match")["ceiling"]["mtl"] is None


def test_joint_training_is_read_task_by_task_from_its_last_full_row():
    def entry(name, seed, order, matrix):
        answers = {"expected": [{"old": 2, "new": 3}[task] for task in order]}
        facts = {"benchmark": "b", "model_id": "m", "method": "mtl", "name": name, "seed": seed, "answers": answers}
        return {**facts, "order": order, "scorers": {"exact_match": {"matrix": matrix}}}

    run = entry("run", 1, ["old", "new"], [])
    turned = entry("turned", 1, ["new", "old"], [[1.0, 2.0], [3.0, 4.0], [5.0, None]])
    other_seed = entry("another seed", 2, ["old", "new"], [[7.0, 8.0]])
    other_rows = {**other_seed, "answers": {"expected": [2, 9]}, "seed": 1, "name": "a smaller test"}
    found = joint_row([other_seed, other_rows, turned], run, "exact_match")
    assert found == ("turned", [4.0, 3.0])
    assert joint_row([other_seed], run, "exact_match") == ("another seed", [7.0, 8.0])
    assert joint_row([other_rows], run, "exact_match") is None


def test_the_floor_stands_in_the_printed_table(make_run, capsys):
    run = make_run()
    with MockEndpoint(names(run), right) as mock, pytest.raises(SystemExit):
        main(["eval", str(run), "--base_url", mock.base_url])
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["seq", "floor", "0.00", "0.00"] in lines


# --- scorers of other packages ---------------------------------------------------------------------------------------

THEIRS = '''"""Length ratio: how long the answer is."""
HIGHER_IS_BETTER = False
RANGE = (0.0, 1000.0)


class Ratio:
    def score(self, pairs):
        return [100.0 * len(answer) / len(reference) for answer, reference in pairs]


def load(model):
    return Ratio()
'''


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """installed(name, code): an installed distribution whose entry point names a scorer module."""

    def do(name, code):
        site = tmp_path / "site"
        info = site / f"{name}-1.0.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[swift_cl.scorers]\n{name} = their_{name}\n")
        (site / f"their_{name}.py").write_text(code)
        monkeypatch.syspath_prepend(str(site))
        monkeypatch.delitem(sys.modules, f"their_{name}", raising=False)

    return do


def test_a_scorer_of_another_package_in_a_grid(make_run, installed, capsys):
    installed("length_ratio", THEIRS)
    run = make_run()
    with MockEndpoint(names(run), lambda m, q: REFERENCES[q[-1]["content"]] * 2) as mock:
        found = entry(go(run, mock, scorers=("length_ratio",)), "length_ratio")
    assert found["base"] == [200, 200]
    assert found["higher_is_better"] is False
    assert found["range"] == [0, 1000]
    with pytest.raises(SystemExit):
        main(["ls", "scorers", "--json"])
    listed = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    assert listed["length_ratio"]["direction"] == "lower is better"
    assert listed["length_ratio"]["range"] == [0, 1000]


@pytest.mark.parametrize(
    ("gives", "says"),
    [
        ("[0.0]", "gave 1 scores for"),
        ("[2000.0] * len(pairs)", "gave 2000.0, which is not within 0..1000"),
        ("[float('nan')] * len(pairs)", "gave nan, which is not within"),
    ],
)
def test_a_scorer_that_breaks_its_word_is_stopped(installed, gives, says):
    code = THEIRS.replace("[100.0 * len(answer) / len(reference) for answer, reference in pairs]", gives)
    installed("length_ratio", code)
    with pytest.raises(RunFailure, match=says):
        scorers.load("length_ratio").score([("a", "b"), ("c", "d")])


def test_a_score_that_is_missing_may_be_said(installed):
    code = "from swift_cl.evaluation.scorers import Unscored\n" + THEIRS.replace(
        "[100.0 * len(answer) / len(reference) for answer, reference in pairs]", "[Unscored('why') for _ in pairs]"
    )
    installed("length_ratio", code)
    assert scorers.load("length_ratio").score([("a", "b")]) == [Unscored("why")]


def test_ls_shows_range_direction_and_needs(capsys):
    with pytest.raises(SystemExit):
        main(["ls", "scorers", "--json"])
    listed = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    assert {name for name, row in listed.items() if row["direction"] == "lower is better"} == {"refusal_rate"}
    assert listed["similarity"]["range"] == [-100, 100]
    assert listed["bleu"]["needs"] == "extra scorers (sacrebleu)"
    assert "SWIFT_CL_JUDGE_BASE_URL" in listed["llm_judge"]["needs"]
    assert listed["label_choice"]["options"] == ["labels"]
    assert listed["bleu"]["cell"] == "corpus BLEU of the cell's answers"
    with pytest.raises(SystemExit):
        main(["ls", "scorers"])
    out = capsys.readouterr().out
    for name in scorers.names():
        assert name in out
