"""The README's worked example of a method is the tested one, and works when it is installed as a plug-in."""

import subprocess
from pathlib import Path

import pytest
import torch

from tests.conftest import ROOT
from tests.support.commands import swift_cl_command
from tests.support.plugins import installed
from tests.support.train import TASKS, adapter, stage_argv

EXAMPLE = ROOT / "tests" / "support" / "l2_anchor.py"


def test_readme_shows_the_tested_example() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert EXAMPLE.read_text(encoding="utf-8") in readme.replace("```python\n", "")


def test_every_method_is_in_the_readme() -> None:
    from swift_cl.methods.registry import methods

    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for name in methods():
        assert f"| `{name}` |" in readme
        assert f"(assets/methods/{name}.md)" in readme


@pytest.fixture
def plugin(tmp_path: Path) -> dict[str, str]:
    """An installed distribution with the example and its entry point; returns the environment to run in."""
    return installed(tmp_path / "site", EXAMPLE, "l2_anchor", "L2Anchor")


def run(plugin: dict[str, str], *argv: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(swift_cl_command(*argv), env=plugin, capture_output=True, text=True, timeout=600)


def test_plugin_is_listed(plugin: dict[str, str]) -> None:
    listed = run(plugin, "ls", "methods", "--json")
    assert '"l2_anchor"' in listed.stdout, listed.stderr
    assert "--l2_anchor_strength" in run(plugin, "sft", "--help").stdout
    refused = run(plugin, "sft", "--cl_method", "l2_anchor", "--cl_task", "x", "--l2_anchor_strength", "-1")
    assert refused.returncode == 2
    assert "--l2_anchor_strength is -1.0, allowed: a number >= 0" in refused.stderr


@pytest.mark.slow
def test_plugin_trains_two_tasks(plugin: dict[str, str], tmp_path: Path) -> None:
    """A very strong pull keeps the second task at the first one's weights."""
    first, second = tmp_path / "1", tmp_path / "2"
    plain = {"optim": "sgd", "learning_rate": 0.01, "lora_dropout": 0.0, "max_grad_norm": 0.0}
    for folder, task, previous, strength in ((first, TASKS[0], None, 0.0), (second, TASKS[1], first, 50.0)):
        argv = stage_argv("l2_anchor", task, folder, previous, l2_anchor_strength=strength, **plain)
        done = run(plugin, "sft", *argv)
        assert done.returncode == 0, done.stderr[-2000:]
    moved = max((adapter(second)[n] - t).abs().max().item() for n, t in adapter(first).items())
    assert 0 < moved < 0.05
    assert (second / "cl_state" / "l2_anchor.safetensors").is_file()
    assert not torch.equal(*(next(iter(adapter(f).values())) for f in (first, second)))
