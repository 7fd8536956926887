"""Reports show the numbers of results.json, `-` where there is none, and the direction of the scorer."""

import json

import pytest

from swift_cl.cli.main import main
from swift_cl.evaluation.metrics import Matrix, compute
from swift_cl.report.files import write_reports
from swift_cl.report.text import render_text


def results(method="seq", hole=False, higher=True, name="run"):
    rows = ((80.0, 30.0), (None if hole else 60.0, 90.0))
    matrix = Matrix(("2022", "2023"), rows, (10.0, 20.0))
    return {
        "schema": 1, "benchmark": "news", "order": ["2022", "2023"], "method": method, "model": "m", "backend": "pt",
        "seed": 42, "name": name,
        "scorers": {
            "similarity": {
                "higher_is_better": higher,
                "base": [10.0, 20.0],
                "matrix": [list(row) for row in rows],
                "n": [[4, 4], [4, 4]],
                "metrics": compute(matrix, higher).as_json(),
            }
        },
        "problems": ["stage_2_2023 x 2022: 1 of 4 answers missing (1 x HTTP 500)"] if hole else [],
    }  # fmt: skip


def save(folder, value):
    folder.mkdir()
    (folder / "results.json").write_text(json.dumps(value))
    return folder


def test_text_has_every_row_and_the_metrics_side_by_side():
    text = render_text([results("seq"), results("replay")])
    lines = [line.split() for line in text.splitlines()]
    for method in ("seq", "replay"):
        assert [method, "base", "10.00", "20.00"] in lines
        assert [method, "after", "2022", "80.00", "30.00"] in lines
        assert [method, "after", "2023", "60.00", "90.00"] in lines
        assert [method, "75.00", "20.00", "85.00", "-20.00", "10.00", "77.50"] in lines
    assert "Avg.ACC" in text
    assert "higher is better" in text


def test_null_is_a_dash_with_a_note():
    text = render_text([results(hole=True)])
    lines = [line.split() for line in text.splitlines()]
    assert ["seq", "after", "2023", "-", "90.00"] in lines
    assert "-: not measured, never counted as 0" in text
    assert "1 of 4 answers missing" in text
    assert ["seq", "-", "-", "85.00", "-", "10.00", "-"] in lines


def test_direction_is_respected():
    text = render_text([results(higher=False)])
    assert "lower is better" in text
    assert "higher is better" not in text


def test_files_of_one_run(tmp_path):
    run = save(tmp_path / "run", results())
    _, folder = write_reports([run])
    assert folder == run
    markdown = (run / "report.md").read_text()
    assert "| seq | after 2023 | 60.00 | 90.00 |" in markdown
    assert "(max_{i<=j<T} R[j,i] - R[T,i])" in markdown
    html = (run / "report.html").read_text()
    assert "<td>77.50</td>" in html
    for name in ("matrix.png", "matrix-similarity.png"):
        assert (run / name).read_bytes().startswith(b"\x89PNG")
    assert (run / "matrix-similarity.csv").read_text().splitlines() == [
        "model,2022,2023", "base,10.0,20.0", "after 2022,80.0,30.0", "after 2023,60.0,90.0"
    ]  # fmt: skip


def test_files_of_a_comparison(tmp_path):
    runs = [save(tmp_path / "a", results("seq")), save(tmp_path / "b", results("replay", hole=True))]
    _, folder = write_reports(runs)
    assert folder == tmp_path.resolve()
    assert [entry["method"] for entry in json.loads((folder / "results.json").read_text())["runs"]] == ["seq", "replay"]
    assert "| replay | after 2023 | - | 90.00 |" in (folder / "report.md").read_text()
    assert (folder / "matrix.png").is_file()
    _, folder = write_reports(runs, tmp_path / "out")
    assert {path.name for path in folder.iterdir()} == {
        "report.md", "report.html", "results.json", "matrix.png", "matrix-similarity.png", "matrix-similarity.csv"
    }  # fmt: skip
    lines = (folder / "matrix-similarity.csv").read_text().splitlines()
    assert lines[0] == "run,stage,model,task,n,score"
    assert "seq,2,after 2023,2022,4,60.0" in lines
    assert "replay,2,after 2023,2022,4," in lines


