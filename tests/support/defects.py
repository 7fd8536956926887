"""Are the tests able to fail? Puts known defects into the code, one at a time, and expects a red test for each.

    python -m tests.support.defects                    every defect of tests/defects (some seconds each)
    python -m tests.support.defects ewc gem --jobs 2   those of two files
    python -m tests.support.defects --sample 20        a seeded sample of all

A file of tests/defects names a source file, the tests that guard it, and its defects: a text that stands in the source
exactly once and what a defective program would have there. The checkout is not touched: libraries are loaded once, a
child process is forked for each defect, and its import system reads the changed source. Tests that start programs of
their own (`slow`) would not see the defect, so they are not run. Exit code 1 if a defect stayed green, or if the tests
are red without any.
"""

import argparse
import contextlib
import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import CodeType, ModuleType

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
LISTS = ROOT / "tests" / "defects"
LIBRARIES = (
    "torch",
    "transformers",
    "peft",
    "datasets",
    "swift",
    "swift.arguments",
    "swift.trainers",
    "swift.template",
)
RED, GREEN = "red", "GREEN"
LONGEST = 600
"""Seconds that the tests of a defect may take: one that lets them run for ever is none that they find."""


@dataclass(frozen=True)
class Defect:
    """One wrong program.

    Attributes:
        group: the list it stands in.
        what: what is wrong, in words.
        file: the source file, from the root of the project.
        old, new: the text of the source, which occurs once, and what replaces it.
        tests: pytest's arguments: files or single tests.
    """

    group: str
    what: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]

    def source(self) -> str:
        """The defective source.

        Raises:
            ValueError: the text does not occur exactly once, or the defect is none.
        """
        text = (ROOT / self.file).read_text(encoding="utf-8")
        if text.count(self.old) != 1:
            raise ValueError(f"{self.group}: {self.what}: found {text.count(self.old)} times in {self.file}, not once")
        if self.old == self.new:
            raise ValueError(f"{self.group}: {self.what}: changes nothing")
        return text.replace(self.old, self.new)


def read_defects(groups: Sequence[str] = ()) -> list[Defect]:
    """The defects of the lists, all where none is named.

    Raises:
        ValueError: no such list.
    """
    files = {path.stem: path for path in sorted(LISTS.glob("*.yaml"))}
    if unknown := set(groups) - set(files):
        raise ValueError(f"no list {', '.join(sorted(unknown))}; there are {', '.join(files)}")
    defects = []
    for name in groups or files:
        value = yaml.safe_load(files[name].read_text(encoding="utf-8"))
        for entry in value["defects"]:
            tests = entry.get("tests", value["tests"])
            file = entry.get("file", value.get("file"))
            defects.append(Defect(name, entry["what"], file, entry["old"], entry["new"], tuple(tests)))
    return defects


class _Changed(importlib.machinery.SourceFileLoader):
    """Loads one module from a text in place of its file; never from or into a cache of compiled code."""

    def __init__(self, name: str, path: str, text: str) -> None:
        super().__init__(name, path)
        self.text = text

    def get_code(self, fullname: str) -> CodeType:
        return self.source_to_code(self.text.encode(), self.path)

    def get_source(self, fullname: str) -> str:
        return self.text


class _Finder(importlib.abc.MetaPathFinder):
    """Finds the defective module before the import system finds the file."""

    def __init__(self, name: str, path: Path, text: str) -> None:
        self.name, self.path, self.text = name, str(path), text

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != self.name:
            return None
        return importlib.util.spec_from_file_location(
            fullname, self.path, loader=_Changed(fullname, self.path, self.text)
        )


def put_in(defect: Defect) -> None:
    """From now on, imports of this process read the defective source."""
    name = defect.file.removesuffix(".py").replace("/", ".").removesuffix(".__init__")
    if name in sys.modules:
        raise RuntimeError(f"{name} is loaded already")
    sys.meta_path.insert(0, _Finder(name, ROOT / defect.file, defect.source()))


class _FirstFailure:
    """A pytest plugin that notes what turned red."""

    def __init__(self) -> None:
        self.test = ""

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed and not self.test:
            self.test = report.nodeid


def try_defect(defect: Defect, output: Path) -> tuple[str, str]:
    """Run the tests of a defect in a forked child, with its output in a file: (verdict, the test that turned red)."""
    defect.source()
    return _run(defect.tests, output, defect)


def _run(tests: Sequence[str], output: Path, defect: Defect | None) -> tuple[str, str]:
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        code, plugin = 70, _FirstFailure()
        signal.alarm(LONGEST)
        with contextlib.suppress(BaseException):
            stream = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(stream, 1)
            os.dup2(stream, 2)
            if defect is not None:
                put_in(defect)
            options = ["-x", "-q", "-m", "not slow and not gpu", "-p", "no:cacheprovider", "-p", "no:xdist"]
            code = int(pytest.main([*options, *tests], plugins=[plugin]))
            os.write(writer, plugin.test.encode())
        os._exit(code)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        test = pipe.read()
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    if code == pytest.ExitCode.TESTS_FAILED:
        return RED, test
    if code == pytest.ExitCode.OK:
        return GREEN, ""
    if code == -signal.SIGALRM:
        return f"NO END in {LONGEST} s", ""
    return f"NOT RUN (exit code {code})", ""


def _preload() -> None:
    for name in LIBRARIES:
        importlib.import_module(name)
    if loaded := [name for name in sys.modules if name.split(".")[0] == "swift_cl"]:
        raise RuntimeError(f"loaded before any defect could be put in: {', '.join(loaded)}")


def _not_red(defects: Sequence[Defect]) -> int:
    """Try them one after the other, a line each; how many did not turn red, or met tests that are red without them."""
    others = 0
    without: dict[tuple[str, ...], str] = {}
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "output"
        for defect in defects:
            if defect.tests not in without:
                without[defect.tests], test = _run(defect.tests, output, None)
                if without[defect.tests] != GREEN:
                    print(f"without any defect: {without[defect.tests]}  {test or ' '.join(defect.tests)}", flush=True)
            begin = time.monotonic()
            verdict, test = try_defect(defect, output)
            print(f"{verdict}  {defect.group}: {defect.what}  {test}  {time.monotonic() - begin:.1f} s", flush=True)
            if verdict.startswith("NOT RUN"):
                print(output.read_text(errors="replace")[-2000:], flush=True)
            others += (verdict, without[defect.tests]) != (RED, GREEN)
    return others


def main() -> int:
    """Try the defects and say which stayed green."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("lists", nargs="*", help="names of files in tests/defects; default: all")
    parser.add_argument("--sample", type=int, help="so many of them, drawn with --seed")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=1, help="processes (default 1)")
    args = parser.parse_args()
    try:
        defects = read_defects(args.lists)
        for defect in defects:
            defect.source()
    except ValueError as error:
        parser.error(str(error))
    if args.sample is not None:
        defects = random.Random(args.seed).sample(defects, min(args.sample, len(defects)))
    os.chdir(ROOT)
    _preload()
    children = []
    for job in range(1, args.jobs):
        child = os.fork()
        if child == 0:
            os._exit(int(_not_red(defects[job :: args.jobs]) > 0))
        children.append(child)
    failed = _not_red(defects[:: args.jobs]) > 0
    for child in children:
        failed |= os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) != 0
    print(
        "some defects did not turn red, or their tests are red anyway" if failed else f"{len(defects)} defects, all red"
    )
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
