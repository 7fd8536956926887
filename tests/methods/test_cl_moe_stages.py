"""cl_moe: what a task begins with, on which rows experts are counted, and what a stage keeps; nothing is trained."""

from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch

from swift_cl.errors import UserError
from swift_cl.io import MethodState, save_method_state
from swift_cl.methods._adapters import stored_adapter
from swift_cl.methods._prompts import task_features
from swift_cl.methods.cl_moe import ClMoe
from tests.methods.test_cl_moe import ROWS, ExpertContext, cl_moe, counted, expert_model


class StageContext(ExpertContext):
    """Prompts are token ids too; a row of one token is dropped as a training template would."""

    def encode(self, rows: Any) -> list[dict[str, Any]]:
        return [row if len(row["labels"]) > 3 else {} for row in super().encode(rows)]

    def encode_prompts(self, prompts: Sequence[Sequence[Mapping[str, Any]]]) -> list[list[int]]:
        return [[int(word) for word in prompt[-1]["content"].split()] for prompt in prompts]


class JoinedContext(ExpertContext):
    """A padding-free collator: all rows of a batch are one."""

    def collate(self, encoded: Any) -> dict[str, torch.Tensor]:
        ids = torch.tensor([[token for row in encoded for token in row["input_ids"]]])
        return {"input_ids": ids, "labels": ids}


