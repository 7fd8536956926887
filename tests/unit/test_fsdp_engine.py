"""FSDP2's engine on a module of one layer, in two real processes: what is read, what is written, and who sees it.

One launch runs all checks, each with a module of its own. A layer has three rows, so one rank holds two of them and the
other one. `training`, with ms-swift around it, is in tests/distributed.
"""

import json
import os
import socket
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from swift_cl import distributed
from swift_cl.distributed import FsdpEngine, GradientView

RANKS = 2
START = torch.tensor([[1.0, 0.0], [0.0, 1.0], [2.0, -1.0]])
INPUTS = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
"""One row a rank. The loss is the sum of the layer's outputs, so a rank's gradient is its input in every row."""


def mesh() -> Any:
    return torch.distributed.init_device_mesh("cpu", (RANKS,))


def sharded(trained: bool = True) -> nn.Module:
    from torch.distributed.fsdp import fully_shard

    module = nn.Sequential(nn.Linear(2, 3, bias=False))
    with torch.no_grad():
        module[0].weight.copy_(START)
    module.requires_grad_(trained)
    return fully_shard(module, mesh=mesh())


def engine_of(module: nn.Module, weight: str = "0.weight") -> FsdpEngine:
    accelerator = SimpleNamespace(
        is_fsdp2=True, sync_gradients=True, unwrap_model=lambda model: model, optimizer_step_was_skipped=False
    )
    trainer: Any = SimpleNamespace(accelerator=accelerator, is_deepspeed_enabled=False, model_wrapped=module)
    engine = distributed.make_engine(trainer, {"w": module.get_parameter(weight)})
    assert isinstance(engine, FsdpEngine)
    return engine


def own_rows() -> Tensor:
    return INPUTS[distributed.world()[0]].unsqueeze(0)


def after_backward(module: nn.Module, act: Callable[[GradientView], None]) -> FsdpEngine:
    engine = engine_of(module)
    engine.install(act, lambda: None)
    module(own_rows()).sum().backward()
    engine.after_backward()
    return engine


# --- the checks ------------------------------------------------------------------------------------------------------


def gradients_are_the_means_over_ranks() -> None:
    seen: list[Tensor] = []
    module = sharded()
    after_backward(module, lambda view: seen.extend((view["w"], view.flat())))
    assert seen[0].tolist() == [[2, 3]] * 3
    assert seen[1].tolist() == [2, 3] * 3
    assert type(seen[0]) is Tensor


def clipping_and_the_optimizer_see_what_was_written() -> None:
    module = sharded()
    written = torch.tensor([[0.0, 0.0], [3.0, 0.0], [0.0, 4.0]])  # its norm is 5
    engine = after_backward(module, lambda view: view.set_flat(written.flatten()))
    norm = torch.nn.utils.clip_grad_norm_(module.parameters(), 2.5)
    assert norm.full_tensor().item() == 5  # type: ignore[attr-defined]
    torch.optim.SGD(module.parameters(), lr=1.0).step()
    torch.testing.assert_close(engine.weights()["w"], START - written / 2, rtol=1e-5, atol=0)


def what_is_only_read_stays_as_it_is() -> None:
    module = sharded()
    parameter = module.get_parameter("0.weight")
    before: list[Any] = []
    after_backward(module, lambda view: before.extend((parameter.grad, distributed.is_partitioned(view["w"]))))
    assert parameter.grad is before[0]
    assert before[1] is False


def no_gradient_reads_as_zeros_and_can_be_written() -> None:
    module = sharded()
    engine = engine_of(module)
    read: list[Tensor] = []

    def act(view: GradientView) -> None:
        read.append(view["w"])
        view["w"] = INPUTS[0].expand(3, 2)

    engine.install(act, lambda: None)
    engine.after_backward()
    assert read[0].tolist() == [[0, 0]] * 3
    torch.optim.SGD(module.parameters(), lr=1.0).step()
    assert torch.equal(engine.weights()["w"], START - INPUTS[0])


def gradients_of_an_own_forward_are_the_ranks_own() -> None:
    module = sharded()
    engine = engine_of(module)
    for _ in range(2):
        (found,) = engine.gradients_of(module(own_rows()).sum(), ["w"])
        assert found is not None
        assert found.tolist() == own_rows().tolist() * 3
    assert module.get_parameter("0.weight").grad is None
    module(own_rows()).sum().backward()  # training goes on as before
    assert distributed.full_tensor(module.get_parameter("0.weight").grad).tolist() == [[2, 3]] * 3


def other_weights_serve_one_forward() -> None:
    module = sharded()
    engine = engine_of(module)
    held = {"w": distributed.part_of(module.get_parameter("0.weight"), -START)}
    output = module(own_rows())  # the root stays gathered until backward
    other = engine.forward_with(held, {"input": own_rows()})
    assert torch.equal(other, -output)
    assert torch.equal(module(own_rows()), output)
    output.sum().backward()
    assert distributed.full_tensor(module.get_parameter("0.weight").grad).tolist() == [[2, 3]] * 3


def a_forward_after_a_step_has_the_new_weights() -> None:
    module = sharded()
    optimizer = torch.optim.SGD(module.parameters(), lr=1.0)
    engine = after_backward(module, lambda view: None)
    with torch.no_grad():
        module(own_rows())  # leaves the layer gathered, with the weights that it has now
    optimizer.step()
    engine.step_ended()
    expected = own_rows() @ (START - torch.tensor([2.0, 3.0])).T
    assert torch.equal(module(own_rows()).detach(), expected)


