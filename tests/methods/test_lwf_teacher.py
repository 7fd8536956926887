"""The teacher of lwf on a real model: who it is, that it stays what it was, and T6 of the specification."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from swift_cl.errors import RunFailure, UserError
from swift_cl.io import sha256_file
from swift_cl.methods.lwf import Lwf, LwfConfig
from tests.support.fake_context import FakeContext
from tests.support.tiny_lora import continued, language_model, stage_adapter


def divergence(student: Tensor, teacher: Tensor) -> Tensor:
    """KL per position at temperature 2."""
    p, q = (torch.softmax(z / 2.0, dim=-1) for z in (teacher, student))
    return (p * (p.log() - q.log())).sum(dim=-1)


class Quiet(FakeContext):
    """Switches dropout off in statistics mode, and pads rows to one length on the chosen side."""

    side = "right"

    @contextmanager
    def statistics_mode(self) -> Iterator[None]:
        assert self.model is not None
        dropouts = [m for m in self.model.modules() if isinstance(m, nn.Dropout)]
        rates = [m.p for m in dropouts]
        for m in dropouts:
            m.p = 0.0
        yield
        for m, rate in zip(dropouts, rates, strict=True):
            m.p = rate

    def collate(self, encoded: Any) -> dict[str, Tensor]:
        length = max(len(row["labels"]) for row in encoded)
        batch: dict[str, list[list[int]]] = {"input_ids": [], "attention_mask": [], "labels": []}
        for row in encoded:
            padding = length - len(row["labels"])
            for key, filler in (("input_ids", 0), ("attention_mask", 0), ("labels", -100)):
                content = row.get(key, [1] * len(row["labels"]))
                pad = [filler] * padding
                batch[key].append(pad + content if self.side == "left" else content + pad)
        return {key: torch.tensor(value) for key, value in batch.items()}


def rows_of(*lengths: int) -> list[dict[str, list[int]]]:
    random = torch.Generator().manual_seed(3)
    tokens = [torch.randint(1, 64, (length,), generator=random).tolist() for length in lengths]
    return [{"input_ids": row, "labels": [-100] * 2 + row[2:]} for row in tokens]


def later_stage(folder: Path, config: LwfConfig | None = None) -> tuple[Lwf, Quiet, Any]:
    model = continued(folder)
    ctx = Quiet(model, earlier=["gone", "t0"], folder=folder)  # the teacher is of the latest task
    ctx.rows = rows_of(5, 9, 3, 7, 4)
    method = Lwf(config or LwfConfig())
    method.prepare_model(ctx, model)
    return method, ctx, model


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("size", [1, 4])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_t6_student_equals_teacher_at_the_first_step(side: str, size: int, dropout: float, tmp_path: Path) -> None:
    stage_adapter(tmp_path, lora_dropout=dropout)
    method, ctx, model = later_stage(tmp_path)
    ctx.side = side
    method.train_begin(ctx)  # has the check pass in it
    order = torch.randperm(5, generator=torch.Generator().manual_seed(0)).tolist()
    for first in range(0, 5, size):
        inputs = ctx.collate([ctx.rows[i] for i in order[first : first + size]])
        with ctx.statistics_mode():
            outputs = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])
        found = method.loss(ctx, model, inputs, torch.tensor(0.0), outputs)
        assert found is not None
        assert abs(found.item()) < 1e-6


def test_the_term_sees_a_student_that_moved_and_pulls_only_it(tmp_path: Path) -> None:
    stage_adapter(tmp_path, lora_dropout=0.5)
    method, ctx, model = later_stage(tmp_path)
    method.train_begin(ctx)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with torch.no_grad():
        for name, parameter in ctx.parameters.items():
            parameter.add_(0.5)
            before[name] = parameter.detach().clone()
    inputs = ctx.collate(ctx.rows)
    outputs = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])
    found = method.loss(ctx, model, inputs, torch.tensor(0.0), outputs)
    assert found is not None
    assert found.item() > 1e-3
    found.backward()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name])
        moves = parameter.grad is not None and bool(parameter.grad.any())
        assert moves == ("default" in name), name
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    assert layer.active_adapters == ["default"]
    assert layer.lora_dropout["default"].p == 0.5


def test_the_check_fails_for_a_stage_that_started_elsewhere(tmp_path: Path) -> None:
    stage_adapter(tmp_path)
    method, ctx, _ = later_stage(tmp_path)
    with torch.no_grad():
        next(iter(ctx.parameters.values())).add_(0.5)
    with pytest.raises(RunFailure, match="did not start from"):
        method.train_begin(ctx)
    ctx.step = 3  # a resumed run has moved on
    method.train_begin(ctx)


def test_base_as_teacher_of_the_first_task(tmp_path: Path) -> None:
    stage_adapter(tmp_path)
    model = continued(tmp_path)
    ctx = Quiet(model)
    ctx.rows = rows_of(5, 6)
    method = Lwf(LwfConfig(first_task="base"))
    method.prepare_model(ctx, model)
    method.train_begin(ctx)  # the student does not start as the base, and need not
    inputs = ctx.collate(rows_of(6, 6))
    forward = {key: inputs[key] for key in ("input_ids", "attention_mask")}
    outputs = model(**forward)
    found = method.loss(ctx, model, inputs, torch.tensor(0.0), outputs)
    base = language_model()(**forward).logits
    mask = inputs["labels"][:, 1:] != -100
    expected = divergence(outputs.logits[:, :-1][mask], base[:, :-1][mask]).mean()
    assert found is not None
    assert found.item() == pytest.approx(expected.item(), rel=1e-4)
    assert found.item() > 1e-3


def test_full_fine_tuning_uses_the_weights_that_the_stage_started_from() -> None:
    model = language_model().train()
    ctx = Quiet(model, earlier=["t0"])
    ctx.rows = rows_of(5, 6)
    method = Lwf(LwfConfig())
    method.prepare_model(ctx, model)
    method.train_begin(ctx)
    inputs = ctx.collate(rows_of(6, 4))
    forward = {key: inputs[key] for key in ("input_ids", "attention_mask")}
    old = model(**forward).logits.detach()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    new = model(**forward)
    found = method.loss(ctx, model, inputs, torch.tensor(0.0), new)
    mask = inputs["labels"][:, 1:] != -100
    assert found is not None
    expected = divergence(new.logits[:, :-1][mask], old[:, :-1][mask]).mean().item()
    assert found.item() == pytest.approx(expected, rel=1e-4)


def test_the_teacher_has_no_dropout() -> None:
    """In full fine-tuning the teacher runs through the live modules, whose dropout is on."""

    class Dropping(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.z = nn.Parameter(torch.arange(12.0).view(4, 3))
            self.dropout = nn.Dropout(0.5)

        def forward(self, input_ids: Tensor, **other: Any) -> Any:
            return SimpleNamespace(logits=self.dropout(self.z.expand(len(input_ids), -1, -1)))

    model = Dropping()
    ctx = Quiet(model, earlier=["t0"])
    method = Lwf(LwfConfig())
    method.prepare_model(ctx, model)
    method.train_begin(ctx)
    ids = torch.zeros(1, 4, dtype=torch.long)
    same = SimpleNamespace(logits=model.z.unsqueeze(0))
    inputs = {"input_ids": ids, "labels": torch.tensor([[-100, 1, 1, 1]])}
    found = method.loss(ctx, model, inputs, torch.tensor(0.0), same)
    assert found is not None
    assert abs(found.item()) < 1e-6
    assert model.dropout.p == 0.5


def test_a_missing_or_changed_teacher_is_noticed(tmp_path: Path) -> None:
    stage_adapter(tmp_path)
    method, ctx, _ = later_stage(tmp_path)
    state = method.checkpoint_state(ctx)
    assert state is not None
    method.restore_checkpoint(ctx, state)
    stage_adapter(tmp_path, r=3)
    other, ctx, _ = later_stage(tmp_path)
    with pytest.raises(UserError, match="trained with another teacher"):
        other.restore_checkpoint(ctx, state)
    model = continued(tmp_path)
    (tmp_path / "t0" / "adapter" / "adapter_model.safetensors").unlink()
    with pytest.raises(UserError, match=r"adapter_model.safetensors: file not found"):
        Lwf(LwfConfig()).prepare_model(FakeContext(model, earlier=["t0"], folder=tmp_path), model)


def test_no_graph_of_the_teacher_is_kept(tmp_path: Path) -> None:
    """Gradient checkpointing makes embeddings ask for a gradient, though nothing in the teacher is trained."""
    stage_adapter(tmp_path)
    method, ctx, model = later_stage(tmp_path)
    model.enable_input_require_grads()
    assert not method._teacher_logits(ctx, ctx.collate(ctx.rows)).requires_grad


def test_the_state_says_who_the_teacher_was(tmp_path: Path) -> None:
    stage_adapter(tmp_path)
    method, ctx, _ = later_stage(tmp_path)
    folder = tmp_path / "t0" / "adapter"
    expected = {"teacher": str(folder), "teacher_sha256": sha256_file(folder / "adapter_model.safetensors")}
    assert method.end_task(ctx).meta == expected
