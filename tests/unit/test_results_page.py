"""The results page is what its command writes, and a part's run file is one that its methods can be asked with."""

import dataclasses
import json
from pathlib import Path
from statistics import fmean

import pytest
import yaml

from swift_cl.methods.registry import get_method, methods
from tests.benchmarks.results.page import NOTES, PAGE, RESULTS, cells_of, page_text, ratio
from tests.benchmarks.results.parts import PARTS, SHARED, fits, write_benchmark
from tests.benchmarks.results.settings import SETTINGS, SHARE, flags_of
from tests.benchmarks.results.warm_base import examples
from tests.benchmarks.results_table import write_run


def test_page_is_that_of_the_cells() -> None:
    """Otherwise: python -m tests.benchmarks.results_table table."""
    assert PAGE.read_text() == page_text()


def test_a_time_that_is_not_known_is_a_dash() -> None:
    cells = {"seq": {"cpu_seconds": 50.0}, "gem": {"cpu_seconds": 75.0}, "ssr": {"cpu_seconds": None}}
    assert [ratio(cells, name, "cpu_seconds") for name in ("gem", "ssr")] == ["1.50x", "-"]
    assert ratio({**cells, "seq": {"cpu_seconds": None}}, "gem", "cpu_seconds") == "-"


def test_every_cell_and_note_is_of_a_part_and_a_method() -> None:
    found = {(part.name, method) for part in PARTS.values() for method in cells_of(part.name)}
    assert len(found) == len(list(RESULTS.rglob("*.json")))
    assert all(method in methods() for _, method in found)
    assert {(part, method) for part, notes in NOTES.items() for method in notes} <= found


def test_a_method_that_is_below_seq_has_a_reason() -> None:
    for part in PARTS:
        mean = {method: fmean(cell["metrics"]["avg_acc"]) for method, cell in cells_of(part).items()}
        below = {method for method in mean if mean[method] < mean.get("seq", 0.0)}
        assert below <= NOTES.get(part, {}).keys(), f"{part}: look into it, then tests/benchmarks/results/notes.yaml"


@pytest.mark.parametrize("method", ["seq", "seq_star"])
def test_a_classifier_head_is_asked_about_classes(tmp_path: Path, method: str) -> None:
    part = dataclasses.replace(PARTS["news"], classes=True)
    file = write_run(tmp_path, part, tmp_path, method, 1e-3, dev=True)
    benchmark = yaml.safe_load((file.parent / "benchmark.yaml").read_text())
    assert ("scenario" in benchmark) == get_method(method).classifies == (method == "seq_star")
    assert fits(PARTS["news"], method) == (method == "seq")


@pytest.mark.parametrize("part", PARTS)
def test_all_that_name_rehearsed_rows_name_the_same_share(part: str) -> None:
    rows = PARTS[part].rows
    assert flags_of("pseudo_replay", rows)["pseudo_replay_num_samples"] == round(SHARE * rows)
    assert flags_of("ssr", rows)["ssr_ratio"] == SHARE
    assert not any("num_samples" in value for value in SETTINGS.values())


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs the shared bench")
@pytest.mark.parametrize("dev", [True, False])
def test_the_base_that_continues_lists_has_seen_no_row_of_its_part(tmp_path: Path, dev: bool) -> None:
    write_benchmark(PARTS["lists"], tmp_path, dev)
    used = [row["messages"] for file in tmp_path.glob("*.json") for row in json.loads(file.read_text())]
    questions = [message["content"] for row in used for message in row if message["role"] == "user"]
    assert len(questions) >= (2 if dev else 4) * PARTS["lists"].rows
    _, asked = examples()
    assert len(asked) == 4
    listed = {f"{definition}\n{x}" for definition, pairs in asked.items() for x, _ in pairs}
    assert not [question for question in questions if any(question.startswith(seen + "\n") for seen in listed)]
