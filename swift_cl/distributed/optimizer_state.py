"""What one engine's training is made of, parameter by parameter, so that another engine can take it up.

none, DDP, ZeRO-0   the optimizer's state belongs to the parameter itself.
FSDP2               it does too, and both are held in parts.
ZeRO-1, 2, 3        an optimizer holds flat parts of many parameters; deepspeed's safe_* functions put them together.

Every function is a collective: all ranks call it with the same parameters in the same order.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from swift_cl.distributed.tensors import full_shape, full_tensor, held, is_sharded, part_of, write_trained, zero_part

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn
else:
    from swift_cl.lazy import LazyModule

    torch = LazyModule("torch")

WEIGHT = "weight"
STEP = "step"
"""The optimizer's count of its steps, a scalar."""


def engine_name(args: Any) -> str:
    """`zero0` to `zero3`, `fsdp2`, or `plain` for one process and DDP."""
    config = args.deepspeed
    if not config:
        return "fsdp2" if args.fsdp else "plain"
    return f"zero{int(config.get('zero_optimization', {}).get('stage', 0))}"


def is_readable(trainer: Any, parameter: "nn.Parameter") -> bool:
    """Whether the engine can say what belongs to a parameter (ZeRO-0 in low precision keeps it to itself)."""
    return _is_partitioning(trainer) or any(
        parameter is p for group in _own(trainer).param_groups for p in group["params"]
    )


def read_state(trainer: Any, parameter: "nn.Parameter") -> "dict[str, Tensor]":
    """Weight, moments (full, fp32) and step of one trained parameter, by the optimizer's names."""
    if _is_partitioning(trainer):
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        flat = _flat_parts(trainer)[0]
        found = {WEIGHT: safe_get_full_fp32_param(parameter).detach().float()}
        for key, value in _base(trainer).state.get(flat, {}).items():
            if isinstance(value, torch.Tensor) and value.shape == flat.shape:
                found[key] = safe_get_full_optimizer_state(parameter, key).detach().float()
            elif key == STEP:
                found[STEP] = torch.as_tensor(float(value))
        steps = [
            group[STEP] for group in _base(trainer).param_groups if STEP in group
        ]  # apex' and DeepSpeed's FusedAdam
        return {**found, **({STEP: torch.as_tensor(float(steps[0]))} if steps else {})}
    state = _own(trainer).state.get(parameter, {})
    tensors = {key: full_tensor(torch.as_tensor(v).detach()).float() for key, v in state.items() if v is not None}
    return {WEIGHT: full_tensor(parameter.detach()).float(), **tensors}


def write_states(
    trainer: Any, parameters: "Mapping[str, nn.Parameter]", states: "Callable[[str], dict[str, Tensor]]"
) -> None:
    """Put weights and optimizer where `read_state` found them, under whatever engine."""
    if _is_partitioning(trainer):
        _write_partitioned(trainer, parameters, states)
        return
    optimizer = _own(trainer)
    names = {id(parameter): name for name, parameter in parameters.items()}
    saved = optimizer.state_dict()
    for group, packed in zip(optimizer.param_groups, saved["param_groups"], strict=True):
        for parameter, index in zip(group["params"], packed["params"], strict=True):
            state = states(names[id(parameter)])
            write_trained(parameter, state.pop(WEIGHT))
            if state:
                saved["state"][index] = {key: _as_held(parameter, value) for key, value in state.items()}
    optimizer.load_state_dict(saved)


def _as_held(parameter: "nn.Parameter", value: "Tensor") -> "Tensor":
    """A moment as the engine holds the parameter: a part under FSDP2, the whole otherwise."""
    if not is_sharded(parameter) or value.shape != full_shape(parameter):
        return value
    part = torch.zeros_like(parameter.detach())
    held(part).copy_(part_of(parameter, value))
    return part


def _write_partitioned(
    trainer: Any, parameters: "Mapping[str, nn.Parameter]", states: "Callable[[str], dict[str, Tensor]]"
) -> None:
    from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

    made = False
    for name, parameter in parameters.items():
        state = states(name)
        weight, step = state.pop(WEIGHT), state.pop(STEP, None)
        if not made:
            _make_states(trainer, state.keys(), step)
            made = True
        write_trained(parameter, weight.to(_device(trainer)))
        for key, value in state.items():
            if hasattr(parameter, "ds_shape"):
                safe_set_local_optimizer_state(parameter, zero_part(parameter, value.to(_device(trainer))), key)
            else:
                safe_set_full_optimizer_state(parameter, value.to(_device(trainer)), key)


def _make_states(trainer: Any, keys: Iterable[str], step: "Tensor | None") -> None:
    """What the optimizer would make at its first step: zeros in its flat parts, and their links to the parameters."""
    base, keys = _base(trainer), list(keys)
    of_torch = type(base).__module__.startswith("torch.")
    for flat in _flat_parts(trainer):
        made: dict[str, Any] = {key: torch.zeros_like(flat.data) for key in keys}
        if step is not None:
            made[STEP] = step.clone() if of_torch else int(step)
        if made:
            base.state[flat] = made
    for group in base.param_groups:
        if step is not None and STEP in group:
            group[STEP] = int(step)
    zero = trainer.model_wrapped.optimizer
    groups = getattr(zero, "bit16_groups", None) or getattr(zero, "bf16_groups", None)
    if groups is not None and keys:
        from deepspeed.utils import lazy_init_hp_params_optimizer_state

        for group, flat in zip(groups, _flat_parts(trainer), strict=True):
            lazy_init_hp_params_optimizer_state(group, flat, base.state)


def set_steps(trainer: Any, step: int) -> None:
    """Tell an engine that counts for itself how many steps were done (DeepSpeed names its files by it)."""
    if trainer.is_deepspeed_enabled:
        trainer.model_wrapped.global_steps = step


def _device(trainer: Any) -> Any:
    return trainer.accelerator.device


def _is_partitioning(trainer: Any) -> bool:
    return bool(trainer.is_deepspeed_enabled and trainer.model_wrapped.zero_optimization_stage() > 0)


def _own(trainer: Any) -> Any:
    """The optimizer that holds the parameters themselves."""
    optimizer = trainer.optimizer
    return getattr(optimizer, "optimizer", optimizer)  # accelerate's wrapper, which passes on all that is asked here


def _base(trainer: Any) -> Any:
    """The optimizer that ZeRO lets work on flat parts."""
    return trainer.model_wrapped.optimizer.optimizer


def _flat_parts(trainer: Any) -> "list[Tensor]":
    """This rank's flat fp32 parts, a tensor a group."""
    zero = trainer.model_wrapped.optimizer
    # ZeRO-3 takes them out of the groups between steps.
    parts = getattr(zero, "fp32_partitioned_groups_flat", None)
    return list(parts) if parts else [part for group in _base(trainer).param_groups for part in group["params"]]
