"""The pages of assets/ say what the program does: run files are valid, flags and keys exist."""

import re
import shlex
from pathlib import Path

import pytest
import yaml

from swift_cl.cli.main import build_parser
from swift_cl.stream import catalogue
from swift_cl.stream.benchmark import load_benchmark
from swift_cl.workflow.config import RunConfig
from swift_cl.workflow.easycl_keys import CHAIN_SETS, EVAL_KEYS, METHOD_KEYS, METHODS, OWN_TRAIN, TEMPLATES, TRAIN_KEYS
from tests.conftest import ROOT

PAGES = [ROOT / "assets" / name for name in ("from_other_codebases.md", "reproduce.md")]
BENCHMARK_FLAG_OF_EASYCL = ("--mode", "--previewonly", "--benchmark_order", "--clean_dirs")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_commands_are_accepted(page: Path) -> None:
    lines = re.findall(r"^    (swift-cl .+)$", page.read_text("utf-8"), re.MULTILINE)
    assert len(lines) >= 2
    for line in lines:
        argv = [word for word in shlex.split(line, comments=True) if word != "..."]
        build_parser().parse_args(argv[1:])


def test_the_run_file_is_valid() -> None:
    (text,) = re.findall(r"```yaml\n(.+?)```", PAGES[1].read_text("utf-8"), re.DOTALL)
    config = RunConfig.model_validate(yaml.safe_load(text))
    benchmark = load_benchmark(Path(config.benchmark))
    assert config.orders == list(benchmark.orders)
    assert len(config.singles()) == 27, "as the page says"
    assert len(benchmark.order("order1")) == 19


def test_easycl_keys_exist() -> None:
    section = PAGES[0].read_text("utf-8").split("## Continual-NExT")[0]
    rows = [line.split("|")[1] for line in section.splitlines() if line.startswith("| `")]
    keys = {key.split(":")[0] for row in rows for key in re.findall(r"`([^`]+)`", row)}
    switches = {f"use_{name}" for name in METHODS}
    known = {*TRAIN_KEYS, *EVAL_KEYS, *METHOD_KEYS, *CHAIN_SETS, *OWN_TRAIN, *switches, *BENCHMARK_FLAG_OF_EASYCL}
    assert keys - known == {"template", "lora_target", "save_dir", "cl_metrics.json"}
    assert TEMPLATES["qwen"] == "qwen2_5"


def test_orders_of_the_benchmarks_it_names() -> None:
    for name, orders in (("standard_cl", ("order1", "order2", "order3")), ("long_cl", ("order4", "order5", "order6"))):
        assert tuple(load_benchmark(catalogue.find(Path(name))).orders) == orders
