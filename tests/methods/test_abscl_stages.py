"""abscl: what its trainings start from, what a stage keeps, and what the next stage makes of it; nothing is trained."""

from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch

from swift_cl.errors import UserError
from swift_cl.io import MethodState, read_json, save_method_state, sha256_file
from swift_cl.methods import abscl as module
from swift_cl.methods._adapters import stored_adapter
from swift_cl.methods._prompts import task_features
from swift_cl.methods._routing import RouteRequest
from swift_cl.methods._row_store import StoredRow
from swift_cl.methods.abscl import Abscl
from tests.methods.test_abscl import RowContext, abscl, domain_rows, other_adapter
from tests.methods.test_dynamic_conpet import ALPHABETS, SelectorContext, rows
from tests.support.fake_context import FakeGradients
from tests.support.route_model import make_adapters, make_router
from tests.support.tiny_lora import continued, stage_adapter

ONE, TWO = list(ALPHABETS)[:2]


class StageContext(SelectorContext):
    """The last training of a stage."""

    def encode(self, rows: Any) -> list[dict[str, Any]]:
        return [{"labels": [1]} for _ in rows]


def stage(folder: Path, task: str, count: int, seed: int, phase: str, **kwargs: Any) -> StageContext:
    """A stage with adapters of its own wherever a training would have left one."""
    other_adapter(folder / f"{task}_trained", seed)
    ctx = StageContext(continued(folder / f"{task}_trained"), task=task, folder=folder, **kwargs)
    ctx.system, ctx.rows, ctx.phase = "stage", rows(task, count=count), phase
    ctx.phases = {"shared": other_adapter(folder / f"{task}_shared", seed + 1)}
    if phase == "warmup":
        ctx.phases["domain"] = other_adapter(folder / f"{task}_domain", seed + 2)
    return ctx


def ended(method: Abscl, ctx: StageContext) -> MethodState:
    state = method.end_task(ctx)
    assert state is not None
    save_method_state(ctx.this_stage.state_dir, method.name, state)
    return state


