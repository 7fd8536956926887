"""lamol: one model learns to answer and to generate its own training rows, which stand for earlier tasks."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from swift_cl.methods._lamol import LamolFamily, LamolFamilyConfig
from swift_cl.methods.base import Support, TaskContext, setting

if TYPE_CHECKING:
    from torch import Tensor

    from swift_cl.methods._grouped_loss import Groups

CHANNELS = {"new/qa": "qa", "pseudo/qa": "qa", "new/lm": "lm", "pseudo/lm": "lm"}


@dataclass
class LamolConfig(LamolFamilyConfig):
    """Flags of `lamol`."""

    sep_weight: float = setting(
        1.0,
        "Weight of a separator's tokens in the loss on generation rows, their other tokens being 1; >= 1, and 5 in the "
        "authors' code.",
    )

    def validate(self) -> None:
        self.check("lamol")
        if not 1 <= self.sep_weight < math.inf:
            self.fail("lamol", "sep_weight", "a number >= 1")


class Lamol(LamolFamily):
    """L = L_QA + lambda L_LM, each a token mean of cross-entropy over own and generated rows together.

    With weights the mean is sum(w l) / sum(w), as that of torch's `CrossEntropyLoss(weight)`.
    """

    name: ClassVar[str] = "lamol"
    title: ClassVar[str] = "LAMOL: language modeling for lifelong language learning"
    summary: ClassVar[str] = "the model learns to generate its own training rows, which stand for earlier tasks"
    cost: ClassVar[str] = "the loss a second time (twice the rows, generation before training)"
    paper: ClassVar[str] = "https://arxiv.org/abs/1909.03329"
    config_class: ClassVar[type[LamolFamilyConfig]] = LamolConfig
    support: ClassVar[Support] = Support(sequence_parallel=False, liger=False)
    config: LamolConfig

    def __init__(self, config: LamolConfig) -> None:
        super().__init__(config)
        self._groups: Groups | None = None

    @property
    def _weighted(self) -> bool:
        return self.config.sep_weight != 1

    def weighs_tokens(self) -> bool:
        return self._weighted

    def required_flags(self) -> Mapping[str, str]:
        return {"loss_scale": f"default+separator_weight_{self.config.sep_weight!r}"} if self._weighted else {}

    def train_begin(self, ctx: TaskContext) -> None:
        from swift_cl.methods._grouped_loss import Groups

        self._groups = Groups(CHANNELS, {"qa": 1.0, "lm": self.config.lambda_}, self._weighted)

    def window(self, ctx: TaskContext, batches: Sequence[Mapping[str, Any]]) -> None:
        assert self._groups is not None
        self._groups.window(ctx, batches)

    def loss(
        self, ctx: TaskContext, model: Any, inputs: Mapping[str, Any], loss: "Tensor", outputs: Any
    ) -> "Tensor | None":
        from swift_cl.methods._grouped_loss import answer_logits, token_losses

        assert self._groups is not None
        logits = answer_logits(self.name, inputs, outputs)
        mask, groups = self._groups.index(inputs, ctx.channels)
        losses = token_losses(logits, inputs["labels"], mask)
        if self._weighted:
            assert ctx.token_weights is not None
            losses = losses * ctx.token_weights[:, 1:][mask]
        sums = self._groups.sums(losses, groups)
        return self._groups.total(ctx, sums, self.name)
