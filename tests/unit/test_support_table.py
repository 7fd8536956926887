"""The README's table of methods is what `swift-cl ls methods --markdown` prints, and that is what methods declare."""

from pathlib import Path

import pytest

from swift_cl.cli.ls import zero_text
from swift_cl.cli.main import build_parser
from swift_cl.cli.methods_table import COLUMNS, methods_table
from swift_cl.errors import UserError
from swift_cl.methods.base import Method, Support
from swift_cl.methods.registry import methods
from tests.conftest import ROOT
from tests.support import engine_cells


def test_the_readme_holds_the_table() -> None:
    """After a change: `swift-cl ls methods --markdown`, pasted in its place."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert f"\n\n{methods_table()}\n\n" in readme
    assert readme.count("| method | what it does |") == 1


def test_the_command_prints_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    args = build_parser().parse_args(["ls", "methods", "--markdown"])
    assert args.run(args) == 0
    assert capsys.readouterr().out == methods_table() + "\n"
    args = build_parser().parse_args(["ls", "tuners", "--markdown"])
    with pytest.raises(UserError, match="--markdown prints the table of methods only"):
        args.run(args)


def test_every_row_is_whole() -> None:
    """A row a method, a cell a column: a `|` or a line break in a declaration would shift the cells."""
    head, line, *rows = methods_table().splitlines()
    assert len(rows) == len(methods())
    assert {row.count("|") for row in (head, line, *rows)} == {len(COLUMNS) + 1}


@pytest.mark.parametrize("method", sorted(methods()))
def test_the_row_is_what_the_method_declares(method: str) -> None:
    (row,) = [line for line in methods_table().splitlines() if line.startswith(f"| `{method}` |")]
    cells = dict(zip(COLUMNS, (cell.strip() for cell in row.strip("|").split(" | ")), strict=True))
    found = methods()[method]
    assert cells["tuners"].split(", ") == list(found.support.tuners)
    assert cells["DeepSpeed ZeRO"] == zero_text(found.support)
    assert cells["FSDP2"].startswith("yes" if found.support.fsdp else "no")
    assert ("full" in cells["FSDP2"]) == (
        "full" in found.support.tuners and found.support.full_fsdp != found.support.fsdp
    )
    assert cells["what it does"] == found.summary != ""
    assert cells["extra cost per step"] == found.cost != ""
    assert cells["page"] == f"[{method}](assets/methods/{method}.md)"


@pytest.mark.parametrize("method", sorted(methods()))
def test_what_it_sends_is_stated(method: str) -> None:
    """On its page and in the table of assets/distributed.md; tests/integration/test_two_processes.py counts it."""
    page = (ROOT / "assets" / "methods" / f"{method}.md").read_text(encoding="utf-8")
    cost = page.partition("\n## Cost\n")[2].partition("\n## ")[0]
    assert "Between processes a step sends " in cost
    sent = (ROOT / "assets" / "distributed.md").read_text(encoding="utf-8").partition("## What is sent")[2]
    table = sent.partition("**Under ZeRO")[0]
    rows = [row for row in table.splitlines() if row.startswith("| `") and f"`{method}`" in row.split("|")[1]]
    assert len(rows) == 1


def test_a_plug_in_that_states_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    class Plain(Method):
        name, title = "plain", "Plain"

    monkeypatch.setattr("swift_cl.cli.methods_table.methods", lambda: {"plain": Plain})
    row = methods_table().splitlines()[2]
    assert row == f"| `plain` | Plain | lora, full | 0-3 | yes | not stated | `{__name__}` |"


def test_cells_that_ran_are_compared_with_the_declarations(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(engine_cells, "FILE", tmp_path / "cells.json")
    monkeypatch.setattr(engine_cells, "declared", lambda: ["ddp ewc", "zero2 ewc", "zero3 ewc"])
    test = "tests/distributed/test_engines.py::test_two_processes_equal_one[zero2-ewc]"
    engine_cells.note("tests/integration/test_two_processes.py::test_two_processes_equal_one[ewc]", "passed")
    engine_cells.note(test, "passed")
    engine_cells.note("tests/unit/test_io.py::test_a[zero3-ewc]", "passed")
    assert engine_cells.main(["--check"]) == 1
    assert capsys.readouterr().out.splitlines()[1:] == ["  zero3 ewc: not run"]
    engine_cells.note(test.replace("zero2", "zero3"), "passed")
    assert engine_cells.main(["--check"]) == 0
    engine_cells.note(test, "failed")
    assert engine_cells.main(["--check"]) == 1
    monkeypatch.setattr(engine_cells, "commit", lambda: "another")
    assert engine_cells.main([]) == 0
    assert "0 of 3 declared cells passed at another" in capsys.readouterr().out


def test_text() -> None:
    assert zero_text(Support()) == "0-3"
    assert zero_text(Support(deepspeed=())) == "no (full: 0-3)"
    assert zero_text(Support(tuners=("lora",), deepspeed=(0, 1, 2), zero0_low_precision=False)) == "0 (fp32), 1-2"
    assert zero_text(Support(full_deepspeed=(0,))) == "0-3 (full: 0)"
    assert zero_text(Support(deepspeed=(0, 2), full_deepspeed=())) == "0, 2 (full: no)"
