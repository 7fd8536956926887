"""Every benchmark starts by the command that stands in it."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import commands

ROOT = Path(__file__).resolve().parents[2]
COMMAND = re.compile(r"python -m (tests\.benchmarks\.\w+)")
FILES = [
    path
    for path in sorted(Path(__file__).parent.glob("[a-z]*.py"))
    if COMMAND.search(path.read_text()) and path != Path(__file__)
]


@pytest.mark.parametrize(
    "file", [path for path in FILES if path.name != Path(__file__).name], ids=lambda path: path.stem
)
def test_help(file: Path) -> None:
    own = f"tests.benchmarks.{file.stem}"
    assert set(COMMAND.findall(file.read_text())) == {own}
    # The path of the tests themselves would help a command that a user's shell cannot find.
    environment = {key: value for key, value in commands.environment().items() if key != "PYTHONPATH"}
    argv = [sys.executable, "-m", own, "--help"]
    done = subprocess.run(argv, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.startswith(f"usage: {file.name}")
