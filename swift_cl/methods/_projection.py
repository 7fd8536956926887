"""The gradient projection of GEM and A-GEM: a quadratic program in as many variables as there are earlier tasks.

    min over z of |g - z|^2 / 2   with   z.g_k >= 0 for every earlier task k
    dual:  min over v >= 0 of v'Pv / 2 + q'v   with   P_kj = g_k.g_j,  q_k = g_k.g,   and then   z = g + sum_k v_k g_k

The rows of G are +g_k; with the sign printed in the A-GEM paper the same formulas give v = 0.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray
else:
    from swift_cl.lazy import LazyModule

    np = LazyModule("numpy")
    torch = LazyModule("torch")

LARGEST_WEIGHT = 1e6
FALLBACK_RIDGE = 1e-3
_COLUMNS_AT_ONCE = 1 << 20


def gram(vectors: "Sequence[torch.Tensor]") -> "torch.Tensor":
    """All dot products in fp64, without an fp64 copy of the vectors; no device synchronisation."""
    first = vectors[0]
    products = torch.zeros(len(vectors), len(vectors), dtype=torch.float64, device=first.device)
    for start in range(0, first.numel(), _COLUMNS_AT_ONCE):
        part = torch.stack([vector[start : start + _COLUMNS_AT_ONCE] for vector in vectors]).double()
        products += part @ part.T
    return products


@dataclass(frozen=True)
class Solution:
    """How much of each memory gradient is added to g, and whether the first solution was too large to use."""

    weights: "NDArray[np.float64]"
    fell_back: bool = False


def gem_weights(
    products: "NDArray[np.float64]", against: "NDArray[np.float64]", margin: float, ridge: float
) -> Solution:
    """The dual solution v >= margin.

    Args:
        products: P, the dot products of the memory gradients.
        against: q, their dot products with g.
        ridge: relative to the mean of P's diagonal, because gradients of large models make P as small as 1e-4.
    """
    values = _solve(products, against, margin, ridge)
    if values.max() <= LARGEST_WEIGHT:
        return Solution(values)
    return Solution(_solve(products, against, margin, FALLBACK_RIDGE), fell_back=True)


def _solve(
    products: "NDArray[np.float64]", against: "NDArray[np.float64]", margin: float, ridge: float
) -> "NDArray[np.float64]":
    from scipy.optimize import nnls

    count = len(against)
    scale = np.trace(products) / count
    scaled, linear = products / scale + ridge * np.eye(count), against / scale
    # v = margin + u with u >= 0, and u'(LL')u / 2 + c'u is |L'u + L^-1 c|^2 / 2 up to a constant.
    shifted = linear + scaled @ np.full(count, margin)
    factor = np.linalg.cholesky(scaled)
    rest, _ = nnls(factor.T, -np.linalg.solve(factor, shifted), maxiter=100 * count)
    result: NDArray[np.float64] = rest + margin
    return result


def agem_weight(square: float, against: float) -> float:
    """The multiple of g_ref to add so that the product with it, which is negative, becomes zero."""
    return -against / square
