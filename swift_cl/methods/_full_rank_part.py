"""The layers of a model that gorp trains in full rank: which, their steps, and their place in the kept adapter.

Such a layer's own LoRA stays at zero and its weight's change is one matrix. In the adapter that is kept, the layer has
a pair of a higher rank (`rank_pattern`), whose product is that matrix, joined to the pairs of earlier tasks: a LoRA
file like any other, for the next stage, a server and a merge.
"""

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from swift_cl.errors import UserError
from swift_cl.lazy import LazyModule
from swift_cl.methods._adapter_history import scaling_of, stacked
from swift_cl.methods._adapters import TRAINED, lora_twin
from swift_cl.methods._full_rank import NAME, FullRankLayer, attach, compact, scaled_alpha
from swift_cl.methods.base import Gradients, TaskContext

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    torch = LazyModule("torch")

PREFIX = "base_model.model."
_PARTS = ("delta", "left", "right", "first", "second", "span")


class FullRankPart:
    """The layers whose name matches a pattern; none for an empty one.

    Args:
        pattern: a regular expression, found anywhere in a layer's name.
        rank, gap, scale, learning_rate: see the flags of `gorp`.
    """

    def __init__(self, pattern: str, rank: int, gap: int, scale: float, learning_rate: float) -> None:
        self._pattern, self._rank, self._gap, self._scale, self._rate = pattern, rank, gap, scale, learning_rate
        self.layers: dict[str, FullRankLayer] = {}
        self._scaling, self._rslora = 1.0, False
        self._factor = 0.0

    def attach(self, model: Any) -> None:
        """Add a matrix to every layer that matches.

        Raises:
            UserError: none does.
        """
        if not self._pattern:
            return
        from peft.tuners.lora import LoraLayer

        found = [(name, module) for name, module in model.named_modules() if isinstance(module, LoraLayer)]
        for name, module in found:
            path = name.removeprefix(PREFIX)
            if re.search(self._pattern, path):
                delta = attach(module, TRAINED)
                self.layers[path] = FullRankLayer(f"{path}.{NAME}", delta, self._rank, self._gap, self._scale)
        if not self.layers:
            shown = ", ".join(name.removeprefix(PREFIX) for name, _ in found[:3])
            known = f"{len(found)} layers with a LoRA ({shown}, ...)"
            raise UserError(f"--gorp_full_modules {self._pattern!r} matches none of the {known}")
        config = model.peft_config[TRAINED]
        self._scaling, self._rslora = scaling_of(vars(config)), bool(config.use_rslora)

    @property
    def owned(self) -> set[str]:
        """Names of the layers' own LoRA matrices, which stay as they are."""
        return {f"{path}.lora_{side}.weight" for path in self.layers for side in "AB"}

    @property
    def widths(self) -> dict[str, int]:
        """Inputs of each layer, by the name of its matrix."""
        return {layer.name: layer.delta.shape[1] for layer in self.layers.values()}

    def hold_off(self, spaces: "Mapping[str, Tensor]") -> None:
        """Keep each layer off the directions of earlier tasks, by the name of its matrix."""
        for layer in self.layers.values():
            space = spaces.get(layer.name)
            if space is not None and space.numel():
                layer.space = space.to(layer.delta.device)

    # --- training ----------------------------------------------------------------------------------------------------

    def see(self, ctx: TaskContext, grads: Gradients) -> "dict[str, Tensor]":
        """Take in the gradients of a step, and leave none of them to the Trainer's optimizer.

        Returns:
            By the name of its matrix, the rows [k, in] that a layer's step is made of.
        """

        def agree(value: "Tensor") -> "Tensor":
            # Equal gradients, but another device may give singular vectors another sign.
            return ctx.all_reduce_sum(value.clone() if ctx.rank == 0 else torch.zeros_like(value))

        rows = {}
        self._factor = ctx.schedule
        for layer in self.layers.values():
            rows[layer.name] = layer.see(grads[layer.name], ctx.seed, agree)
        for name in (*self.widths, *self.owned):
            ctx.parameters[name].grad = None
        return rows

    def move(self) -> None:
        """Take the step."""
        for layer in self.layers.values():
            layer.move(self._rate * self._factor)

    def size(self) -> "Tensor":
        """Norm of all matrices together."""
        size: Tensor = torch.stack([layer.delta.detach().norm() for layer in self.layers.values()]).norm()
        return size

    def checkpoint(self) -> "tuple[dict[str, Tensor], dict[str, int]]":
        """(tensors by part and layer, steps by layer)."""
        tensors = {f"full_{part}/{p}": t for p, layer in self.layers.items() for part, t in layer.tensors().items()}
        return tensors, {path: layer.moments.steps for path, layer in self.layers.items() if layer.moments}

    def restore(self, tensors: "Mapping[str, Tensor]", steps: Mapping[str, int]) -> None:
        """Take back what `checkpoint` gave.

        Raises:
            UserError: it is of other layers.
        """
        if steps.keys() != self.layers.keys():
            raise UserError(f"--gorp_full_modules is {self._pattern!r}, but the checkpoint has {sorted(steps)[:3]}")
        for path, layer in self.layers.items():
            layer.restore({part: tensors[f"full_{part}/{path}"] for part in _PARTS}, steps[path])

    # --- what is kept ------------------------------------------------------------------------------------------------

    def pairs(self, history: "Mapping[str, Tensor]", gain: float) -> "dict[str, Tensor]":
        """The layers' pairs by name, those of earlier tasks included; fp32.

        Args:
            history: the earlier tasks' pairs by name, empty in the first task.
            gain: scaling of the history's pairs over that of the new ones.
        """
        kept: dict[str, Tensor] = {}
        for path, layer in self.layers.items():
            name = f"{path}.lora_A.weight"
            a, b = layer.pair()
            b = b / self._scaling
            if history:
                a, b = stacked((history[name], history[lora_twin(name)] * gain), (a, b))
            if not len(a):  # not one step was taken
                a, b = a.new_zeros(1, layer.delta.shape[1]), b.new_zeros(len(b), 1)
            a, b = compact(a, b)
            kept[name], kept[lora_twin(name)] = a.contiguous(), b.contiguous()
        return kept

    def patterns(self, ranks: Mapping[str, int]) -> dict[str, Any]:
        """What adapter_config.json says of the layers.

        Args:
            ranks: of what `pairs` gave, by layer.
        """
        if not ranks:
            return {}
        # `^`: PEFT would take a name for the end of a longer one too.
        return {
            "rank_pattern": {f"^{path}": rank for path, rank in ranks.items()},
            "alpha_pattern": {
                f"^{path}": scaled_alpha(self._scaling, rank, self._rslora) for path, rank in ranks.items()
            },
        }
