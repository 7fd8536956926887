"""Means, spreads and winners over runs: hand-worked numbers, and no mean over a hole."""

import json
import math

import pytest

from swift_cl.cli.main import main
from swift_cl.evaluation.metrics import Matrix, compute
from swift_cl.evaluation.statistics import Summary, bootstrap_interval, larger_is_better, summarise, winner


def test_mean_and_sample_deviation():
    """1, 2, 3, 6: mean 3; squared distances 4, 1, 0, 9 over 3 = 14/3."""
    found = summarise([1.0, 2.0, 3.0, 6.0])
    assert (found.n, found.missing, found.mean) == (4, 0, 3.0)
    assert found.std == pytest.approx(math.sqrt(14 / 3), abs=1e-12)
    assert 1.0 < found.low < 3.0 < found.high < 6.0


def test_interval_of_two_or_three_runs_is_their_range():
    """All draws from the lowest value alone have probability 1/27 (1/4 for two), more than 2.5 %."""
    assert bootstrap_interval([70.0, 64.0, 68.0]) == (64.0, 70.0)
    assert bootstrap_interval([1.0, 5.0]) == (1.0, 5.0)


def test_interval_of_four_runs_by_counting():
    """0, 0, 0, 4: the mean is the number of fours drawn, binomial(4, 1/4): P(0) = 0.316, P(<=2) = 0.949, P(<=3) =
    0.996, so the interval ends at 0 and 3."""
    assert bootstrap_interval([0.0, 0.0, 0.0, 4.0]) == (0.0, 3.0)


def test_interval_depends_on_the_seed_only_not_on_the_order():
    values = [61.0, 64.5, 66.0, 70.0, 71.5]
    assert bootstrap_interval(values) == bootstrap_interval(values[::-1])
    assert bootstrap_interval(values, confidence=0.5) != bootstrap_interval(values)
    low, high = bootstrap_interval(values)
    inner_low, inner_high = bootstrap_interval(values, confidence=0.5)
    assert low < inner_low < inner_high < high


def test_equal_values_have_no_width():
    assert summarise([4.0, 4.0, 4.0]) == Summary(3, 0, 4.0, 0.0, 4.0, 4.0)


def test_one_run_has_no_spread():
    assert summarise([5.0]) == Summary(1, 0, 5.0, None, None, None)


def test_nothing_is_averaged_over_a_hole():
    assert summarise([5.0, None, 7.0]) == Summary(3, 1, None, None, None, None)
    assert summarise([None, None]) == Summary(2, 2, None, None, None, None)


def spread(low, high):
    return Summary(3, 0, (low + high) / 2, 1.0, low, high)


@pytest.mark.parametrize(
    ("intervals", "larger", "expected"),
    [
        ({"a": (70, 72), "b": (60, 69)}, True, "a"),
        ({"a": (70, 72), "b": (60, 69)}, False, "b"),
        ({"a": (70, 72), "b": (60, 70)}, True, None),  # they touch
        ({"a": (70, 72), "b": (71, 71.5)}, True, None),
        ({"a": (70, 72), "b": (71, 75), "c": (1, 2)}, True, None),
        ({"a": (70, 72), "b": (71, 75), "c": (1, 2)}, False, "c"),
        ({"a": (70, 72)}, True, None),
    ],
)
def test_winner(intervals, larger, expected):
    assert winner({name: spread(*ends) for name, ends in intervals.items()}, larger) == expected


def test_no_winner_against_an_unknown_spread():
    assert winner({"a": spread(70, 72), "b": summarise([1.0])}, True) is None
    assert winner({"a": spread(70, 72), "b": summarise([1.0, None])}, True) is None


def test_directions():
    assert {m: larger_is_better(m, True) for m in ("avg_acc", "new_acc", "avg", "forgetting", "bwt", "fwt")} == {
        "avg_acc": True, "new_acc": True, "avg": True, "forgetting": False, "bwt": True, "fwt": True,
    }  # fmt: skip
    assert larger_is_better("avg_acc", False) is False
    assert larger_is_better("forgetting", False) is False
    assert larger_is_better("bwt", False) is True


