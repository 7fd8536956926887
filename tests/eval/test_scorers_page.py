"""assets/scorers.md: its examples work as they stand there, and its table is complete."""

import re
import sys

import pytest

from swift_cl.evaluation import scorers
from swift_cl.evaluation.scorers import Unscored
from swift_cl.stream.benchmark import load_benchmark
from tests.conftest import ROOT
from tests.eval.helpers import go, names
from tests.eval.mock_endpoint import MockEndpoint

PAGE = (ROOT / "assets" / "scorers.md").read_text(encoding="utf-8")


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """The page's two modules in a package that registers them as the page says."""
    site = tmp_path / "site"
    (site / "my_package").mkdir(parents=True)
    (site / "my_package" / "__init__.py").write_text("")
    for name, code in zip(("length", "keywords"), blocks("python"), strict=True):
        (site / "my_package" / f"{name}.py").write_text(code)
        monkeypatch.delitem(sys.modules, f"my_package.{name}", raising=False)
    monkeypatch.delitem(sys.modules, "my_package", raising=False)
    (table,) = blocks("toml")
    point = re.search(r'^length = "(.+)"$', table, re.MULTILINE)[1]
    assert '[project.entry-points."swift_cl.scorers"]' in table
    info = site / "my_package-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: my-package\nVersion: 1.0\n")
    points = f"[{scorers.GROUP}]\nlength = {point}\nkeywords = my_package.keywords\n"
    (info / "entry_points.txt").write_text(points)
    monkeypatch.syspath_prepend(str(site))


def test_the_short_example(installed):
    loaded = scorers.load("length")
    assert loaded.score([("abc", "ab"), ("a" * 100, "a"), ("a", "")]) == [
        150, 1000, Unscored("the reference is empty"),
    ]  # fmt: skip
    assert (loaded.higher_is_better, loaded.range) == (False, (0, 1000))


def test_the_long_example_in_a_grid(installed, make_run, benchmark):
    text = benchmark.read_text().replace("scorers: [exact_match]", "scorers: [keywords]")
    benchmark.write_text(f"{text}scorer_options: {{keywords: {{words: [yes, q0]}}}}\n".replace("[yes,", "['yes',"))
    run = make_run()
    answer = lambda model, messages: f"yes {messages[-1]['content']}"  # noqa: E731
    with MockEndpoint(names(run), answer) as mock:
        found = go(run, mock).results[0]["scorers"]["keywords"]
    assert found["base"] == [50, 50]  # the worst answer lacks q0
    assert found["cell"] == "the worst answer of the cell"
    assert found["facts"] == {"words": ["yes", "q0"]}
    assert found["floor"] == [None, None]


def test_the_benchmark_lines_are_read(tmp_path):
    (text,) = blocks("yaml")
    (tmp_path / "benchmark.yaml").write_text(f"name: page\n{text}")
    benchmark = load_benchmark(tmp_path)
    assert benchmark.scorers == ("label_choice", "numeric_match")
    assert benchmark.scorer_options == {"numeric_match": {"tolerance": 0.01}}
    options = benchmark.tasks["agnews"].scorer_options["label_choice"]
    assert scorers.load("label_choice", options=options).score([("It is sci/tech.", "Sci/Tech")]) == [100]


def test_the_table_is_complete():
    """Every built-in scorer, its direction and its settings."""
    rows = dict(re.findall(r"^\| `(\w+)` \|(.*)\|$", PAGE, re.MULTILINE))
    own = {name for name in scorers.names() if scorers.module(name).__name__.startswith("swift_cl.")}
    assert rows.keys() == own
    for name, row in rows.items():
        module = scorers.module(name)
        cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", row)]
        assert cells[1] == ("higher" if module.HIGHER_IS_BETTER else "lower"), name
        assert ("extra" in cells[2]) == ("extra" in getattr(module, "NEEDS", "")), name
        named = set(re.findall(r"`(\w+)", cells[3]))
        known = set(module.Options.model_fields) if hasattr(module, "Options") else set()
        assert named <= known, name
        assert named == known or "..." in cells[3], name
