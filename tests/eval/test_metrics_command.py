"""`swift-cl metrics FILE`: what it prints, and one line and an exit code for what it cannot read."""

import json

import pytest

from swift_cl.cli.main import main

GOOD = {"order": ["a", "b"], "base": [10, 20], "matrix": [[80, 30], [60, 90]]}


def call(capsys, *argv):
    with pytest.raises(SystemExit) as exit_info:
        main(["metrics", *argv])
    captured = capsys.readouterr()
    return exit_info.value.code, captured.out, captured.err


def write(tmp_path, content, name="m.json"):
    path = tmp_path / name
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return str(path)


def test_json_object(tmp_path, capsys):
    code, out, _ = call(capsys, write(tmp_path, GOOD), "--json")
    assert code == 0
    assert json.loads(out) == {
        "avg_acc": 75, "forgetting": 20, "new_acc": 85, "bwt": -20, "fwt": 10, "last": 75, "avg": 77.5,
    }  # fmt: skip


def test_text_names_every_metric(tmp_path, capsys):
    code, out, _ = call(capsys, write(tmp_path, GOOD))
    assert code == 0
    for name in ("Avg.ACC", "Forgetting", "New.ACC", "BWT", "FWT", "Last", "Avg"):
        assert name in out
    assert "positive = worse" in out


@pytest.mark.parametrize("csv", ["a,b\n10,20\n80,30\n60,90\n", "a,b\nbase,10,20\nx,80,30\ny,60,90\n"])
def test_csv_base_row(tmp_path, capsys, csv):
    if "base" not in csv:
        csv = csv.replace("10,20", "base,10,20")
    code, out, _ = call(capsys, write(tmp_path, csv, "m.csv"), "--json")
    assert code == 0
    assert json.loads(out)["fwt"] == 10


@pytest.mark.parametrize(
    "csv", ["a,b\n80,30\n60,90\n", "stage,a,b\nafter a,80,30\nafter b,60,90\n", "\ufeffa,b\r\n80,30\r\n60,90\r\n"]
)
def test_csv_without_base(tmp_path, capsys, csv):
    code, out, _ = call(capsys, write(tmp_path, csv, "m.csv"), "--json")
    assert code == 0
    assert json.loads(out)["avg_acc"] == 75
    assert json.loads(out)["fwt"] is None


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("m.json", {**GOOD, "matrix": [[80, 30], [None, 90]]}),
        ("m.csv", "a,b\n80,30\n,90\n"),
        ("m.csv", "a,b\n80,30\n-,90\n"),
    ],
)
def test_a_hole_is_null_and_exit_code_1(tmp_path, capsys, name, content):
    code, out, _ = call(capsys, write(tmp_path, content, name), "--json")
    value = json.loads(out)
    assert code == 1
    assert value["avg_acc"] is None
    assert value["forgetting"] is None
    assert value["new_acc"] == 85
    assert value["missing_cells"]["avg_acc"] == [[2, 1]]


def test_one_task_is_no_hole(tmp_path, capsys):
    code, out, _ = call(capsys, write(tmp_path, {"order": ["a"], "matrix": [[50]]}), "--json")
    assert code == 0
    assert json.loads(out)["forgetting"] is None
    assert json.loads(out)["undefined"]["forgetting"] == "undefined for T = 1"


def test_results_file_with_two_scorers(tmp_path, capsys):
    hole = {"base": [1, 2], "matrix": [[None, 2], [3, 4]]}
    value = {"schema": 1, "order": ["a", "b"], "scorers": {"s": GOOD, "t": hole}}
    path = write(tmp_path, value, "results.json")
    code, out, _ = call(capsys, path, "--json")
    assert code == 1
    assert json.loads(out)["avg_acc"] == 75
    assert json.loads(out)["scorers"]["t"]["new_acc"] is None
    assert call(capsys, path, "--scorer", "s")[0] == 0
    assert call(capsys, str(tmp_path), "--scorer", "s")[0] == 0
    code, _, err = call(capsys, path, "--scorer", "u")
    assert code == 2
    assert "no scorer 'u', found: s, t" in err


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("m.json", "{", "not valid JSON"),
        ("m.json", "[]", "expected a JSON object"),
        ("m.json", {"matrix": [[1]]}, "'order' must be"),
        ("m.json", {"schema": 1, "runs": []}, "holds several runs"),
        ("m.json", {"order": ["a"]}, "'matrix' must be a list"),
        ("m.json", {**GOOD, "matrix": [[80, 30]]}, "1 rows for 2 tasks"),
        ("m.json", {**GOOD, "matrix": [[80, 30], [60]]}, "row 2 has 1 cells, expected 2"),
        ("m.json", {**GOOD, "matrix": [[80, "x"], [60, 1]]}, "row 1, task 'b': 'x' is not a number"),
        ("m.json", {**GOOD, "matrix": [[80, True], [60, 1]]}, "True is not a number"),
        ("m.json", '{"order": ["a"], "matrix": [[NaN]]}', "nan is not a number"),
        ("m.json", {**GOOD, "base": [1]}, "base row has 1 cells"),
        ("m.json", {**GOOD, "base": [1, "y"]}, "base row, task 'b'"),
        ("m.json", {"order": ["a"], "scorers": {}}, "'scorers' must be a non-empty object"),
        ("m.csv", "a,b\n", "expected a header"),
        ("m.csv", "", "expected a header"),
        ("m.csv", "a,b\n80,30\n60\n", "row 2 has 1 cells, expected 2"),
        ("m.csv", "a,b\n80,30\n60,90,70\n", "row 2 has 3 cells, expected 2"),
        ("m.csv", "a,b\n80,30\n", "1 rows for 2 tasks"),
        ("m.csv", "a,b\n80,x\n60,90\n", "row 1, task 'b': 'x' is not a number"),
        ("m.csv", "a,b\n80,inf\n60,90\n", "'inf' is not a number"),
        ("m.csv", "a,b\nx,80,30\nbase,60,90\n", "the base row must be the first"),
    ],
)
def test_malformed_input_is_one_line_and_exit_code_2(tmp_path, capsys, name, content, says):
    path = write(tmp_path, content, name)
    code, out, err = call(capsys, path)
    assert code == 2
    assert out == ""
    assert says in err
    assert path in err
    assert len(err.strip().splitlines()) == 1


def test_missing_file(tmp_path, capsys):
    code, _, err = call(capsys, str(tmp_path / "none.json"))
    assert code == 2
    assert "file not found" in err
