"""assets/formats.md says what the readers and the catalogue are."""

import re
from pathlib import Path

import pytest
import yaml

from swift_cl.stream import catalogue
from swift_cl.stream.benchmark import load_benchmark
from swift_cl.stream.benchmark_file import BenchmarkModel, TaskModel
from swift_cl.stream.readers import _reader, formats
from tests.conftest import ROOT

PAGE = (ROOT / "assets" / "formats.md").read_text(encoding="utf-8")


def section(name: str) -> str:
    return PAGE.split(f"\n### {name}\n")[1].split("\n### ")[0].split("\n## ")[0]


def test_a_section_a_format() -> None:
    assert sorted(re.findall(r"^### (\w+)$", PAGE, re.MULTILINE)) == formats()


@pytest.mark.parametrize("name", formats())
def test_every_setting_is_named(name: str) -> None:
    options = getattr(_reader(name), "Options", None)
    text = section(name)
    assert "```" in text
    if options is None:
        assert name == "messages" or "No settings." in text
    else:
        assert [field for field in options.model_fields if f"`{field}`" not in text] == []


def test_every_key_of_a_benchmark_is_named() -> None:
    keys = {*BenchmarkModel.model_fields, *TaskModel.model_fields}
    assert [key for key in keys if f"`{key}`" not in PAGE] == []


@pytest.mark.parametrize("block", re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL))
def test_yaml_examples_load(tmp_path: Path, block: str) -> None:
    values = yaml.safe_load(block)
    (tmp_path / "benchmark.yaml").write_text(yaml.safe_dump({"name": "example", **values}))
    assert load_benchmark(tmp_path).tasks


def table() -> list[str]:
    rows = []
    for file in catalogue.files():
        benchmark = load_benchmark(file, Path("/data"))
        tasks = benchmark.tasks.values()
        scorers = list(dict.fromkeys([*benchmark.scorers, *(s for task in tasks for s in task.scorers)]))
        used = sorted({task.file_format for task in tasks})
        cells = [benchmark.name, str(len(tasks)), ", ".join(benchmark.orders), ", ".join(used), ", ".join(scorers)]
        rows.append(f"| {' | '.join(cells)} |")
    return rows


def test_table_of_benchmarks() -> None:
    text = "\n".join(table())
    assert text in PAGE, f"paste:\n{text}"
