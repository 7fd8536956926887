"""Classifier heads whose classes arrive task by task: linear and cosine, with frozen rows and a growing softmax.

Imports torch: for use inside functions of methods only.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from swift_cl.errors import UserError

HEAD = "score"
"""What transformers calls the head of a causal model that classifies, and PEFT keeps beside an adapter."""


class ClassHead(nn.Linear):
    """A head with rows that do not learn. A live `nn.Linear` becomes one by `make_head`, under its own name.

    Attributes:
        scale: s of the cosine form s <h, v> / (|h| |v|); None for the linear form.
        frozen: [classes], the rows that get no gradient.
    """

    scale: float | None
    frozen: Tensor

    def forward(self, hidden: Tensor) -> Tensor:
        """Logits [..., classes] in fp32."""
        weight = torch.where(self.frozen[:, None], self.weight.detach(), self.weight).float()
        with torch.autocast(hidden.device.type, enabled=False):
            if self.scale is None:
                return functional.linear(hidden.float(), weight)
            return cosine_logits(hidden, weight, self.scale)


def cosine_logits(hidden: Tensor, weight: Tensor, scale: float) -> Tensor:
    """scale x the cosine of each feature with each class's row, over the last axis of both."""
    return scale * functional.linear(
        functional.normalize(hidden.float(), dim=-1), functional.normalize(weight.float(), dim=-1)
    )


def head_of(model: Any) -> nn.Linear:
    """The trained head of a PEFT model for classification.

    Raises:
        UserError: it has none that is one linear layer called `score`.
    """
    wrapped = getattr(model.get_base_model(), HEAD, None)
    trained = dict(getattr(wrapped, "modules_to_save", {}))
    head = trained.get("default")
    if not isinstance(head, nn.Linear) or head.bias is not None:
        raise UserError(f"--model: {type(model.get_base_model()).__name__} has no linear classifier head '{HEAD}'")
    return head


def make_head(head: nn.Linear, scale: float | None, frozen: Sequence[int]) -> ClassHead:
    """Turn a live linear layer into a `ClassHead`; its parameter stays the same object under the same name."""
    mask = torch.zeros(head.out_features, dtype=torch.bool, device=head.weight.device)
    mask[list(frozen)] = True
    head.__class__ = ClassHead
    assert isinstance(head, ClassHead)
    head.scale = scale
    head.register_buffer("frozen", mask, persistent=False)
    return head


def first_rows(classes: int, width: int, unit: bool, seed: int) -> Tensor:
    """The rows of a new head, uniform within +-1/sqrt(width), of length 1 where `unit`."""
    generator = torch.Generator().manual_seed(seed)
    rows = (2 * torch.rand(classes, width, generator=generator) - 1) / width**0.5
    return functional.normalize(rows, dim=-1) if unit else rows


def visible_logits(logits: Tensor, visible: Tensor) -> Tensor:
    """Logits [rows, classes] in which classes that are not visible cannot win and get no gradient.

    Args:
        visible: [classes] or [rows, classes].
    """
    return logits.float().masked_fill(~visible, torch.finfo(torch.float32).min)


def expert_logits(logits: Tensor, own: Tensor, elsewhere: float) -> Tensor:
    """Logits [rows, classes] of one expert among several: those of classes that it does not know are a constant.

    Args:
        own: [classes], the expert's.
    """
    return logits.float().masked_fill(~own, elsewhere)


def class_loss(logits: Tensor, targets: Tensor, visible: Tensor) -> Tensor:
    """Sum over rows of the cross-entropy with the softmax over the visible classes."""
    return functional.cross_entropy(visible_logits(logits, visible), targets, reduction="sum")
