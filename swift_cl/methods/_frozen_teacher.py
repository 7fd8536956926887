"""A frozen adapter beside the trained one, asked for logits. Imports torch: import it when it is needed."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from swift_cl.errors import UserError
from swift_cl.io import MethodState
from swift_cl.methods._adapters import AdapterSwitch, load_frozen_adapter
from swift_cl.methods._distillation import divergence_sum
from swift_cl.methods.base import TaskContext

CHUNK = 1024
"""Positions compared at a time."""


class FrozenTeacher:
    """The adapter of a folder, loaded once and never changed.

    Args:
        model: gets the adapter under `name`; what is trained and active stays so.
    """

    def __init__(self, model: Any, folder: Path, name: str) -> None:
        self._name = name
        self.sha256 = load_frozen_adapter(model, folder, name)
        self._switch = AdapterSwitch(model)

    def logits(self, ctx: TaskContext, inputs: Mapping[str, Any]) -> Tensor:
        """Its logits for exactly these inputs, without dropout and gradient."""
        given = {key: value for key, value in inputs.items() if key != "labels"}
        with torch.no_grad(), ctx.statistics_mode(), self._switch.active(self._name):
            logits: Tensor = ctx.module_for_forward(**given).logits
        return logits

    def distil(
        self,
        ctx: TaskContext,
        inputs: Mapping[str, Any],
        logits: Tensor,
        mask: Tensor,
        groups: Tensor,
        wanted: Sequence[bool],
        temperature: float,
    ) -> Tensor:
        """T^2 sum of KL(teacher || student) of the wanted groups' tokens, [groups]; 0 for the others.

        The teacher sees the lines that have such tokens; a rank without any takes part with one line, because under
        ZeRO-3 a forward needs all ranks.

        Args:
            logits: the student's, [batch, length, vocabulary].
            mask, groups: which labels count, [batch, length - 1], and the group number of each of those.
            wanted: by group number.

        Raises:
            UserError: the teacher has another vocabulary.
        """
        numbers = torch.full(mask.shape, -1, device=mask.device).masked_scatter(mask, groups)
        chosen = torch.tensor([*wanted, False], device=mask.device)[numbers]
        lines = chosen.any(dim=1).nonzero().flatten()
        asked = lines if len(lines) else torch.zeros(1, dtype=torch.long, device=mask.device)
        whole = len(asked) == len(mask)
        answered = self.logits(ctx, inputs if whole else rows_of_batch(inputs, asked))
        if answered.shape[1:] != logits.shape[1:]:
            raise UserError(
                f"the teacher's logits are {tuple(answered.shape)} and the student's {tuple(logits.shape)}; "
                "distillation needs the same vocabulary in every stage"
            )
        where = chosen[asked]
        student, teacher = logits[asked][:, :-1][where], answered[:, :-1][where]
        return distilled_sums(student, teacher, numbers[asked][where], len(wanted), temperature)

    def checkpoint_state(self) -> MethodState:
        """What a checkpoint records of it."""
        return MethodState(meta={"teacher_sha256": self.sha256})


def asked_in(
    ctx: TaskContext, batches: Sequence[Mapping[str, Any]], wanted: Callable[[str | None], bool]
) -> list[bool]:
    """By micro-batch of the step, whether any rank has a row that the teacher is asked about.

    Under ZeRO-3 a forward needs all ranks, so all must know.

    Args:
        wanted: whether rows of a channel are.
    """
    own = [any(map(wanted, batch.get("channel") or [None])) for batch in batches]
    flags = ctx.all_reduce_sum(torch.tensor(own, dtype=torch.float32, device=ctx.device))
    return [count > 0 for count in flags.tolist()]


def is_generated(channel: str | None) -> bool:
    """Whether rows of a channel stand for earlier tasks."""
    return channel is not None and channel.startswith("pseudo")


def check_same_teacher(teacher: FrozenTeacher | None, state: MethodState) -> None:
    """Refuse to go on from a checkpoint with another teacher than it had."""
    own = teacher.sha256 if teacher else None
    if state.meta["teacher_sha256"] != own:
        raise UserError(
            f"the checkpoint was trained with another teacher: sha256 {state.meta['teacher_sha256']}, now it is {own}"
        )


def rows_of_batch(inputs: Mapping[str, Any], rows: Tensor) -> dict[str, Any]:
    """Some lines of a batch; what has no line of its own stays as it is.

    Args:
        rows: their indexes.
    """
    count = inputs["labels"].shape[0]
    found: dict[str, Any] = {}
    for key, value in inputs.items():
        if key == "position_ids" and value.dim() == 3:  # one plane a dimension of multimodal positions
            found[key] = value[:, rows]
        elif isinstance(value, Tensor) and value.dim() > 0 and value.shape[0] == count:
            found[key] = value[rows]
        else:
            found[key] = value
    return found


def distilled_sums(student: Tensor, teacher: Tensor, groups: Tensor, count: int, temperature: float) -> Tensor:
    """T^2 sum of KL(teacher || student) of every group, [count].

    Args:
        student, teacher: logits of the positions that are compared, [positions, vocabulary].
        groups: group number of each position.
    """
    sums = []
    for number in range(count):
        own = groups == number
        mask = torch.ones(int(own.sum()), dtype=torch.bool, device=student.device)
        sums.append(divergence_sum(student[own], teacher[own], mask, temperature, 0, CHUNK) * temperature**2)
    return torch.stack(sums)