# --- swift-cl compare ------------------------------------------------------------------------------------------------


def results(method, seed, last, order=("a", "b"), scorers=("similarity",), **changes):
    """A run whose last row is (last, 90) and whose diagonal is 80, 90, for tasks a and b in any order."""
    rows = ((80.0, 30.0), (last, 90.0))
    matrix = Matrix(tuple(order), rows, (10.0, 20.0))
    entry = {
        "higher_is_better": True, "base": [10.0, 20.0], "matrix": [list(row) for row in rows],
        "metrics": compute(matrix).as_json(),
    }  # fmt: skip
    return {
        "schema": 1, "benchmark": "news", "order": list(order), "method": method, "model": "m", "seed": seed,
        "answers": {"expected": [4, 4]}, "scorers": dict.fromkeys(scorers, entry), **changes,
    }  # fmt: skip


@pytest.fixture
def call(tmp_path, capsys):
    """call(results, ..., flags): exit code, standard output, standard error."""

    def do(*runs, flags=()):
        folders = []
        for number, value in enumerate(runs):
            folder = tmp_path / f"run{number}"
            folder.mkdir(exist_ok=True)
            (folder / "results.json").write_text(json.dumps(value))
            folders.append(str(folder))
        with pytest.raises(SystemExit) as done:
            main(["compare", *folders, *flags])
        captured = capsys.readouterr()
        return done.value.code, captured.out, captured.err

    return do


def test_compare_groups_over_seeds_and_orders(call):
    runs = [results("seq", 0, 40.0), results("seq", 1, 50.0), results("seq", 0, 60.0, order=("b", "a"))]
    runs += [results("replay", seed, last) for seed, last in ((0, 70.0), (1, 72.0), (2, 74.0))]
    code, out, err = call(*runs, flags=["--json"])
    assert (code, err) == (0, "")
    value = json.loads(out)
    found = value["scorers"]["similarity"]
    seq, replay = found["methods"]["seq"], found["methods"]["replay"]
    assert (seq["n"], seq["seeds"], seq["orders"]) == (3, 2, 2)
    assert (replay["n"], replay["seeds"], replay["orders"]) == (3, 3, 1)
    # avg_acc = (last + 90) / 2: 65, 70, 75 and 80, 81, 82
    assert seq["metrics"]["avg_acc"] == {"n": 3, "missing": 0, "mean": 70, "std": 5, "low": 65, "high": 75}
    assert replay["metrics"]["avg_acc"] == {"n": 3, "missing": 0, "mean": 81, "std": 1, "low": 80, "high": 82}
    # forgetting = 80 - last
    assert seq["metrics"]["forgetting"]["mean"] == 30
    assert found["winners"]["avg_acc"] == found["winners"]["forgetting"] == found["winners"]["bwt"] == "replay"
    assert found["winners"]["new_acc"] is None  # equal


def test_compare_prints_means_spreads_n_and_winners(call):
    runs = [results("seq", 0, 40.0), results("seq", 1, 50.0), results("replay", 0, 70.0), results("replay", 1, 74.0)]
    code, out, _ = call(*runs)
    assert code == 0
    lines = [line.split() for line in out.splitlines()]
    assert ["Avg.ACC", "seq", "2", "2", "1", "67.50", "±", "3.54", "[65.00,", "70.00]"] in lines
    assert ["Avg.ACC", "replay", "2", "2", "1", "81.00", "±", "1.41", "[80.00,", "82.00]", "*"] in lines
    assert ["Forgetting", "replay", "2", "2", "1", "8.00", "±", "2.83", "[6.00,", "10.00]", "*"] in lines
    assert ["New.ACC", "replay", "2", "2", "1", "85.00", "±", "0.00", "[85.00,", "85.00]"] in lines
    assert "the interval overlaps no other method's" in out


def test_overlap_marks_nobody(call):
    runs = [results("seq", 0, 40.0), results("seq", 1, 72.0), results("replay", 0, 70.0), results("replay", 1, 74.0)]
    code, out, _ = call(*runs, flags=["--json"])
    assert code == 0
    assert set(json.loads(out)["scorers"]["similarity"]["winners"].values()) == {None}


