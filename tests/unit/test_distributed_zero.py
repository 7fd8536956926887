"""What is written into DeepSpeed's gradients, without DeepSpeed; its engines themselves run in tests/distributed."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from swift_cl.distributed import DeepSpeedEngine, part_of

WHOLE = torch.arange(1.0, 6.0)


def spread(rank: int, size: int, monkeypatch: pytest.MonkeyPatch) -> Any:
    """What a rank holds of five numbers under ZeRO-3."""
    monkeypatch.setattr(torch.distributed, "get_rank", lambda group: rank)
    part = torch.zeros(-(-5 // size), dtype=torch.bfloat16)
    return SimpleNamespace(ds_shape=torch.Size([5]), ds_tensor=part, ds_process_group=None)


@pytest.mark.parametrize(
    ("rank", "size", "own"),
    [(0, 2, [1, 2, 3]), (1, 2, [4, 5, 0]), (2, 3, [5, 0]), (3, 4, [0, 0]), (0, 1, [1, 2, 3, 4, 5])],
)
def test_a_rank_holds_its_part_and_the_last_one_zeros(
    rank: int, size: int, own: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = part_of(spread(rank, size, monkeypatch), WHOLE)
    assert found.tolist() == own
    assert found.dtype == torch.bfloat16


def engine(optimizer: Any) -> DeepSpeedEngine:
    wrapped = SimpleNamespace(optimizer=optimizer, fp16_enabled=lambda: False)
    return DeepSpeedEngine(SimpleNamespace(model_wrapped=wrapped), {})


def test_zero3_gets_the_part_of_a_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    """DeepSpeed cuts a whole gradient itself, but beyond its end where it does not divide by the number of ranks."""
    utils = pytest.importorskip("deepspeed.utils")
    written: list[Tensor] = []
    monkeypatch.setattr(utils, "safe_set_local_grad", lambda parameter, value: written.append(value))
    engine(None)._write(spread(1, 2, monkeypatch), WHOLE)
    assert [part.tolist() for part in written] == [[4, 5, 0]]
    assert written[0].dtype == torch.float32


def test_what_is_offloaded_is_clipped_by_the_norm_of_the_written_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    """This rank's fragment is (3, 4) of the new gradient; DeepSpeed had noted the norm of the old one."""
    utils = pytest.importorskip("deepspeed.utils")
    monkeypatch.setattr(utils, "safe_set_full_grad", lambda parameter, value: None)
    mapping = SimpleNamespace(get_lp_grad_fragment=lambda index: torch.tensor([3.0, 4.0]))
    offloading = SimpleNamespace(norm_for_param_grads={7: torch.tensor(1.0)}, get_param_id=lambda parameter: 7)
    parameter: Any = SimpleNamespace(_hp_mapping=mapping, _index_in_param_group=0)
    engine(offloading)._write(parameter, WHOLE)
    assert float(offloading.norm_for_param_grads[7]) == pytest.approx(5.0)
    for optimizer in (SimpleNamespace(), SimpleNamespace(norm_for_param_grads={})):
        engine(optimizer)._write(parameter, WHOLE)  # nothing is offloaded, nothing was noted
    parameter._hp_mapping = None  # another rank's
    engine(offloading)._write(parameter, 0 * WHOLE)
    assert float(offloading.norm_for_param_grads[7]) == pytest.approx(5.0)
