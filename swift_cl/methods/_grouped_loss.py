"""A loss of several parts, each the mean over its own tokens of the optimizer step (rows are tagged by `channel`).

L = sum over groups g of w_g S_g / n_g: S_g sums the token losses of g, n_g counts its tokens over all micro-batches and
ranks. A mean of micro-batch means would weigh a token by how many of its kind happen to lie beside it. Where tokens
have weights w, S_g sums w times the loss and n_g sums w.
Imports torch: methods import this module when they run, not at their top.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from swift_cl.errors import UserError
from swift_cl.methods.base import TaskContext

UNTAGGED = "new/qa"


def token_rows(batch: Mapping[str, Any], rows: int) -> Tensor:
    """Which row every label belongs to, [batch, length - 1], as `labels[:, 1:]`.

    With one row a line of the batch that is the line; packed rows begin where position ids begin anew. Labels whose
    logits ms-swift does not compute (`logits_to_keep`) have been cut out of the batch already.

    Args:
        rows: how many rows the batch has.

    Raises:
        UserError: packed rows cannot be told apart.
    """
    labels: Tensor = batch["labels"]
    if labels.shape[0] == rows:
        return torch.arange(rows, device=labels.device).unsqueeze(1).expand(-1, labels.shape[1] - 1)
    positions = batch.get("position_ids")
    if labels.shape[0] != 1 or positions is None:
        raise UserError(f"{rows} rows lie in a batch of shape {tuple(labels.shape)} without position ids")
    begins: Tensor = positions.reshape(-1, positions.shape[-1])[0] == 0
    if int(begins.sum()) < rows:
        raise UserError(f"{rows} rows lie in a batch whose position ids begin {int(begins.sum())} times")
    number = (begins.cumsum(0) - 1).clamp(max=rows - 1)  # padding may begin anew; its labels do not count
    kept = batch.get("logits_to_keep")
    if isinstance(kept, Tensor):
        # The logits of position p are kept where the label of p + 1 counts; the last position always is.
        following: Tensor = number[1:][kept[:-1]]
    elif isinstance(kept, int):
        following = number[-labels.shape[1] :][1:]
    else:
        following = number[1:]
    return following.unsqueeze(0)


class Groups:
    """Token groups with their weights, and their sizes in the coming optimizer step.

    Args:
        of_channel: channel of a row -> name of its group.
        weights: weight of every group.
        weighted: whether tokens have weights too (`loss_scale` of the batches, `ctx.token_weights`); the token losses
            that `sums` gets are then multiplied by them.
    """

    def __init__(self, of_channel: Mapping[str, str], weights: Mapping[str, float], weighted: bool = False) -> None:
        self.names = list(weights)
        self.weights = weights
        self._weighted = weighted
        self._number = {channel: self.names.index(group) for channel, group in of_channel.items()}
        self._sizes: Tensor | None = None
        self._micro_batches = 1

    def index(self, batch: Mapping[str, Any], channels: Sequence[str | None] | None) -> tuple[Tensor, Tensor]:
        """(mask of the labels that count, group number of each of those), of `labels[:, 1:]`."""
        mask = batch["labels"][:, 1:] != -100
        channels = [None] * len(mask) if channels is None else channels
        numbers = torch.tensor([self._number[channel or UNTAGGED] for channel in channels], device=mask.device)
        return mask, numbers[token_rows(batch, len(channels))][mask]

    def window(self, ctx: TaskContext, batches: Sequence[Mapping[str, Any]]) -> None:
        """Count every group's tokens over all micro-batches and ranks."""
        sizes = torch.zeros(len(self.names), device=ctx.device)
        for batch in batches:
            mask, groups = self.index(batch, batch.get("channel"))
            weights = batch["loss_scale"][:, 1:][mask] if self._weighted else None
            sizes += torch.bincount(groups, weights, minlength=len(self.names)).to(ctx.device)
        self._sizes = ctx.all_reduce_sum(sizes)
        self._micro_batches = len(batches)

    def sums(self, losses: Tensor, groups: Tensor) -> Tensor:
        """S_g of every group from token losses, [groups]."""
        return torch.zeros(len(self.names), device=losses.device).index_add(0, groups, losses)

    def total(self, ctx: TaskContext, sums: Tensor, label: str) -> Tensor:
        """The loss of a micro-batch from its S_g; logs every group's mean over the step."""
        assert self._sizes is not None
        # A group without tokens in the whole step adds nothing.
        means = ctx.window_mean(sums, self._sizes.clamp(min=1))
        for number, name in enumerate(self.names):
            # Logged values are averaged over micro-batches and ranks; together they give the step's mean.
            share = sums[number].detach() * self._micro_batches * ctx.world_size
            ctx.log(f"{label}_{name.replace('/', '_')}", share / self._sizes[number].clamp(min=1))
        return (means * torch.tensor(list(self.weights.values()), device=means.device)).sum()


def answer_logits(method: str, inputs: Mapping[str, Any], outputs: Any) -> Tensor:
    """The logits, checked to be there for every label, [batch, length, vocabulary].

    Raises:
        UserError: they are missing or do not fit the labels.
    """
    logits: Tensor | None = getattr(outputs, "logits", None)
    labels = inputs["labels"]
    if logits is None or logits.shape[:2] != labels.shape[:2]:
        found = "none" if logits is None else f"{tuple(logits.shape[:2])} for labels {tuple(labels.shape)}"
        raise UserError(f"method '{method}' needs the model's logits at every label, found {found}")
    return logits


def token_losses(logits: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
    """Cross-entropy of every label that counts, fp32; logits at position p predict token p + 1."""
    return torch.nn.functional.cross_entropy(logits[:, :-1][mask].float(), labels[:, 1:][mask], reduction="none")
