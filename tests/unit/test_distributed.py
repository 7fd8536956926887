"""Gradients and weights as a method sees them, in one process; DDP and ZeRO have tests that start processes."""

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from swift_cl import distributed
from swift_cl.distributed import GradientView, PlainEngine, make_engine
from swift_cl.errors import RunFailure


def trainer(scale: float | None = None, sync: bool = True, skipped: bool = False) -> Any:
    """What the engine asks of a Trainer."""
    scaler = None if scale is None else SimpleNamespace(is_enabled=lambda: True, get_scale=lambda: scale)
    accelerator = SimpleNamespace(scaler=scaler, sync_gradients=sync, optimizer_step_was_skipped=skipped)
    return SimpleNamespace(accelerator=accelerator, is_deepspeed_enabled=False, args=SimpleNamespace(fsdp=False))


def parameters(dtype: torch.dtype = torch.float32) -> dict[str, nn.Parameter]:
    """Two parameters; the gradients are 1..6 and nothing."""
    a, b = nn.Parameter(torch.zeros(2, 3, dtype=dtype)), nn.Parameter(torch.zeros(2, dtype=dtype))
    a.grad = torch.arange(1.0, 7.0, dtype=dtype).reshape(2, 3)
    return {"a": a, "b": b}


def seen(engine: PlainEngine) -> list[GradientView]:
    views: list[GradientView] = []
    engine.install(views.append, lambda: None)
    engine.after_backward()
    return views


def test_flat_and_back() -> None:
    params = parameters()
    (view,) = seen(PlainEngine(trainer(), params))
    assert view.names == ["a", "b"]
    assert view.flat().tolist() == [1, 2, 3, 4, 5, 6, 0, 0]
    view.set_flat(view.flat() * 2 + 1)
    assert params["a"].grad is not None
    assert params["b"].grad is not None
    assert params["a"].grad.tolist() == [[3, 5, 7], [9, 11, 13]]
    assert params["b"].grad.tolist() == [1, 1]


def test_what_is_only_read_stays_as_it_is() -> None:
    params = parameters()
    before = params["a"].grad
    (view,) = seen(PlainEngine(trainer(), params))
    _ = view["a"], view["b"], view.flat()
    assert params["a"].grad is before
    assert params["b"].grad is None


def test_gradients_are_fp32_and_go_back_in_their_own_type() -> None:
    params = parameters(torch.bfloat16)
    (view,) = seen(PlainEngine(trainer(), params))
    assert view["a"].dtype == view["b"].dtype == torch.float32
    view.set_flat(view.flat() + 1)
    for parameter in params.values():
        assert parameter.grad is not None
        assert parameter.grad.dtype == torch.bfloat16


def test_loss_scale_is_taken_out_and_put_back() -> None:
    params = parameters()
    (view,) = seen(PlainEngine(trainer(scale=4.0), params))
    assert view["a"].flatten().tolist() == [0.25, 0.5, 0.75, 1.0, 1.25, 1.5]
    view["a"] = torch.ones(2, 3)
    assert params["a"].grad is not None
    assert params["a"].grad.unique().tolist() == [4.0]


def test_overflow_is_left_to_the_scaler() -> None:
    params = parameters()
    assert params["a"].grad is not None
    params["a"].grad[0, 0] = float("inf")
    assert seen(PlainEngine(trainer(scale=4.0), params)) == []


def test_nothing_between_the_micro_batches_of_a_step() -> None:
    assert seen(PlainEngine(trainer(sync=False), parameters())) == []


@pytest.mark.parametrize(("skipped", "calls"), [(False, 1), (True, 0)])
def test_after_step_only_where_a_step_was_applied(skipped: bool, calls: int) -> None:
    done: list[int] = []
    engine = PlainEngine(trainer(skipped=skipped), parameters())
    engine.install(lambda view: None, lambda: done.append(1))
    engine.step_ended()
    assert len(done) == calls


def test_hooks_that_come_before_install_do_nothing() -> None:
    engine = PlainEngine(trainer(), parameters())
    engine.after_backward()
    engine.step_ended()


def test_weights() -> None:
    params: Mapping[str, nn.Parameter] = parameters(torch.bfloat16)
    weights = PlainEngine(trainer(), params).weights()
    assert list(weights) == ["a", "b"]
    assert all(w.dtype == torch.float32 and not w.requires_grad for w in weights.values())


def test_a_partitioned_parameter_is_cut_by_its_real_shape() -> None:
    """ZeRO-3 leaves an empty tensor whose shape stands in ds_shape."""
    empty, whole = nn.Parameter(torch.zeros(0)), nn.Parameter(torch.zeros(2))
    empty.ds_shape = torch.Size([2, 2])  # type: ignore[attr-defined]
    written: list[tuple[int, torch.Tensor]] = []
    view = GradientView({"e": empty, "w": whole}, lambda p: p, lambda p, value: written.append((id(p), value)), None)
    view.set_flat(torch.arange(6.0))
    assert [(i, value.tolist()) for i, value in written] == [(id(empty), [[0, 1], [2, 3]]), (id(whole), [4, 5])]


def test_fsdp_that_is_none_is_no_ddp() -> None:
    """accelerate has trained CPU processes by DDP where FSDP2 was asked for, without a word."""
    unsharded = trainer()
    unsharded.args.fsdp, unsharded.accelerator.distributed_type = True, "MULTI_CPU"
    with pytest.raises(RunFailure, match="--fsdp: accelerate does not shard the model"):
        make_engine(unsharded, {})


def test_one_process() -> None:
    assert isinstance(make_engine(trainer(), {}), PlainEngine)
    assert distributed.world() == (0, 1)
    tensor = torch.ones(2)
    assert distributed.all_reduce_sum(tensor) is tensor
    distributed.barrier()


def test_a_weight_with_two_names_is_one_tensor_of_the_state() -> None:
    """What accelerate gives for DeepSpeed are copies, and a file would hold both."""
    module = nn.Module()
    module.embed, module.head = nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)
    module.head.weight = module.embed.weight
    asked = trainer()
    asked.accelerator.unwrap_model = lambda wrapped: wrapped
    asked.accelerator.get_state_dict = lambda wrapped: {n: t.clone() for n, t in wrapped.state_dict().items()}
    asked.model_wrapped = module
    state = distributed.full_state_dict(asked)
    assert list(state) == ["embed.weight", "head.weight"]
    assert state["embed.weight"] is state["head.weight"]
