"""Tensors by parameter name inside a `MethodState`: groups of them, and the check that they fit the current model."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from swift_cl.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

Shapes = dict[str, list[int]]


def shapes_of(tensors: "Mapping[str, Tensor]") -> Shapes:
    """Names and shapes as JSON."""
    return {name: list(tensor.shape) for name, tensor in tensors.items()}


def check_shapes(method: str, found: Shapes, current: Shapes) -> None:
    """Refuse a state whose parameters differ from the current ones (another rank, other target modules).

    Args:
        method: whose state it is.
        found: names and shapes in the state.
        current: names and shapes of the trained parameters.

    Raises:
        UserError: with the first five differences.
    """
    differences = [
        f"{name}: {found.get(name, 'absent')} in the state, {current.get(name, 'absent')} now"
        for name in sorted(found.keys() | current.keys())
        if found.get(name) != current.get(name)
    ]
    if differences:
        shown = "; ".join(differences[:5])
        raise UserError(
            f"the state of method '{method}' does not fit the trained parameters, {len(differences)} differ: {shown}; "
            "every stage needs the same tuner, rank and target modules"
        )


def pack(**groups: "Mapping[str, Tensor]") -> "dict[str, Tensor]":
    """`pack(anchor={"a": t})` -> `{"anchor/a": t}`."""
    return {f"{group}/{name}": tensor for group, tensors in groups.items() for name, tensor in tensors.items()}


def unpack(tensors: "Mapping[str, Tensor]", group: str) -> "dict[str, Tensor]":
    """One group of what `pack` joined."""
    prefix = f"{group}/"
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