def test_names_tell_runs_of_one_method_apart():
    text = render_text([results("seq", name="one"), results("seq", name="two")])
    assert "seq (one)" in text
    assert "seq (two)" in text


def test_html_is_escaped(tmp_path):
    run = save(tmp_path / "run", results("<script>alert(1)"))
    write_reports([run])
    assert "<script>alert" not in (run / "report.html").read_text()


@pytest.mark.parametrize(("content", "says"), [("{}", "not a results.json of schema 1"), ("x", "not valid JSON")])
def test_bad_results_file(tmp_path, capsys, content, says):
    (tmp_path / "results.json").write_text(content)
    with pytest.raises(SystemExit) as done:
        main(["report", str(tmp_path)])
    assert done.value.code == 2
    assert says in capsys.readouterr().err


def test_report_command(tmp_path, capsys):
    whole, broken = save(tmp_path / "a", results()), save(tmp_path / "b", results(hole=True))
    for folder, code in ((whole, 0), (broken, 1)):
        with pytest.raises(SystemExit) as done:
            main(["report", str(folder)])
        assert done.value.code == code
        assert "report.html" in capsys.readouterr().out


def over_seeds(tmp_path):
    """seq with Avg.ACC 70 and 80 (seeds 1 and 2), replay with 90 and 95: intervals [70, 80] and [90, 95]."""
    runs = []
    for method, values in (("seq", (70.0, 80.0)), ("replay", (90.0, 95.0))):
        for seed, value in enumerate(values, start=1):
            found = results(method, name=f"{method}{seed}") | {"seed": seed}
            rows = ((value, value), (value, value))
            scored = found["scorers"]["similarity"]
            scored["matrix"] = [list(row) for row in rows]
            scored["metrics"] = compute(Matrix(("2022", "2023"), rows, (10.0, 20.0)), True).as_json()
            runs.append(save(tmp_path / found["name"], found))
    return runs


def test_runs_of_a_method_are_averaged_and_a_clear_winner_is_marked(tmp_path, capsys):
    runs = over_seeds(tmp_path)
    with pytest.raises(SystemExit) as done:
        main(["report", *map(str, runs)])
    assert done.value.code == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["Avg.ACC", "replay", "2", "2", "1", "92.50", "±", "3.54", "[90.00,", "95.00]", "*"] in lines
    assert ["Avg.ACC", "seq", "2", "2", "1", "75.00", "±", "7.07", "[70.00,", "80.00]"] in lines
    markdown = (tmp_path / "report.md").read_text()
    assert "## Over seeds and orders: similarity, higher is better" in markdown
    assert "| Avg.ACC | replay | 2 | 2 | 1 | 92.50 ± 3.54 | [90.00, 95.00] | * |" in markdown
    html = (tmp_path / "report.html").read_text()
    assert '<td class="best">92.50 ± 3.54<sup>*</sup><small>[90.00, 95.00]</small></td>' in html
    assert "<small>runs: 2, seeds: 2, orders: 1</small>" in html


def test_runs_that_do_not_compare_are_not_averaged(tmp_path, capsys):
    """The same method, seed and order twice: the report shows both, and says why it has no mean."""
    runs = [save(tmp_path / "a", results(name="a")), save(tmp_path / "b", results(name="b"))]
    with pytest.raises(SystemExit) as done:
        main(["report", *map(str, runs)])
    assert done.value.code == 0
    assert "not averaged over runs:" in capsys.readouterr().out
    for file in ("report.md", "report.html"):
        text = (tmp_path / file).read_text()
        assert "one run must not count twice" in text
        assert "Over seeds and orders" not in text
