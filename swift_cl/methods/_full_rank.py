"""gorp's second part: a whole weight matrix that moves by Adam steps taken in a few directions, off those of old tasks.

For a layer with the gradient G [out, in] and the directions S [in, s] of earlier tasks, per step:

    G_S = G - G S S'              first the projection, so that what follows has no part in S
    U, V                          top singular directions of G_S, found anew every `gap` steps
    P = U' G_S V                  [k, k], what Adam sees; N is its normalised step
    W moves by -lr scale U N V'

When the directions change, both moments go along: m becomes R m T and v (R o R) v (T o T), with R = U_new' U_old,
T = V_old' V_new and o the product by elements (the variance of a sum of independent numbers).

Imports torch lazily: methods import this module at their top.
"""

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from swift_cl.lazy import LazyModule
from swift_cl.methods._draws import Key, seed32

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch
    from torch import Tensor, nn
else:
    torch = LazyModule("torch")

BETAS, EPSILON = (0.9, 0.999), 1e-8  # Adam's usual ones
NAME = "gorp_full"
"""The parameter that holds what is added to a layer's weight."""
_EXACT = 512  # the smaller side up to which all singular vectors are computed
_NOTHING = 1e-5  # relative size below which a number is rounding


@dataclass
class Directions:
    """U [out, k] and V [in, k] with orthonormal columns; a column of zeros where the gradient has fewer directions."""

    left: "Tensor"
    right: "Tensor"


@dataclass
class Moments:
    """Adam's two moments [k, k] in the current directions, and the number of steps they have seen."""

    first: "Tensor"
    second: "Tensor"
    steps: int = 0

    def see(self, gradient: "Tensor") -> "Tensor":
        """Take in P; returns the normalised step N."""
        self.steps += 1
        self.first = self.first.lerp(gradient, 1 - BETAS[0])
        self.second = self.second.lerp(gradient.square(), 1 - BETAS[1])
        first = self.first / (1 - BETAS[0] ** self.steps)
        second = self.second / (1 - BETAS[1] ** self.steps)
        return first / (second.sqrt() + EPSILON)

    def carry(self, old: Directions, new: Directions) -> None:
        """Write the moments in other directions."""
        rows, columns = new.left.T @ old.left, old.right.T @ new.right
        self.first = (rows @ self.first @ columns).contiguous()
        self.second = (rows.square() @ self.second @ columns.square()).contiguous()


def top_directions(gradient: "Tensor", space: "Tensor | None", rank: int, *key: Key) -> Directions:
    """The singular directions of the largest values.

    Args:
        gradient: [out, in], without its part in `space`.
        space: [in, s], orthonormal; V is kept off it also where the gradient itself is rounding.
        key: of a large matrix, whose directions come from random starts.
    """
    small = min(gradient.shape)
    rank = min(rank, small)
    if small <= _EXACT:
        left, values, right = torch.linalg.svd(gradient, full_matrices=False)
        right = right.T
    else:
        devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(seed32("gorp", *key))
            left, values, right = torch.svd_lowrank(gradient, q=min(rank + 8, small), niter=4)
    left, values, right = left[:, :rank], values[:rank], right[:, :rank]
    if space is not None:
        right = right - space @ (space.T @ right)
    norms = right.norm(dim=0)
    real = (values > _NOTHING * values.max()) & (norms > 0.5)
    right = torch.where(real, right / norms.clamp(min=0.5), torch.zeros_like(right))
    left = torch.where(real, left, torch.zeros_like(left))
    # In the layout that a checkpoint brings back: a product of other strides rounds otherwise.
    return Directions(left.contiguous(), right.contiguous())


