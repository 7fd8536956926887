"""Directions on the input side of a layer that a task's gradients use: how many are kept, and a sketch of all of them.

Imports torch lazily: methods import this module at their top.
"""

from typing import TYPE_CHECKING

from swift_cl.lazy import LazyModule

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    torch = LazyModule("torch")

_ROUNDING = 1e-9


def grown(
    space: "Tensor", energy: "Tensor", matrix: "Tensor", eps: float, limit: int
) -> "tuple[Tensor, Tensor, float]":
    """Add the fewest directions of `matrix` that bring what `space` explains of it to the share eps.

    Args:
        space: [in, s], orthonormal columns.
        energy: [s], what each of them stands for.
        matrix: [rows, in], gradients or their moment.
        limit: columns kept; beyond it those of the least energy go.

    Returns:
        The space, its energies, and the share of the energy that the limit left; fp32, each column's largest entry
        positive, so that every rank and run writes the same signs.
    """
    rows = matrix.double()
    base = space.double()
    inside = rows @ base
    rest = rows - inside @ base.T
    total, explained = rows.square().sum(), inside.square().sum()
    _, singular, right = torch.linalg.svd(rest, full_matrices=False)
    gains = singular.square()
    wanted = eps * total * (1 - _ROUNDING)
    count = 0
    while count < len(gains) and explained < wanted:
        explained = explained + gains[count]
        count += 1
    joined = torch.cat([base, right[:count].T], dim=1)
    energies = torch.cat([energy.double(), gains[:count]])
    whole = energies.sum()
    if joined.shape[1] > limit:
        best = energies.argsort(descending=True, stable=True)[:limit].sort().values
        joined, energies = joined[:, best], energies[best]
    if joined.shape[1]:
        joined, triangle = torch.linalg.qr(joined)  # takes out what rounding left of earlier columns
        joined = joined * torch.where(triangle.diagonal() < 0, -1.0, 1.0)
        largest = joined.gather(0, joined.abs().argmax(dim=0, keepdim=True))
        joined = joined * torch.where(largest < 0, -1.0, 1.0)
    share = float(energies.sum() / whole) if whole > 0 else 1.0
    return joined.float(), energies.float(), share


class Sketch:
    """Frequent Directions (Liberty 2013): at most `size` rows whose squares come close to those of all rows added.

    For every direction x, 0 <= |A x|^2 - |sketch x|^2 <= 2 |A|_F^2 / size.
    """

    def __init__(self, size: int, width: int) -> None:
        self._size, self._rows = size, torch.zeros(0, width)

    def add(self, rows: "Tensor") -> None:
        """Take in [n, width] rows."""
        for part in torch.split(rows.float(), max(1, self._size // 2)):
            if len(self._rows) + len(part) > self._size:
                self._shrink()
            self._rows = torch.cat([self._rows, part])

    def _shrink(self) -> None:
        _, singular, right = torch.linalg.svd(self._rows.double(), full_matrices=False)
        half = self._size // 2
        squares = singular.square()
        cut = squares[half - 1] if len(squares) >= half else squares.new_zeros(())
        left = (squares - cut).clamp(min=0)[: half - 1 if len(squares) >= half else len(squares)]
        self._rows = (left.sqrt()[:, None] * right[: len(left)]).float()

    def rows(self) -> "Tensor":
        """The rows, [at most size, width]."""
        return self._rows

    def restore(self, rows: "Tensor") -> None:
        """Take back what `rows` gave."""
        self._rows = rows.clone()
