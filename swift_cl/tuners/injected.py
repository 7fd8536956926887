"""Base classes of tuners that wrap modules of the model: one layer class, one model class, one config class a tuner.

A layer has its weights in `nn.ModuleDict`s by adapter name, named in `adapter_layer_names`. An `AddingLayer` says in
`added` what an adapter adds to the output; several adapters, switching, calls with a name a row and the base model are
done here.
"""

from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import Tensor, nn

BASE = "__base__"
"""PEFT's name for "no adapter" among `adapter_names`."""


class InjectedLayer(nn.Module, BaseTunerLayer):
    """Wraps one module, whose weights are not touched, so they may be quantised."""

    adapter_layer_names: tuple[str, ...] = ()
    base_layer: Any

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: Any) -> None:
        super().__init__()
        self.base_layer = base_layer
        for name in self.adapter_layer_names:
            setattr(self, name, nn.ModuleDict())
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        self._active_adapter = adapter_name
        self.prepare()
        self.update_layer(adapter_name, config)

    def prepare(self) -> None:
        """Make what holds further settings by adapter name (listed in `other_param_names`)."""

    @abstractmethod
    def new_parts(self, config: Any) -> dict[str, nn.Module]:
        """The weights of a new adapter by the names of `adapter_layer_names`."""

    def set_up(self, adapter_name: str, config: Any) -> None:
        """Fill in the further settings of a new adapter."""

    def update_layer(self, adapter_name: str, config: Any) -> None:
        """Add an adapter."""
        peft: Any = self  # PEFT's half of the class, which has no types
        device = next(self.base_layer.parameters()).device
        for name, part in self.new_parts(config).items():
            getattr(self, name)[adapter_name] = part.to(device)
        self.set_up(adapter_name, config)
        peft.set_adapter(peft.active_adapters, inference_mode=config.inference_mode)

    def has(self, adapter_name: str) -> bool:
        """Whether this layer has weights of an adapter."""
        return adapter_name in getattr(self, self.adapter_layer_names[0])

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Refused: what the adapter adds is no product of one matrix with the input."""
        raise ValueError(f"an adapter of {type(self).__name__} cannot be merged: what it adds depends on the input")

    def unmerge(self) -> None:
        """Refused, as `merge`."""
        raise ValueError(f"an adapter of {type(self).__name__} is never merged")


class AddingLayer(InjectedLayer):
    """Adds something to the output of the module that it wraps: `added`, of every active adapter."""

    @abstractmethod
    def added(self, x: Tensor, result: Tensor, adapter_name: str) -> Tensor:
        """What one adapter adds to the output.

        Args:
            x: input of the wrapped module.
            result: its output; not to be changed in place.
        """

    def forward(self, x: Tensor, *args: Any, adapter_names: list[str] | None = None, **kwargs: Any) -> Tensor:
        peft: Any = self
        result: Tensor = self.base_layer(x, *args, **kwargs)
        if peft.disable_adapters:
            return result
        if not isinstance(result, Tensor):
            raise ValueError(f"{type(self.base_layer).__name__} returns {type(result).__name__}, not one tensor")
        dtype = result.dtype
        if adapter_names is None:
            for name in filter(self.has, peft.active_adapters):
                result = result + self.added(x, result, name)
            return result.to(dtype)
        if len(adapter_names) == 1:  # as ms-swift's engine passes it for a batch of any size
            adapter_names = adapter_names * len(x)
        for name in filter(self.has, sorted(set(adapter_names) - {BASE})):
            rows = torch.tensor([row for row, wanted in enumerate(adapter_names) if wanted == name], device=x.device)
            result = result.index_add(0, rows, self.added(x[rows], result[rows], name).to(dtype))
        return result


class InjectedModel(BaseTuner):
    """Puts a layer around every target; a subclass names `prefix` and `tuner_layer_cls`."""

    tuner_layer_cls: type[InjectedLayer]
    target_module_mapping: dict[str, list[str]] = {}  # noqa: RUF012 -- PEFT's type

    def check_target(self, target: nn.Module, name: str) -> None:
        """Raise ValueError for a module that cannot be wrapped."""

    def _create_and_replace(
        self,
        peft_config: Any,
        adapter_name: str,
        target: Any,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        **kwargs: Any,
    ) -> None:
        if isinstance(target, self.tuner_layer_cls):
            target.update_layer(adapter_name, peft_config)
            return
        self.check_target(target, current_key)
        self._replace_module(parent, target_name, self.tuner_layer_cls(target, adapter_name, peft_config), target)

    def _replace_module(self, parent: Any, child_name: str, new_module: Any, child: Any) -> None:
        # PEFT's own also hands on `weight`, which a module with several layers in it does not have.
        setattr(parent, child_name, new_module)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Hand `adapter_names` of a call (one name a row, or one for all) to every layer."""
        names = kwargs.get("adapter_names")
        if names is None:
            yield
            return
        if self.training:
            raise ValueError("adapter_names works in evaluation only, the model is in training mode")
        known = {BASE, *self.peft_config}
        unknown = sorted(set(names) - known)
        if unknown:
            raise ValueError(f"adapters {', '.join(unknown)} are not loaded, there are: {', '.join(sorted(known))}")
        if len(names) > 1:
            names = [name for name in names for _ in range(kwargs.get("num_beams") or 1)]
        layers = [module for module in self.modules() if isinstance(module, self.tuner_layer_cls)]
        handles = [layer.register_forward_pre_hook(partial(_with_names, names), with_kwargs=True) for layer in layers]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def _with_names(names: list[str], module: nn.Module, args: Any, kwargs: Any) -> Any:
    return args, {**kwargs, "adapter_names": names}


def checked(config: Any, peft_type: str, schema: int) -> None:
    """What the `__post_init__` of every config of ours does: its type, its targets, the version of its layout."""
    from peft import PeftType

    config.peft_type = PeftType(peft_type)
    if isinstance(config.target_modules, list):
        config.target_modules = set(config.target_modules)
    if config.schema_version != schema:
        raise ValueError(f"schema_version of a {peft_type} adapter is {config.schema_version}, expected {schema}")