def test_a_hole_stays_null_and_is_exit_code_1(call):
    runs = [results("seq", 0, 40.0), results("seq", 1, None), results("replay", 0, 70.0), results("replay", 1, 74.0)]
    code, out, _ = call(*runs, flags=["--json"])
    assert code == 1
    found = json.loads(out)["scorers"]["similarity"]
    assert found["methods"]["seq"]["metrics"]["avg_acc"]["mean"] is None
    assert found["methods"]["seq"]["metrics"]["avg_acc"]["missing"] == 1
    assert found["methods"]["seq"]["metrics"]["new_acc"]["mean"] == 85
    assert found["winners"]["avg_acc"] is None
    assert any("run1" in line and "avg_acc needs cells that were not measured" in line for line in found["missing"])
    code, out, _ = call(*runs)
    assert code == 1
    assert "missing:" in out


def test_a_run_without_the_scorer_is_missing(call):
    runs = [results("seq", 0, 40.0, scorers=("similarity", "bleu")), results("seq", 1, 50.0)]
    code, out, _ = call(*runs, flags=["--json"])
    found = json.loads(out)["scorers"]
    assert code == 1
    assert found["bleu"]["methods"]["seq"]["metrics"]["avg_acc"]["mean"] is None
    assert "run1/results.json: no scores of bleu" in found["bleu"]["missing"][0]
    assert call(*runs, flags=["--scorer", "similarity"])[0] == 0


def test_one_task_is_undefined_but_no_hole(call):
    scorers = {"similarity": {"base": [1], "matrix": [[50.0]], "higher_is_better": True}}
    value = results("seq", 0, 40.0) | {"order": ["a"], "answers": {"expected": [4]}, "scorers": scorers}
    code, out, _ = call(value, flags=["--json"])
    assert code == 0
    assert json.loads(out)["scorers"]["similarity"]["methods"]["seq"]["metrics"]["forgetting"]["mean"] is None


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"benchmark": "other"}, "differ in the benchmark: news and other"),
        ({"model": "n"}, "differ in the base model: m and n"),
        ({"answers": {"expected": [4, 5]}}, "differ in the number of test questions"),
        ({"order": ["a", "c"]}, "differ in the set of tasks: a, b and a, c"),
        ({"seed": 0}, "one run must not count twice"),
        ({"schema": 2}, "not a results.json of schema 1"),
        ({"scorers": {}}, "'scorers' must be a non-empty object"),
    ],
)
def test_what_does_not_compare_is_one_line_and_exit_code_2(call, changes, says):
    code, out, err = call(results("seq", 0, 40.0), results("seq", 1, 50.0) | changes)
    assert (code, out) == (2, "")
    assert says in err
    assert len(err.strip().splitlines()) == 1


def test_the_content_of_a_base_model_counts_not_its_path(call):
    one, two = results("seq", 0, 40.0, model_id="x"), results("seq", 1, 50.0, model="elsewhere", model_id="x")
    assert call(one, two)[0] == 0
    code, _, err = call(one, two | {"model": "m", "model_id": "y"})
    assert code == 2
    assert "differ in the base model" in err


def test_unknown_scorer(call):
    code, _, err = call(results("seq", 0, 40.0), flags=["--scorer", "similarty"])
    assert code == 2
    assert "did you mean 'similarity'?" in err


def test_a_folder_given_twice_counts_once(call, tmp_path, capsys):
    call(results("seq", 0, 40.0))
    with pytest.raises(SystemExit) as done:
        main(["compare", str(tmp_path / "run0"), str(tmp_path / "run0") + "/", "--json"])
    assert done.value.code == 0
    assert json.loads(capsys.readouterr().out)["scorers"]["similarity"]["methods"]["seq"]["n"] == 1


def test_the_interval_does_not_hang_on_the_order_of_the_runs():
    values = [0.0, 3.0, 5.0, 6.0, 30.0]
    assert bootstrap_interval(values) == bootstrap_interval(values[::-1]) == bootstrap_interval(sorted(values, key=str))
