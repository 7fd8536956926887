"""The lists of defects stay true as the code changes, and what tries them can tell red from green."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.defects import LISTS, ROOT, Defect, read_defects

DEFECTS = read_defects()


@pytest.mark.parametrize("name", sorted(path.stem for path in LISTS.glob("*.yaml")))
def test_every_defect_still_is_one(name: str) -> None:
    own = [defect for defect in DEFECTS if defect.group == name]
    assert own
    for defect in own:
        compile(defect.source(), defect.file, "exec")  # once in the source, and a program after it
        assert defect.tests, defect.what
        for test in defect.tests:
            assert (ROOT / test.split("::")[0]).exists(), f"{defect.what}: {test}"
    described = [defect.what for defect in own]
    assert len(set(described)) == len(described)


def test_a_defect_that_is_not_in_the_source_is_named() -> None:
    with pytest.raises(ValueError, match=r"seq: gone: found 0 times in swift_cl/methods/seq.py, not once"):
        Defect("seq", "gone", "swift_cl/methods/seq.py", "no such text", "", ("tests",)).source()
    with pytest.raises(ValueError, match=r"seq: none: changes nothing"):
        Defect("seq", "none", "swift_cl/methods/seq.py", "class Seq(", "class Seq(", ("tests",)).source()


TRY = """
import sys
from pathlib import Path
from tests.support.defects import Defect, try_defect

file, old, test = "swift_cl/methods/_selection.py", "if i is not None]", "tests/methods/test_selection.py"
for new in ("if i is not None][:]", "if i]", "if"):
    print(*try_defect(Defect("selection", "of the test", file, old, new, (test,)), Path(sys.argv[1])), sep="|")
"""


def test_red_green_and_neither_are_told_apart(tmp_path: Path) -> None:
    before = subprocess.run(["git", "status", "--short"], cwd=ROOT, capture_output=True, text=True).stdout
    done = subprocess.run(
        [sys.executable, "-c", TRY, str(tmp_path / "output")], cwd=ROOT, capture_output=True, text=True
    )
    green, red, neither = done.stdout.splitlines()
    assert green == "GREEN|"
    assert red.startswith("red|tests/methods/test_selection.py::test_")
    assert neither.startswith("NOT RUN (exit code ")
    assert subprocess.run(["git", "status", "--short"], cwd=ROOT, capture_output=True, text=True).stdout == before


BASELINE = """
import sys
from tests.support.defects import Defect, _not_red

defect = Defect("seq", "of the test", "swift_cl/methods/seq.py", "class Seq(", "class Other(", (sys.argv[1],))
print("others:", _not_red([defect]))
"""


def test_tests_that_are_red_anyway_prove_nothing(tmp_path: Path) -> None:
    (tmp_path / "test_red.py").write_text("def test_never_right():\n    assert False\n")
    command = [sys.executable, "-c", BASELINE, str(tmp_path / "test_red.py")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    first, verdict, others = done.stdout.splitlines()
    assert first.startswith("without any defect: red  ")
    assert first.endswith("test_red.py::test_never_right")
    assert verdict.startswith("red  seq: of the test")
    assert others == "others: 1"


def test_a_list_that_is_not_there_is_named() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.defects", "ewx"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert "no list ewx; there are " in done.stderr
