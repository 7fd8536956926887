"""How far the rows of a new A lie in directions that others use already, and the gradient of it."""

from typing import TYPE_CHECKING

from swift_cl.lazy import LazyModule

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    torch = LazyModule("torch")

FORMS = ("squared", "l1")


def overlap(a: "Tensor", span: "Tensor", form: str) -> "tuple[Tensor, Tensor]":
    """(value, gradient with respect to `a`): the squared Frobenius norm of `a @ span`, or the sum of its absolute
    values.

    Args:
        a: [rank, in], fp32.
        span: [in, q]: the used directions as columns; for another adapter's A its transpose.
        form: one of `FORMS`.
    """
    products = a @ span
    if form == "squared":
        return products.square().sum(), 2 * products @ span.T
    return products.abs().sum(), products.sign() @ span.T
