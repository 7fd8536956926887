"""What holds for the repository as a whole: no pickle, no machine's paths, imports one way, a page a method."""

import ast
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from swift_cl.evaluation import scorers
from swift_cl.methods.base import flags_of
from swift_cl.methods.registry import methods
from tests.conftest import ROOT
from tests.support.method_pages import flag_table

PACKAGE = ROOT / "swift_cl"
MAX_LINES = 400


def project_files() -> list[Path]:
    """Every file of the project: tracked, or not yet tracked and not ignored."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode != 0:
        pytest.skip("not a git checkout")
    return [path for name in listed.stdout.split("\0") if name and (path := ROOT / name).is_file()]


def grep(pattern: str, paths: list[Path]) -> list[str]:
    """`path:line: text` of every line that matches."""
    found = []
    for path in paths:
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        for number, line in enumerate(text.splitlines(), start=1):
            if re.search(pattern, line):
                found.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()[:100]}")
    return found


def python_files() -> list[Path]:
    return [path for path in project_files() if path.suffix == ".py"]


def imports(path: Path) -> Iterator[str]:
    """Modules that a file imports, at its top or anywhere in it; `from a import b` also as `a.b`."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield str(node.module)
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_the_checks_see_the_project() -> None:
    names = {str(path.relative_to(ROOT)) for path in project_files()}
    assert {"setup.py", "swift_cl/io.py", "train/common.sh", "tests/unit/test_repository.py"} <= names


def test_nothing_pickles() -> None:
    banned = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
    assert [(path, name) for path in python_files() for name in imports(path) if name.split(".")[0] in banned] == []
    calls = grep(r"torch\.(load|save)\(|allow_pickle\s*=\s*True|\bread_pickle\(", python_files())
    assert [line for line in calls if "weights_only=True" not in line and "test_repository.py" not in line] == []


def test_no_paths_of_a_machine() -> None:
    # Put together here, so that this file does not match itself.
    folders = "|".join(f"/{name}/" for name in ("work", "root", r"home/\w+", r"Users/\w+", "mnt/data"))
    assert grep(rf"(^|[^\w.~$}}/-])({folders})", project_files()) == []


def test_no_conflict_markers_or_tabs() -> None:
    assert grep(r"^(<{7}|>{7}|={7}$)", project_files()) == []
    assert grep(r"\t", [p for p in project_files() if p.suffix in (".py", ".sh", ".yaml", ".toml")]) == []


def test_files_are_small() -> None:
    sizes = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in PACKAGE.rglob("*.py")}
    assert {str(path): size for path, size in sizes.items() if size > MAX_LINES} == {}


# --- imports point one way: cli -> workflow -> training, serving, ... -> methods, tuners, stream -> distributed, io ---

FOUNDATION = {"errors", "io", "lazy", "distributed", "stages", "settings", "sentence_encoder", "progress", "__init__"}
ALLOWED = {
    "generation": set(),
    "models": set(),
    "methods": {"generation", "tuners"},  # a method may stand on a tuner of ours, never the other way
    "tuners": set(),
    "stream": set(),
    "training": {"methods", "tuners", "stream", "generation"},
    "serving": {"methods", "models", "tuners", "stream"},
    "evaluation": {"stream", "serving"},
    "probing": {"methods", "stream", "serving", "evaluation"},
    "report": {"evaluation"},
    "doctor": {"training"},
    "workflow": {"methods", "models", "tuners", "stream", "training", "serving", "evaluation", "report"},
    "cli": {
        "methods",
        "models",
        "tuners",
        "stream",
        "training",
        "serving",
        "evaluation",
        "probing",
        "report",
        "workflow",
        "doctor",
    },
}


def room(path: Path) -> str:
    first = path.relative_to(PACKAGE).parts[0]
    return first.removesuffix(".py")


def rooms_that_it_imports(path: Path) -> set[str]:
    parts = [name.split(".") for name in imports(path) if name.startswith("swift_cl.")]
    return {part for _, part, *_ in parts if (PACKAGE / part).is_dir() or (PACKAGE / f"{part}.py").is_file()}


def test_every_room_has_its_rule() -> None:
    assert {room(path) for path in PACKAGE.rglob("*.py")} == FOUNDATION | ALLOWED.keys()


@pytest.mark.parametrize("name", sorted(ALLOWED))
def test_imports_point_one_way(name: str) -> None:
    for path in PACKAGE.rglob("*.py"):
        if room(path) == name:
            extra = rooms_that_it_imports(path) - FOUNDATION - ALLOWED[name] - {name}
            assert not extra, f"{path.relative_to(ROOT)} imports {extra}"


def test_the_foundation_imports_no_room() -> None:
    for path in PACKAGE.glob("*.py"):
        if room(path) in FOUNDATION:
            assert rooms_that_it_imports(path) <= FOUNDATION, path


def test_only_one_place_knows_deepspeed() -> None:
    """`if zero_stage` outside distributed/ is a sign that a room has gone wrong."""
    using = [path for path in PACKAGE.rglob("*.py") if any(n.split(".")[0] == "deepspeed" for n in imports(path))]
    assert {room(path) for path in using} == {"distributed"}


def test_no_method_is_named_outside_its_file() -> None:
    names = "|".join(methods())
    lines = grep(
        rf"(method|name|cl_method)\s*(==|!=|in)\s*[\(\[\{{]?\s*[\"'](?:{names})[\"']", list(PACKAGE.rglob("*.py"))
    )
    assert lines == []


# --- one page a method, one file a scorer ----------------------------------------------------------------------------


def built_in() -> list[str]:
    return [name for name, method in methods().items() if method.__module__.startswith("swift_cl.methods.")]


@pytest.mark.parametrize("name", built_in())
def test_page_of_a_method(name: str) -> None:
    """The page's table is the config dataclass: one source for flag, default and meaning."""
    page = ROOT / "assets" / "methods" / f"{name}.md"
    assert page.is_file(), f"{page.relative_to(ROOT)} is missing"
    text = page.read_text(encoding="utf-8")
    assert flag_table(flags_of(methods()[name])) in text, (
        f"paste the output of: python -m tests.support.method_pages {name}"
    )
    tables = re.findall(r"^\| `--(\w+)`", text, re.MULTILINE)
    assert len(tables) == len(set(tables)), "a flag stands in two tables"


def test_no_page_without_its_method() -> None:
    pages = {path.stem for path in (ROOT / "assets" / "methods").glob("*.md") if path.stem != "README"}
    assert pages <= set(built_in())


def test_every_file_of_the_scorers_is_one() -> None:
    files = {path.stem for path in (PACKAGE / "evaluation" / "scorers").glob("*.py") if not path.stem.startswith("_")}
    assert files <= set(scorers.names())
    for name in files:
        module = scorers.module(name)
        assert isinstance(module.HIGHER_IS_BETTER, bool)
        low, high = module.RANGE
        assert low < high
        assert callable(module.load)
        assert module.__doc__


@pytest.mark.parametrize("name", built_in())
def test_every_flag_has_help_and_a_default(name: str) -> None:
    for flag, field in flags_of(methods()[name]):
        assert field.metadata.get("help", "").strip(), flag
        assert isinstance(field.default, (bool, int, float, str, type(None))), flag


def test_every_command_has_a_module() -> None:
    from swift_cl.cli.main import OWN

    modules = {path.stem for path in (PACKAGE / "cli").glob("*.py")}
    assert modules >= {*OWN, "sft", "main"}
    for name in OWN:
        assert "def add_parser(" in (PACKAGE / "cli" / f"{name}.py").read_text(encoding="utf-8")
