"""Two processes (DDP, gloo) compute what one process computes, for every registered method."""

from pathlib import Path
from typing import Any

import pytest
import torch

from swift_cl.io import load_method_state
from swift_cl.methods.registry import methods
from tests.support.chains import run_chain
from tests.support.communication import COUNTED, beyond_plain
from tests.support.train import NEED_A_TALKING_BASE, adapter, assert_equal_up_to_rounding, contradicting_rows

pytestmark = pytest.mark.slow
METHODS = sorted(methods())
PLAIN = ("seq", "moe_lora", "prog_prompt", "lfpt5")
"""Fine-tuning and nothing else, or with a tuner of its own."""


def _method_of(item: Any) -> str:
    return str(item.callspec.params["method"]) if hasattr(item, "callspec") else "replay"


def _runs_here(item: Any) -> bool:
    return item.path == Path(__file__) and "runs" in item.fixturenames


@pytest.fixture(scope="module")
def runs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Runs in one process and in two, of the methods whose tests were asked for (`-k NAME`) and of seq."""
    asked = {_method_of(item) for item in request.session.items if _runs_here(item)}
    names = sorted(asked | {"seq"})
    folder = tmp_path_factory.mktemp("processes")
    contradicting_rows(folder)
    run_chain(folder / "one", names, processes=1, batch=4)
    run_chain(folder / "two", names, processes=2, batch=2, train=COUNTED)
    return folder / "one" / "runs", folder / "two" / "runs"


@pytest.mark.parametrize("method", [m for m in METHODS if m not in (*PLAIN, "gem", "cl_moe", *NEED_A_TALKING_BASE)])
def test_second_task_differs_from_seq(runs: tuple[Path, Path], method: str) -> None:
    """A method that changes nothing on the second task would be a name without an effect.

    For gem, which acts only where a constraint is violated, these steps are too few: it has its test in the matrix;
    cl_moe, whose adapter is of another type, has it in test_cl_moe.py.
    Methods that need a base model that talks have theirs in tests/generation.
    """
    ours, plain = (adapter(runs[0] / name / "stage_2_second") for name in (method, "seq"))
    assert any(not torch.equal(ours[name], tensor) for name, tensor in plain.items())


@pytest.mark.parametrize("method", METHODS)
def test_two_processes_equal_one(runs: tuple[Path, Path], method: str) -> None:
    one, two = (run / method / "stage_2_second" for run in runs)
    assert_equal_up_to_rounding(runs[0] / method / "stage_1_first", one, two)


@pytest.mark.parametrize("method", METHODS)
def test_state_of_two_processes_equals_one(runs: tuple[Path, Path], method: str) -> None:
    """Rows drawn and stored are the same; statistics agree to rounding."""
    folders = [run / method / "stage_1_first" / "cl_state" for run in runs]
    if not (folders[0] / f"{method}.json").is_file():
        pytest.skip(f"{method} keeps no state")
    one, two = (load_method_state(folder, method) for folder in folders)
    assert one.rows == two.rows
    for name, tensor in one.tensors.items():
        assert (tensor - two.tensors[name]).abs().max().item() <= 1e-3 * max(1.0, tensor.abs().max().item()), name


def test_replay_draws_the_same_rows(runs: tuple[Path, Path]) -> None:
    files = [run / "replay" / "stage_2_second" / "cl_data" / "train.jsonl" for run in runs]
    assert files[0].read_bytes() == files[1].read_bytes()
    records = [run / "replay" / "stage_2_second" / "cl_state" / "replay.manifest.json" for run in runs]
    existing = [path for path in records if path.is_file()]
    if existing:
        assert records[0].read_bytes() == records[1].read_bytes()


GRADIENTS_SENT = {"gem": 1.0, "migu": 0.127}
"""What a step of the second task sends beyond plain fine-tuning, in gradients of the trained parameters: gem one for
its one constraint, migu the outputs' sizes. The others: nothing but counts of rows and tokens, and what DDP sends by
itself, a bitmap of the parameters and the buffers (the frozen prompts of prog_prompt)."""
COUNTS = 512
"""Bytes."""


@pytest.mark.parametrize("method", METHODS)
def test_bytes_sent_in_a_step(runs: tuple[Path, Path], method: str) -> None:
    """The numbers of assets/distributed.md."""
    stage, plain = (runs[1] / name / "stage_2_second" for name in (method, "seq"))
    beyond, gradient = beyond_plain(stage, plain)
    frozen_prompts = 10_240 if method == "prog_prompt" else 0
    assert abs(beyond - GRADIENTS_SENT.get(method, 0) * gradient - frozen_prompts) <= COUNTS