def beside(name: str, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Two adapters as one: A below A, B beside B."""
    return torch.cat([first, second], 0 if "lora_A" in name else 1)


def same(tensors: Any, others: Any) -> bool:
    assert tensors.keys() == others.keys()
    return all(torch.equal(tensor, others[name]) for name, tensor in tensors.items())


def test_a_stage_keeps_both_adapters_and_serves_earlier_domains_with_the_new_shared_one(tmp_path: Path) -> None:
    method = abscl()
    first = stage(tmp_path, ONE, 6, 10, "warmup")
    state = ended(method, first)
    kept = first.this_stage.state_dir
    assert same(stored_adapter(kept / "shared"), first.weights()), "the warm-up trained the shared one last"
    assert same(stored_adapter(kept / "domain"), stored_adapter(first.phases["domain"]))
    assert not (kept / "served").exists()
    hashes = {name: sha256_file(kept / name / "adapter_model.safetensors") for name in ("shared", "domain")}
    assert state.meta == {"n_rows": [6], "sha256": hashes}
    assert len(state.rows["replay"]) == 1

    second = stage(tmp_path, TWO, 4, 20, "warmup", earlier=[ONE], state=state)
    after = ended(method, second)
    served = second.this_stage.state_dir / "served" / ONE
    domain = stored_adapter(kept / "domain")
    shared = second.weights()
    assert same(stored_adapter(served), {name: beside(name, shared[name], domain[name]) for name in shared})
    config = read_json(second.phases["shared"] / "adapter_config.json")
    doubled = {"r": 2 * config["r"], "lora_alpha": 2 * config["lora_alpha"]}
    assert read_json(served / "adapter_config.json") == {**config, **doubled}
    assert after.meta["n_rows"] == [6, 4]
    assert [StoredRow.from_json(row).task for row in after.rows["replay"]] == [ONE, TWO]
    features = [task_features(ctx, ctx.rows).double() for ctx in (first, second)]
    assert torch.allclose(after.tensors["means"].double(), torch.stack([f.mean(dim=0) for f in features]), atol=1e-6)
    centred = [f - f.mean(dim=0) for f in features]
    assert torch.allclose(after.tensors["scatter"], sum((c.T @ c for c in centred), torch.zeros(())), atol=1e-6)


def test_what_is_served_is_the_sum_of_what_was_trained_and_its_partner(tmp_path: Path) -> None:
    config = {"r": 2, "lora_alpha": 8}
    ctx = stage(tmp_path, ONE, 6, 10, "warmup")
    trained, domain = ctx.weights(), stored_adapter(ctx.phases["domain"])
    served = abscl().export(ctx, trained)
    assert same(served, {name: beside(name, trained[name], domain[name]) for name in trained})
    assert abscl().export_config(ctx, config) == {"r": 4, "lora_alpha": 16}
    for phase in ("shared", "domain"):
        ctx.phase = phase
        assert abscl().export(ctx, trained) is trained, "a training before the last leaves its adapter as it is"
        assert abscl().export_config(ctx, config) == config
        assert abscl().end_task(ctx) is None
    assert not ctx.this_stage.state_dir.exists()


def test_without_a_warm_up_the_domain_adapter_is_trained_last(tmp_path: Path) -> None:
    method, ctx = abscl(warmup_epochs=0.0), stage(tmp_path, ONE, 6, 10, "domain")
    trained, shared = ctx.weights(), stored_adapter(ctx.phases["shared"])
    assert same(method.export(ctx, trained), {name: beside(name, shared[name], trained[name]) for name in trained})
    ended(method, ctx)
    kept = ctx.this_stage.state_dir
    assert same(stored_adapter(kept / "shared"), shared)
    assert same(stored_adapter(kept / "domain"), trained)


def test_one_process_writes(tmp_path: Path) -> None:
    ctx = stage(tmp_path, ONE, 6, 10, "warmup", rank=1, world_size=2)
    assert abscl().end_task(ctx) is None
    assert not ctx.this_stage.state_dir.exists()


def test_so_many_rows_as_asked_for_are_drawn_for_the_statistics(tmp_path: Path) -> None:
    ctx = stage(tmp_path, ONE, 6, 10, "warmup")
    state = ended(abscl(stats_rows=3), ctx)
    assert state.meta["n_rows"] == [3]
    features = task_features(ctx, ctx.rows)
    fitting = [
        chosen
        for chosen in combinations(range(6), 3)
        if torch.allclose(features[list(chosen)].mean(dim=0), state.tensors["means"][0], atol=1e-6)
    ]
    assert len(fitting) == 1
    assert fitting[0] != (0, 1, 2)


# --- what a training starts from -------------------------------------------------------------------------------------


def shared_after(folder: Path, **kwargs: Any) -> tuple[StageContext, Path]:
    """The first training of the second stage, and the shared adapter that the first stage kept."""
    first = stage(folder, ONE, 6, 10, "warmup")
    state = ended(abscl(), first)
    ctx = stage(folder, TWO, 4, 20, "shared", earlier=[ONE], state=state)
    ctx.phases = {}
    return ctx, first.this_stage.state_dir / "shared"


def test_the_shared_adapter_goes_on_from_the_stage_before(tmp_path: Path) -> None:
    ctx, folder = shared_after(tmp_path)
    assert not same(dict(ctx.parameters), stored_adapter(folder))
    abscl().prepare_model(ctx, ctx.model)
    assert same(dict(ctx.parameters), stored_adapter(folder))


@pytest.mark.parametrize("damage", ["changed", "missing"])
def test_a_shared_adapter_that_is_not_the_recorded_one_is_refused(tmp_path: Path, damage: str) -> None:
    ctx, folder = shared_after(tmp_path)
    file = folder / "adapter_model.safetensors"
    if damage == "missing":
        file.unlink()
    else:
        file.write_bytes(other_adapter(tmp_path / "x", 99).joinpath(file.name).read_bytes())
    with pytest.raises(
        UserError, match=r"adapter_model.safetensors: missing, or differs from the hash in .*abscl.json"
    ):
        abscl().prepare_model(ctx, ctx.model)


def test_an_adapter_of_another_rank_is_refused(tmp_path: Path) -> None:
    ctx, _ = shared_after(tmp_path)
    stage_adapter(tmp_path / "wide", r=3)
    ctx.model = continued(tmp_path / "wide")
    with pytest.raises(UserError, match="differ"):
        abscl().prepare_model(ctx, ctx.model)


def test_only_a_new_domain_adapter_is_penalised(tmp_path: Path) -> None:
    ctx, method = stage(tmp_path, ONE, 6, 10, "warmup"), abscl(orth_lambda=0.5)
    method.train_begin(ctx)
    assert not method._spans
    ctx.phase = "domain"
    method.train_begin(ctx)
    assert method._spans.keys() == {name for name in ctx.parameters if "lora_A" in name}
    method.gradients(ctx, FakeGradients({name: torch.zeros_like(p) for name, p in ctx.parameters.items()}))
    shared, own = stored_adapter(ctx.phases["shared"]), ctx.weights()
    total = sum(float((own[name] @ shared[name].T).square().sum()) for name in method._spans)
    assert ctx.logged["abscl_overlap"] == pytest.approx(total, rel=1e-5), "of all layers"


# --- rows ------------------------------------------------------------------------------------------------------------


def test_the_kept_rows_are_drawn_and_there_must_be_one() -> None:
    def kept(seed: int) -> list[Any]:
        return [row.row for row in abscl(replay_ratio=0.2)._kept(RowContext(seed=seed), domain_rows("old", 20))]

    assert all(len(kept(seed)) == 4 for seed in range(3))
    assert kept(1) == kept(1)
    assert kept(0) != kept(1)
    assert kept(0) != domain_rows("old", 20)[:4]
    with pytest.raises(UserError, match="no row fits the training template"):
        abscl()._kept(RowContext(), domain_rows("long", 20))


def test_steps_of_the_warm_up_come_in_another_order_each_epoch() -> None:
    method, ctx = abscl(), RowContext()
    ctx.phase, ctx.global_batch = "warmup", 4
    orders = [list(method.batch_order(ctx, 32, epoch) or ()) for epoch in range(3)]
    steps = [[order[n] // 4 for n in range(0, 32, 4)] for order in orders]
    assert all(sorted(own) == list(range(8)) for own in steps)
    assert len({*map(tuple, steps), tuple(range(8))}) == 4
    assert any(order[n : n + 4] != sorted(order[n : n + 4]) for order in orders for n in range(0, 32, 4))


# --- routing ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        # S / N = diag(30, 10) / (2 + 3) = diag(6, 2), its mean diagonal 4: half of both is diag(5, 3)
        ({"shrinkage": 0.5}, [1 / 5 + 0.64 / 3, 4 / 5 + 0.04 / 3]),
        ({"shrinkage": 0.1}, [1 / 5.8 + 0.64 / 2.2, 4 / 5.8 + 0.04 / 2.2]),
        ({"route": "euclidean"}, [1.64, 4.04]),
    ],
)
def test_the_distance_is_by_the_covariance_of_all_domains(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], expected: list[float]
) -> None:
    state = MethodState(
        {"means": torch.tensor([[0.0, 0.0], [3.0, 1.0]]), "scatter": torch.diag(torch.tensor([30.0, 10.0]).double())},
        {"tasks": ["one", "two"], "n_rows": [2, 3]},
    )
    save_method_state(tmp_path / "stage" / "cl_state", "abscl", state)
    router = make_router(abscl(**settings), make_adapters(tmp_path / "adapters", ["one", "two"]), tmp_path / "stage")
    monkeypatch.setattr(module, "routed_features", lambda *args: torch.tensor([[1.0, 0.8]]))
    (route,) = router.route([RouteRequest(({"role": "user", "content": "?"},), {"one": None, "two": None})])
    assert route.chosen == "one"
    assert route.scores == pytest.approx(dict(zip(("one", "two"), expected, strict=True)))
