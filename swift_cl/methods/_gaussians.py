"""Tasks as Gaussians of one covariance over the features of their questions, and the distance of a question to each."""

from typing import TYPE_CHECKING

from swift_cl.errors import UserError
from swift_cl.lazy import LazyModule

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    torch = LazyModule("torch")


def mean_and_scatter(features: "Tensor") -> "tuple[Tensor, Tensor]":
    """(mean [width] fp64, sum of the outer products of what differs from it [width, width] fp64) of one task's rows.

    Args:
        features: [rows, width].
    """
    rows = features.double()
    mean = rows.mean(dim=0)
    centred = rows - mean
    return mean, centred.T @ centred


def shrunk_covariance(scatter: "Tensor", rows: int, shrinkage: float) -> "Tensor":
    """(1 - rho) S / N + rho (tr(S / N) / width) I: invertible for every rho in (0, 1] unless S is zero.

    Args:
        scatter: S, the sum of every task's own; [width, width] fp64.
        rows: N, the number of rows of all tasks.

    Raises:
        UserError: S is zero.
    """
    covariance = scatter / rows
    width = len(covariance)
    spread = covariance.trace() / width
    if not spread > 0:
        raise UserError("within each task all questions look alike to the model, so they have no covariance")
    return (1 - shrinkage) * covariance + shrinkage * spread * torch.eye(width, dtype=torch.float64)


def squared_distances(features: "Tensor", means: "Tensor", covariance: "Tensor | None") -> "Tensor":
    """(q - mu)' Sigma^-1 (q - mu) of every question and task, fp64 [questions, tasks]; Euclidean without a covariance.

    Args:
        features: q, [questions, width].
        means: mu, [tasks, width].
    """
    apart = features.double()[:, None] - means.double()[None]
    if covariance is None:
        return apart.square().sum(dim=-1)
    factor = torch.linalg.cholesky(covariance)
    flat = apart.reshape(-1, apart.shape[-1]).T
    whitened: Tensor = torch.linalg.solve_triangular(factor, flat, upper=False)
    return whitened.square().sum(dim=0).view(apart.shape[:2])