@dataclass
class FullRankLayer:
    """One layer's matrix.

    Attributes:
        delta: what is added to the layer's weight, [out, in], fp32.
        space: S of earlier tasks, [in, s]; None where nothing is held off.
        span: orthonormal basis [in, q] of every direction that `delta` has moved along.
    """

    name: str
    delta: "nn.Parameter"
    rank: int
    gap: int
    scale: float
    space: "Tensor | None" = None
    directions: Directions | None = None
    moments: Moments | None = None
    span: "Tensor" = field(default_factory=lambda: torch.zeros(0, 0))
    _step: "Tensor | None" = None

    def see(self, gradient: "Tensor", seed: int, agree: "Callable[[Tensor], Tensor]") -> "Tensor":
        """Take in a gradient [out, in]; the step waits for `move`.

        Args:
            agree: gives every rank the first one's value.

        Returns:
            P V', [k, in]: the rows whose directions are this step's.
        """
        if self.space is not None:
            gradient = gradient - (gradient @ self.space) @ self.space.T
        steps = self.moments.steps if self.moments else 0
        if self.directions is None or self.moments is None or steps % self.gap == 0:
            found = top_directions(gradient, self.space, self.rank, seed, self.name, steps)
            found = Directions(agree(found.left), agree(found.right))
            if self.directions is None or self.moments is None:
                size = (found.left.shape[1], found.right.shape[1])
                self.moments = Moments(gradient.new_zeros(size), gradient.new_zeros(size))
            else:
                self.moments.carry(self.directions, found)
            self.directions = found
            if self.span.shape[1] < min(self.delta.shape):
                self.span = widened_span(self.span.to(gradient.device), found.right)
        seen = self.directions.left.T @ gradient @ self.directions.right
        # In directions of its own, P is diagonal; Adam would make whole steps of what rounding leaves beside that.
        seen = torch.where(seen.abs() > _NOTHING * seen.abs().max(), seen, torch.zeros_like(seen))
        self._step = self.moments.see(seen)
        return seen @ self.directions.right.T

    def move(self, learning_rate: float) -> None:
        """Take the step that `see` computed."""
        assert self.directions is not None
        assert self._step is not None
        change = self.directions.left @ self._step @ self.directions.right.T
        with torch.no_grad():
            self.delta.sub_(change.to(self.delta.dtype), alpha=learning_rate * self.scale)
        self._step = None

    def moment(self) -> "Tensor":
        """Rows [k, in] with the singular values and right singular vectors of the first moment U m V'."""
        if self.directions is None or self.moments is None:
            return torch.zeros(0, self.delta.shape[1])
        return self.moments.first @ self.directions.right.T

    def pair(self) -> "tuple[Tensor, Tensor]":
        """(A [r, in], B [out, r]) with B A the matrix, exact up to rounding; fp32, on the CPU."""
        delta, span = self.delta.detach().float().cpu(), self.span.float().cpu()
        if 0 < span.shape[1] < min(delta.shape):
            return span.T.contiguous(), delta @ span
        return compact(torch.eye(delta.shape[1]), delta) if self.moments else (delta[:0], delta[:, :0])

    # --- a checkpoint ------------------------------------------------------------------------------------------------

    def tensors(self) -> "dict[str, Tensor]":
        """All that a resumed run needs beside `steps`."""
        if self.directions is None or self.moments is None:
            return {}
        found = {
            "delta": self.delta, "left": self.directions.left, "right": self.directions.right,
            "first": self.moments.first, "second": self.moments.second, "span": self.span,
        }  # fmt: skip
        return {name: tensor.detach().cpu().contiguous() for name, tensor in found.items()}

    def restore(self, tensors: "dict[str, Tensor]", steps: int) -> None:
        """Take back what `tensors` gave."""
        device = self.delta.device
        kept = {name: tensor.to(device) for name, tensor in tensors.items()}
        with torch.no_grad():
            self.delta.copy_(kept["delta"])
        self.directions = Directions(kept["left"], kept["right"])
        self.moments, self.span = Moments(kept["first"], kept["second"], steps), kept["span"]


def widened_span(span: "Tensor", directions: "Tensor") -> "Tensor":
    """An orthonormal basis of the columns of both; all of the space's own directions once it is full."""
    if not span.numel():
        span = directions.new_zeros(len(directions), 0)
    rest = directions
    for _ in range(2):  # the second time takes out what rounding left
        rest = rest - span @ (span.T @ rest)
    left, values, _ = torch.linalg.svd(rest, full_matrices=False)
    return torch.cat([span, left[:, values > _NOTHING]], dim=1).contiguous()


def compact(a: "Tensor", b: "Tensor") -> "tuple[Tensor, Tensor]":
    """The pair itself, or one with the same product whose rank is the matrix's smaller side."""
    if len(a) <= min(a.shape[1], len(b)):
        return a, b
    product = b @ a
    if a.shape[1] <= len(b):
        return torch.eye(a.shape[1], dtype=a.dtype), product
    return product, torch.eye(len(b), dtype=b.dtype)


def attach(layer: Any, adapter: str) -> "nn.Parameter":
    """Add a trained matrix, zero at first, to a LoRA layer of PEFT's; it counts wherever `adapter` is active."""
    weight = layer.lora_A[adapter].weight
    size = (layer.out_features, layer.in_features)
    delta = torch.nn.Parameter(torch.zeros(size, dtype=torch.float32, device=weight.device))
    layer.register_parameter(NAME, delta)

    def add(module: Any, arguments: "tuple[Tensor, ...]", output: "Tensor") -> "Tensor":
        if module.disable_adapters or adapter not in module.active_adapters:
            return output
        added = torch.nn.functional.linear(arguments[0].to(delta.dtype), delta)
        return output + added.to(output.dtype)

    layer.register_forward_hook(add)
    return delta


def scaled_alpha(scaling: float, rank: int, rslora: bool) -> float:
    """The lora_alpha that gives a layer of this rank the scaling."""
    return scaling * (math.sqrt(rank) if rslora else rank)