def a_frozen_parameter_takes_a_full_value() -> None:
    module = sharded(trained=False)
    frozen = module.get_parameter("0.weight")
    assert distributed.is_partitioned(frozen)
    distributed.copy_into(frozen, START * 2)
    assert torch.equal(module(own_rows()), own_rows() @ START.T * 2)


def the_first_ranks_value_counts_for_what_was_held_before() -> None:
    parameter = sharded().get_parameter("0.weight")
    own = START if distributed.world()[0] == 0 else START * 0
    assert torch.equal(distributed.held_before(parameter, own), distributed.held(parameter))


def checkpointed_layers_are_recomputed_with_the_same_masks() -> None:
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
    from torch.distributed.fsdp import fully_shard

    dropout, linear = nn.Dropout(0.5), nn.Linear(64, 3, bias=False)
    kept: list[Tensor] = []
    dropout.register_forward_hook(lambda module, inputs, output: kept.append(output.detach()))
    # As accelerate wraps a layer.
    module = nn.Sequential(checkpoint_wrapper(nn.Sequential(dropout, linear), preserve_rng_state=False))
    fully_shard(module, mesh=mesh())
    engine = engine_of(module, "0._checkpoint_wrapped_module.1.weight")
    (found,) = engine.gradients_of(module(torch.ones(1, 64)).sum(), ["w"])
    assert found is not None
    assert torch.equal(found[0], kept[0][0])


def sampling_goes_on_until_every_rank_has_its_answers() -> None:
    """A rank that stopped earlier would leave the others alone in a forward, which needs all."""
    from torch.distributed.fsdp import fully_shard

    from swift_cl.generation.live import sample
    from tests.support.tiny_lora import language_model

    model = language_model()
    settings: dict[str, Any] = {"temperature": 0, "max_new_tokens": 5, "at_once": 1}
    every, none = list(range(64)), [63]
    alone = sample(model, [[1, 2, 3]], [0], stop_tokens=none, **settings)
    for layer in (*model.model.layers, model):
        fully_shard(layer, mesh=mesh())
    first = distributed.world()[0] == 0
    found = sample(model, [[1, 2, 3]], [0], stop_tokens=every if first else none, **settings)
    assert found == ([alone[0][:1]] if first else alone)
    assert len(alone[0]) == 5


def all_ranks_start_with_what_the_first_one_drew() -> None:
    module = nn.Linear(2, 3)
    module.bias.requires_grad_(False)
    drawn = START if distributed.world()[0] == 0 else START * 2
    with torch.no_grad():
        module.weight.copy_(drawn)
        module.bias.fill_(distributed.world()[0])
    os.environ["ACCELERATE_USE_FSDP"], os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "true", "true"
    distributed.agree_on_start(module, "cpu")
    assert torch.equal(module.weight, drawn)  # accelerate will spread the first one's
    os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"
    distributed.agree_on_start(module, "cpu")
    assert torch.equal(module.weight, START)
    assert module.bias.tolist() == [distributed.world()[0]] * 3


def a_tied_weight_is_one_tensor_in_a_file() -> None:
    from torch.distributed.fsdp import fully_shard

    module = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
    module[1].weight = module[0].weight
    accelerator = SimpleNamespace(
        unwrap_model=lambda model: model,
        get_state_dict=lambda model: {
            name: distributed.full_tensor(value) for name, value in model.state_dict().items()
        },
    )
    trainer = SimpleNamespace(accelerator=accelerator, model_wrapped=fully_shard(module, mesh=mesh()))
    state = distributed.full_state_dict(trainer)
    assert list(state) == ["0.weight", "1.weight"]
    assert state["0.weight"] is state["1.weight"]


CHECKS: tuple[Callable[[], None], ...] = (
    gradients_are_the_means_over_ranks,
    clipping_and_the_optimizer_see_what_was_written,
    what_is_only_read_stays_as_it_is,
    no_gradient_reads_as_zeros_and_can_be_written,
    gradients_of_an_own_forward_are_the_ranks_own,
    other_weights_serve_one_forward,
    a_forward_after_a_step_has_the_new_weights,
    a_frozen_parameter_takes_a_full_value,
    the_first_ranks_value_counts_for_what_was_held_before,
    checkpointed_layers_are_recomputed_with_the_same_masks,
    all_ranks_start_with_what_the_first_one_drew,
    a_tied_weight_is_one_tensor_in_a_file,
    sampling_goes_on_until_every_rank_has_its_answers,
)

# --- two processes ---------------------------------------------------------------------------------------------------


def process(rank: int, port: int, folder: str) -> None:
    """Run every check; what fails is written down, for pytest to say in its own process."""
    address = f"tcp://127.0.0.1:{port}"
    patience = timedelta(seconds=60)  # for a rank that the other one has left alone
    torch.distributed.init_process_group("gloo", address, patience, world_size=RANKS, rank=rank)
    failures = {}
    for check in CHECKS:
        try:
            check()
        except Exception:
            failures[check.__name__] = traceback.format_exc()
    (Path(folder) / f"{rank}.json").write_text(json.dumps(failures))
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def failures(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    """By rank: what each check that failed said."""
    folder = tmp_path_factory.mktemp("ranks")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    torch.multiprocessing.spawn(process, (port, str(folder)), nprocs=RANKS)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(RANKS)]


@pytest.mark.parametrize("check", [check.__name__ for check in CHECKS])
def test_fsdp_engine(failures: list[dict[str, str]], check: str) -> None:
    assert [own[check] for own in failures if check in own] == []