def test_a_task_begins_with_a_gate_of_its_own_and_the_share_that_was_asked_for() -> None:
    model = expert_model()
    model.base_model.new_task("default", 0.5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".moelora_task." in name:
                parameter.fill_(1.0)[0] = 5.0
    cl_moe(beta=0.25).prepare_model(ExpertContext(model), model)
    gates = [module for module in model.modules() if hasattr(module, "moelora_task")]
    assert len(gates) > 1
    for module in gates:
        assert module.beta["default"] == 0.25
        assert module.moelora_task["default"]().tolist() == [0.25] * 4


def tokens_counted(method: ClMoe) -> float:
    assert method._counts is not None
    return float(method._counts[0].sum()) / 2  # two experts a token


def test_so_many_rows_as_asked_for_are_drawn() -> None:
    # Each row has a power of two of tokens, so that a sum tells which were counted.
    rows = [ROWS[0] | {"messages": [*ROWS[0]["messages"][:1], {"role": "user", "content": " ".join(["5"] * 2**i)}]}
            for i in range(6)]  # fmt: skip
    found = set()
    for seed in range(3):
        ctx, method = ExpertContext(expert_model(), seed=seed), cl_moe(count_rows=2)
        ctx.rows = rows
        method.prepare_model(ctx, ctx.model)
        method.train_end(ctx)
        found.add(tokens_counted(method))
    assert found <= {float(2**a + 2**b) for a, b in combinations(range(6), 2)}
    assert len(found) > 1
    assert found != {3.0}


def test_rows_that_the_template_drops_are_not_counted() -> None:
    method, ctx = cl_moe(), StageContext(expert_model())
    ctx.rows = ROWS
    method.prepare_model(ctx, ctx.model)
    method.train_end(ctx)
    kept = [row for row in ctx.encode(ROWS) if row]
    assert 0 < len(kept) < len(ROWS)
    assert tokens_counted(method) == sum(len(row["input_ids"]) for row in kept)


def test_rows_that_a_collator_joins_are_counted_one_at_a_time() -> None:
    whole, _ = counted(expert_model())
    method, ctx = cl_moe(), JoinedContext(expert_model())
    ctx.rows = ROWS
    method.prepare_model(ctx, ctx.model)
    method.train_end(ctx)
    assert method._counts is not None
    assert whole._counts is not None
    assert method._counts.tolist() == whole._counts.tolist()


def test_the_first_task_is_kept_as_it_was_trained() -> None:
    ctx = ExpertContext(expert_model())
    tensors = ctx.weights()
    assert cl_moe().export(ctx, tensors) is tensors


def test_gamma_is_asked_and_another_rank_is_refused(tmp_path: Path) -> None:
    model = expert_model()
    folder = tmp_path / "t1" / "adapter"
    model.base_model.new_task("default", 0.5)
    model.save_pretrained(str(folder))
    old = stored_adapter(folder)
    layers = sorted({name.split(".moelora_")[0] for name in old})
    state = MethodState(meta={"sets": [{name: [0] for name in layers}]})
    method = cl_moe(gamma=0.9)
    ctx = ExpertContext(model, earlier=["t1"], state=state, folder=tmp_path)
    method.prepare_model(ctx, model)
    method._sets = {name: [3] for name in layers}
    new = {name: tensor + 1 for name, tensor in ctx.weights().items()}
    kept = method.export(ctx, new)
    share = torch.tensor([0.9, 0.9, 0.9, 0.1]).repeat_interleave(2)[:, None]
    for name in (name for name in kept if "moelora_A" in name):
        assert torch.allclose(kept[name], share * old[name] + (1 - share) * new[name], atol=1e-6)
    narrow = {name: tensor[:-1] if "moelora_A" in name else tensor for name, tensor in new.items()}
    with pytest.raises(UserError, match="differ"):
        method.export(ctx, narrow)


def test_questions_are_looked_at_without_dropout() -> None:
    ctx = StageContext(expert_model())
    measured: list[bool] = []
    ctx.model.register_forward_pre_hook(lambda *_: measured.append(ctx.measures))
    task_features(ctx, ROWS)
    # The decoder inside is called, not the model around it.
    ctx.model.get_base_model().model.register_forward_pre_hook(lambda *_: measured.append(ctx.measures))
    task_features(ctx, ROWS)
    assert measured
    assert all(measured)


# --- what a stage keeps ----------------------------------------------------------------------------------------------


def stage(folder: Path, task: str, seed: int, **kwargs: Any) -> StageContext:
    """A stage whose adapter is written and whose experts are counted."""
    model = expert_model()
    ctx = StageContext(model, task=task, folder=folder, **kwargs)
    ctx.rows = ROWS
    cl_moe().prepare_model(ctx, model)
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in ctx.parameters.values():
            parameter.normal_(std=0.3)
    model.save_pretrained(str(ctx.this_stage.weights_dir))
    return ctx


def ended(ctx: StageContext, **settings: Any) -> MethodState:
    method = cl_moe(**settings)
    method._layers = sorted(name.split(".moelora_A.")[0] for name in ctx.parameters if "moelora_A" in name)
    method._experts = 4
    method.train_end(ctx)
    state = method.end_task(ctx)
    assert state is not None
    save_method_state(ctx.this_stage.state_dir, method.name, state)
    assert method._counts is not None
    assert torch.equal(state.tensors["counts"].double(), method._counts.double())
    assert state.meta["sets"][-1] == method._sets
    return state


def test_a_stage_keeps_gates_centres_and_sets_of_all_tasks_and_serves_each_with_its_gate(tmp_path: Path) -> None:
    first = stage(tmp_path, "one", 1)
    state = ended(first)
    features = task_features(first, first.rows)
    assert torch.allclose(state.tensors["centres/one"], features.mean(dim=0, keepdim=True), atol=1e-6)
    gates = {name: weight for name, weight in first.weights().items() if ".moelora_task." in name}
    assert {name for name in state.tensors if name.startswith("gate/")} == {f"gate/one/{name}" for name in gates}
    assert all(torch.equal(state.tensors[f"gate/one/{name}"], gate) for name, gate in gates.items())
    assert not (first.this_stage.state_dir / "served").exists()

    second = stage(tmp_path, "two", 2, earlier=["one"], state=state)
    after = ended(second, centers=2)
    assert after.tensors["centres/two"].shape == (2, features.shape[1])
    for name, tensor in state.tensors.items():
        if name != "counts":
            assert torch.equal(after.tensors[name], tensor), name
    assert {name.split("/")[1] for name in after.tensors if name != "counts"} == {"one", "two"}
    assert after.meta["sets"][0] == state.meta["sets"][0]
    assert len(after.meta["sets"]) == 2
    served = stored_adapter(second.this_stage.state_dir / "served" / "one")
    own = stored_adapter(second.this_stage.weights_dir)
    assert served.keys() == own.keys()
    for name, tensor in served.items():
        assert torch.equal(tensor, gates[name] if name in gates else own[name]), name


def test_one_process_writes(tmp_path: Path) -> None:
    first = stage(tmp_path, "one", 1)
    second = stage(tmp_path, "two", 2, earlier=["one"], state=ended(first), rank=1, world_size=2)
    assert cl_moe().end_task(second) is None
    assert not second.this_stage.state_dir.exists()
