"""The loss of pcll: groups of tokens, the divergence of codes, and what the teacher says of generated rows.

Imports torch: methods import this module when they run, not at their top.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from swift_cl.generation.steering import steered
from swift_cl.methods._frozen_teacher import FrozenTeacher, asked_in, distilled_sums, is_generated, rows_of_batch
from swift_cl.methods._grouped_loss import Groups, token_losses
from swift_cl.methods._latent import Heads, Latent, before_answer, beta, last_states, noise, real
from swift_cl.methods.base import TaskContext

REC, QA = ("new/rec", "pseudo/rec"), ("new/qa", "pseudo/qa")
ANSWERS = ("new/rec", "new/qa", "pseudo/rec", "pseudo/qa")
WHOLE = ("new/all", "pseudo/all")
Channels = Sequence[str | None] | None


def whole_rows(inputs: Mapping[str, Any], channels: Channels) -> dict[str, Any]:
    """The batch with every real token of its question rows as a label."""
    question = [(channel or QA[0]) in QA for channel in channels or [None] * len(inputs["labels"])]
    chosen = real(dict(inputs)) & torch.tensor(question, device=inputs["labels"].device).unsqueeze(1)
    return {**inputs, "labels": inputs["input_ids"].masked_fill(~chosen, -100)}


@dataclass(frozen=True)
class Drawn:
    """The codes of a micro-batch.

    Attributes:
        lines: the rows that teach to generate; one stand-in, whose code counts nothing, where there are none.
        latent: of those.
        vectors: what is added to the embeddings, 0 for other rows, [rows, width].
        where: the positions that get it, None for all.
        counts: whether each of `lines` is none of the stand-in.
    """

    lines: Tensor
    latent: Latent
    vectors: Tensor
    where: Tensor | None
    counts: Tensor

    @classmethod
    def of(
        cls,
        ctx: TaskContext,
        inputs: Mapping[str, Any],
        heads: Heads,
        seed_of: Callable[[list[int]], int],
        alpha: float,
        base: bool,
        everywhere: bool,
    ) -> "Drawn":
        """Encode and draw.

        Args:
            seed_of: of a row's tokens, so that a row has the same noise in every batch.
            base: whether the base model encodes.
            everywhere: whether the code is added to the answer's embeddings too.
        """
        ids = inputs["input_ids"]
        channels = list(ctx.channels or [None] * len(ids))
        found = [line for line, channel in enumerate(channels) if channel in REC]
        lines = torch.tensor(found or [0], device=ids.device)
        own = rows_of_batch(inputs, lines)
        mask, prompt = real(own), before_answer(own)
        seeds = [seed_of(row[kept].tolist()) for row, kept in zip(own["input_ids"], mask, strict=True)]
        drawn = noise(seeds, heads.prior_mean.out_features).to(ids.device)
        with torch.autocast(ids.device.type, enabled=False):
            latent = Latent(*heads(last_states(ctx, own, base), prompt if found else mask, mask, drawn))
        counts = torch.full((len(lines),), float(bool(found)), device=ids.device)
        added = alpha * latent.added * counts.unsqueeze(1)
        vectors = torch.zeros(len(ids), added.shape[1], device=ids.device).index_add(0, lines, added)
        # DDP takes a parameter that the model's outputs do not depend on for one that gets no gradient.
        vectors = vectors + 0 * latent.kl.sum()
        where = None if everywhere else before_answer(dict(inputs))
        return cls(lines, latent, vectors, where, counts)

    def added(self, model: Any, rows: Tensor | None = None) -> AbstractContextManager[None]:
        """Within it these codes reach the embeddings of the batch, or of some of its rows."""
        where = self.where if rows is None or self.where is None else self.where[rows]
        return steered(model, self.vectors if rows is None else self.vectors[rows].detach(), where)


class CodeLoss:
    """Of a `PcllConfig`."""

    def __init__(self, config: Any) -> None:
        self._config = config
        lm = config.lm_weight
        weights = {name: 1.0 if name in REC else lm for name in ANSWERS}
        self._answers = Groups({name: name for name in ANSWERS}, weights)
        of_row = {name: WHOLE[0] if name.startswith("new") else WHOLE[1] for name in ANSWERS}
        self._whole = Groups(of_row, dict.fromkeys(WHOLE, lm * config.gen_weight))
        self._rows = torch.zeros(2)
        self._micro_batches = 1
        self._teach: list[bool] = []  # by coming micro-batch, whether any rank asks the teacher

    def window(self, ctx: TaskContext, batches: Sequence[Mapping[str, Any]]) -> None:
        """Count tokens and rows over the step."""
        self._answers.window(ctx, batches)
        self._whole.window(ctx, [whole_rows(batch, batch.get("channel")) for batch in batches])
        channels = [channel for batch in batches for channel in batch.get("channel") or ()]
        rows = torch.tensor([float(channels.count(name)) for name in REC], device=ctx.device)
        self._rows = ctx.all_reduce_sum(rows)
        self._micro_batches = len(batches)
        self._teach = asked_in(ctx, batches, is_generated) if self._config.kd_alpha > 0 else [False] * len(batches)

    def of(
        self, ctx: TaskContext, inputs: Mapping[str, Any], logits: Tensor, drawn: Drawn, teacher: FrozenTeacher | None
    ) -> Tensor:
        """The loss of a micro-batch."""
        whole = whole_rows(inputs, ctx.channels)
        answered = self._asked(ctx, inputs, drawn, teacher)
        total = self._answers.total(ctx, self._sums(self._answers, ctx, inputs, logits, answered), "pcll")
        total = total + self._whole.total(ctx, self._sums(self._whole, ctx, whole, logits, answered), "pcll")
        return total + self.divergence_term(ctx, self._divergences(ctx, drawn))

    def _asked(
        self, ctx: TaskContext, inputs: Mapping[str, Any], drawn: Drawn, teacher: FrozenTeacher | None
    ) -> tuple[Tensor, Tensor] | None:
        """(rows, the teacher's logits of them): generated rows, with the student's codes; None where there are none.

        A rank without any takes part with one row, because under ZeRO-3 a forward needs all ranks.
        """
        lines = [line for line, channel in enumerate(ctx.channels or ()) if is_generated(channel)]
        if not self._teach.pop(0) or teacher is None:
            return None
        rows = torch.tensor(lines or [0], device=inputs["labels"].device)
        with drawn.added(ctx.model, rows):
            logits = teacher.logits(ctx, rows_of_batch(inputs, rows))
        return (rows, logits) if lines else None

    def _sums(
        self,
        groups: Groups,
        ctx: TaskContext,
        inputs: Mapping[str, Any],
        logits: Tensor,
        answered: tuple[Tensor, Tensor] | None,
    ) -> Tensor:
        """Token losses of every group: cross-entropy, of generated rows mixed with the teacher's distributions."""
        mask, numbers = groups.index(inputs, ctx.channels)
        sums = groups.sums(token_losses(logits, inputs["labels"], mask), numbers)
        if answered is None:
            return sums
        rows, teacher = answered
        config = self._config
        where, number = mask[rows], torch.full(mask.shape, -1, device=mask.device).masked_scatter(mask, numbers)[rows]
        student = logits[rows][:, :-1][where]
        soft = distilled_sums(student, teacher[:, :-1][where], number[where], len(groups.names), config.kd_temperature)
        mixed = (1 - config.kd_alpha) * sums + config.kd_alpha * soft
        generated = torch.tensor([is_generated(name) for name in groups.names], device=sums.device)
        return torch.where(generated, mixed, sums)

    def _divergences(self, ctx: TaskContext, drawn: Drawn) -> Tensor:
        """Sums of KL(posterior || prior) of new and of generated rows, [2]."""
        channels = list(ctx.channels or ())
        groups = [
            REC.index(channels[line]) if channels and channels[line] in REC else 0 for line in drawn.lines.tolist()
        ]
        index = torch.tensor(groups, device=drawn.lines.device)
        return torch.zeros(2, device=index.device).index_add(0, index, drawn.latent.kl * drawn.counts)

    def divergence_term(self, ctx: TaskContext, sums: Tensor) -> Tensor:
        """Their means over the step's rows, times the weight of this step."""
        config, rows = self._config, self._rows.clamp(min=1)
        weight = beta(ctx.step, max(ctx.max_steps, 1), config.beta_cycles, config.beta_ratio)
        ctx.log("pcll_kl", (sums.detach() / rows).sum() * self._micro_batches * ctx.world_size)
        ctx.log("pcll_beta", weight)
        mean: Tensor = ctx.window_mean(sums, rows).sum()
        weighted: Tensor = config.kl_weight * weight * mean
        return weighted
