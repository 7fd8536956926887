"""Methods that read gradients, on experts instead of LoRA: two contradicting tasks, another end than plain training."""

from pathlib import Path

import pytest
import torch

from swift_cl.io import load_method_state
from tests.support.train import TASKS, adapter, contradicting_rows, train_stage
from tests.support.tuners import flags_for

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("method", ["ewc", "gem"])
def test_acts_on_experts_and_routers(tmp_path: Path, method: str) -> None:
    one, two = contradicting_rows(tmp_path)
    settings = {"learning_rate": 1e-2, "save_steps": 100, **flags_for("moelora")}
    first, ours, plain = tmp_path / "1", tmp_path / "2", tmp_path / "seq"
    train_stage(method, TASKS[0], first, dataset=str(one), max_steps=10, **settings)
    train_stage(method, TASKS[1], ours, first, dataset=str(two), max_steps=4, **settings)
    train_stage("seq", TASKS[1], plain, first, dataset=str(two), max_steps=4, **settings)
    a, b = adapter(ours), adapter(plain)
    for part in ("moelora_A", "moelora_B", "moelora_router"):
        assert any(not torch.equal(a[name], b[name]) for name in a if part in name), part
    if method == "ewc":
        state = load_method_state(ours / "cl_state", method)
        assert any("moelora_router" in name for name in state.tensors)
