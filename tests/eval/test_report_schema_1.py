"""A run folder of the first version of results.json opens, with every number that it had."""

import json
import re
import shutil
from pathlib import Path

import pytest

from swift_cl.cli.main import main
from swift_cl.evaluation.results import RESULTS_SCHEMA
from swift_cl.io import read_jsonl
from tests.conftest import ROOT

FIXTURE = ROOT / "tests" / "data" / "run_schema_1" / "seq"
ORDER = ["2022", "2023", "2024", "2025"]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return Path(shutil.copytree(FIXTURE, tmp_path / "seq"))


def report(run: Path) -> int:
    with pytest.raises(SystemExit) as done:
        main(["report", str(run)])
    return int(done.value.code or 0)


def test_report_of_a_run_of_schema_1(run, capsys):
    assert report(run) == 0
    out = capsys.readouterr().out
    assert ["seq", "after", "2023", "0.00", "88.89", "0.00", "0.00"] in [line.split() for line in out.splitlines()]
    markdown = (run / "report.md").read_text()
    assert "| seq | after 2024 | 32.71 | 34.17 | 80.67 | 29.24 |" in markdown
    # By hand: exact_match has (100, 88.89, 71.43, 100) on the diagonal and (0, 0, 0, 100) in the last row.
    assert "| seq | 25.00 | 86.77 | 90.08 | -86.77 | 0.00 | 48.31 |" in markdown
    assert "Each cell rests on n = 6 to 9 answers" in markdown
    assert "| stage_2_2023 | 96 | 8 | 96 | 0.2237 | 11.9 | 1 | 1.01e+12 | 371398c38d91 |" in markdown
    assert "--cl_task 2023" in markdown


def test_its_matrix_is_what_its_answers_say(run):
    """Exact match, counted here from the stored answers, is what the report's CSV holds."""
    report(run)
    lines = [line.split(",") for line in (run / "matrix-exact_match.csv").read_text().splitlines()]
    assert lines[0] == ["model", *ORDER]
    for line, row in zip(lines[1:], ["base", *(f"stage_{i}_{t}" for i, t in enumerate(ORDER, start=1))], strict=True):
        for cell, task in zip(line[1:], ORDER, strict=True):
            rows = read_jsonl(run / "answers" / row / f"{task}.jsonl")
            right = sum(entry["answer"] == entry["reference"] for entry in rows)
            assert float(cell) == pytest.approx(100 * right / len(rows)), (row, task)


def test_its_questions_are_in_the_page(run):
    report(run)
    html = (run / "report.html").read_text()
    data = json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', html, re.DOTALL)[1])
    assert len(data["questions"]) == 7 + 9 + 7 + 6
    assert data["scorers"] == []
    assert "The run has no scores of single answers" in html
    task, sample, turn, question, reference, answers = data["questions"][0][:6]
    assert (data["tasks"][task], sample, turn) == ("2022", "2022-test-0001", 0)
    assert data["texts"][question] == "Where did the talks about the Gorsund border dispute take place in 2022?"
    assert data["texts"][reference] == "Pillow Farm"
    rows = ("base", "stage_1_2022", "stage_2_2023", "stage_3_2024", "stage_4_2025")
    stored = [
        next(entry["answer"] for entry in read_jsonl(run / "answers" / row / "2022.jsonl") if entry["id"] == sample)
        for row in rows
    ]
    assert [data["texts"][position] for position in answers[0]] == stored
    assert stored[1] == "Pillow Farm"


def test_metrics_of_its_csv_are_those_of_the_run(run, capsys):
    report(run)
    capsys.readouterr()
    with pytest.raises(SystemExit):
        main(["metrics", str(run / "matrix-similarity.csv"), "--json"])
    found = json.loads(capsys.readouterr().out)
    kept = json.loads((run / "results.json").read_text())["scorers"]["similarity"]["metrics"]
    assert {name: found[name] for name in kept} == pytest.approx(kept)


def test_results_of_a_later_schema_are_refused_in_one_line(run, capsys):
    value = json.loads((run / "results.json").read_text()) | {"schema": RESULTS_SCHEMA + 1}
    (run / "results.json").write_text(json.dumps(value))
    assert report(run) == 2
    error = capsys.readouterr().err.strip()
    assert "\n" not in error
    assert error.endswith(
        f"{run / 'results.json'}: results of schema {RESULTS_SCHEMA + 1}, this version of swift_cl reads up to "
        f"{RESULTS_SCHEMA}; update swift_cl to open it"
    )
    assert not (run / "report.html").exists()
