"""The results page is what its command writes, and a part's run file is one that its methods can be asked with."""

import dataclasses
from pathlib import Path

import pytest
import yaml

from swift_cl.methods.registry import get_method, methods
from tests.benchmarks.results.page import NOTES, PAGE, RESULTS, cells_of, page_text
from tests.benchmarks.results.parts import PARTS, fits
from tests.benchmarks.results_table import write_run


def test_page_is_that_of_the_cells() -> None:
    """Otherwise: python -m tests.benchmarks.results_table table."""
    assert PAGE.read_text() == page_text()


def test_every_cell_and_note_is_of_a_part_and_a_method() -> None:
    found = {(part.name, method) for part in PARTS.values() for method in cells_of(part.name)}
    assert len(found) == len(list(RESULTS.rglob("*.json")))
    assert all(method in methods() for _, method in found)
    assert NOTES.keys() <= found


@pytest.mark.parametrize("method", ["seq", "seq_star"])
def test_a_classifier_head_is_asked_about_classes(tmp_path: Path, method: str) -> None:
    part = dataclasses.replace(PARTS["news"], classes=True)
    file = write_run(tmp_path, part, tmp_path, method, 1e-3, dev=True)
    benchmark = yaml.safe_load((file.parent / "benchmark.yaml").read_text())
    assert ("scenario" in benchmark) == get_method(method).classifies == (method == "seq_star")
    assert fits(PARTS["news"], method) == (method == "seq")
