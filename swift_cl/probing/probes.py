"""Fresh classifiers on frozen features: pure functions of tensors."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from swift_cl.methods._heads import cosine_logits, first_rows

SCALE = 16.0
"""Of the cosine probe: with 1 the cross-entropy of many classes cannot fall (see assets/methods/seq_star.md)."""
KINDS = ("linear", "cosine", "mean_dot", "mean_cosine")


@dataclass(frozen=True)
class ProbeSettings:
    """How the learned probes are trained.

    Attributes:
        epochs: passes over the training rows.
        lr: learning rate of Adam.
        batch: rows of a step; the last one of an epoch may be smaller.
        seed: of the start values and of the order of rows.
    """

    epochs: int = 20
    lr: float = 1e-3
    batch: int = 128
    seed: int = 0


def class_means(features: Tensor, labels: Tensor, classes: int) -> Tensor:
    """The mean feature of each class, [classes, width]; zeros for a class without rows."""
    sums = torch.zeros(classes, features.shape[1], dtype=torch.float64).index_add(0, labels, features.double())
    return (sums / torch.bincount(labels, minlength=classes).clamp(min=1)[:, None]).float()


def _trained(features: Tensor, labels: Tensor, classes: int, cosine: bool, settings: ProbeSettings) -> Tensor:
    """The rows of a linear (without bias) or cosine probe after its training, [classes, width]."""
    weight = first_rows(classes, features.shape[1], False, settings.seed).requires_grad_()
    optimizer = torch.optim.Adam([weight], lr=settings.lr)
    generator = torch.Generator().manual_seed(settings.seed)
    with torch.enable_grad():
        for _ in range(settings.epochs):
            for rows in torch.split(torch.randperm(len(labels), generator=generator), settings.batch):
                logits = _logits(features[rows], weight, cosine)
                optimizer.zero_grad()
                torch.autograd.backward(functional.cross_entropy(logits, labels[rows]))
                optimizer.step()
    return weight.detach()


def _logits(features: Tensor, weight: Tensor, cosine: bool) -> Tensor:
    return cosine_logits(features, weight, SCALE) if cosine else functional.linear(features, weight)


Predict = Callable[[Tensor], Tensor]


def fit(kind: str, features: Tensor, labels: Tensor, classes: int, settings: ProbeSettings) -> Predict:
    """A probe of a kind, ready to classify.

    Args:
        features: fp32 [rows, width].
        labels: [rows], numbers below `classes`; every class has rows.

    Returns:
        features [n, width] -> classes [n].
    """
    cosine = kind in ("cosine", "mean_cosine")
    if kind.startswith("mean_"):
        weight = class_means(features, labels, classes)
    else:
        weight = _trained(features, labels, classes, cosine, settings)
    return lambda asked: _logits(asked, weight, cosine).argmax(dim=-1)
