"""prog_prompt: which prompts stand in front, what is trained, kept and frozen over three tasks, and its checks."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from swift_cl.errors import UserError
from swift_cl.io import MethodState, read_json, sha256_file, write_json
from swift_cl.methods.prog_prompt import ProgPrompt, ProgPromptConfig
from swift_cl.training.flags import check_method_flags, complete_flags, flag_values
from swift_cl.tuners.registry import get_tuner
from swift_cl.tuners.soft_prompt.layer import SoftPromptLayer
from swift_cl.tuners.soft_prompt.model import new_config, prompt_of
from swift_cl.tuners.soft_prompt.stacking import config_of, rows_sha256, stored_rows
from swift_cl.tuners.soft_prompt.start import start_at
from tests.support.fake_context import FakeContext
from tests.support.soft_prompts import rows_of, sharp_model

TUNER = get_tuner("soft_prompt")
TUNER.register()
TASKS = ("one", "two", "three")
IDS = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]])


def begin(folder: Path, number: int, seed: int = 0, **settings: Any) -> tuple[ProgPrompt, FakeContext, Any]:
    """Task number `number` (from 0), as the training starts it."""
    from peft import get_peft_model

    config = ProgPromptConfig(**{"length": 2, "bottleneck": 4, **settings})
    method, task = ProgPrompt(config), TASKS[number]
    if number:
        model = TUNER.load(sharp_model(), folder / TASKS[number - 1] / "adapter", True)
    else:
        model = get_peft_model(sharp_model(), new_config(sharp_model(), config))
        start_at(model, config.init, config.init_text, 0)
    ctx = FakeContext(model, task=task, earlier=TASKS[:number], folder=folder, seed=seed)
    ctx.model = method.prepare_model(ctx, model)
    return method, ctx, ctx.model


def train(model: Any, steps: int = 3) -> None:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1, weight_decay=0.5)
    for _ in range(steps):
        model(input_ids=IDS, attention_mask=torch.ones_like(IDS), labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def finish(method: ProgPrompt, ctx: FakeContext) -> MethodState:
    """What the end of a stage writes."""
    folder, state = ctx.this_stage.weights_dir, dict(ctx.model.state_dict())
    exported = method.export(ctx, {name: p.detach() for name, p in ctx.parameters.items()})
    for name in ctx.parameters:
        state.pop(name)
    TUNER.save(ctx.model, folder, state | exported)
    config = folder / "adapter_config.json"
    write_json(config, method.export_config(ctx, read_json(config)))
    found = method.end_task(ctx)
    assert found is not None
    return found


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model.eval()(input_ids=IDS, attention_mask=torch.ones_like(IDS)).logits
    return found


def chain(folder: Path, tasks: int = 3, **settings: Any) -> list[Any]:
    """Models of finished stages as they were at the end of their training."""
    found = []
    for number in range(tasks):
        method, ctx, model = begin(folder, number, **settings)
        train(model.train())
        finish(method, ctx)
        found.append(model)
    return found


def test_the_newest_prompt_is_read_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts of 2 rows filled with 1, 2 and 3: the model reads 3 3 2 2 1 1 and the input; task two has 2 2 1 1."""
    for number in range(3):
        method, ctx, model = begin(tmp_path, number, mlp="none")
        with torch.no_grad():
            prompt_of(model).embedding.fill_(number + 1)
        finish(method, ctx)
    read: list[Tensor] = []

    def reads(task: str) -> list[float]:
        model = TUNER.load(sharp_model(), tmp_path / task / "adapter", False).eval()
        layer = next(module for module in model.modules() if isinstance(module, SoftPromptLayer))
        layer.base_layer.layers[0].register_forward_pre_hook(lambda module, args: read.append(args[0]))
        logits(model)
        embedded = layer.base_layer.get_input_embeddings()(IDS)
        own = read[-1].shape[1] - IDS.shape[1]
        assert torch.equal(read[-1][:, own:], embedded)
        return read[-1][0, :own, 0].tolist()

    assert reads("three") == [3, 3, 2, 2, 1, 1]
    assert reads("two") == [2, 2, 1, 1]
    assert reads("one") == [1, 1]


@pytest.mark.parametrize("mlp", ["none", "mlp1", "mlp2"])
def test_what_is_served_is_what_was_trained(tmp_path: Path, mlp: str) -> None:
    """P' is kept, the MLP is not; the logits are those at the end of the training."""
    for task, trained in zip(TASKS, chain(tmp_path, 3, mlp=mlp), strict=False):
        folder = tmp_path / task / "adapter"
        served = TUNER.load(sharp_model(), folder, False)
        assert torch.allclose(logits(served), logits(trained), atol=1e-5)
        assert torch.allclose(stored_rows(folder), rows_of(trained), atol=1e-6)
        assert prompt_of(served).parts == []
        assert read_json(folder / "adapter_config.json")["baked"] is True


def test_only_the_new_prompt_is_trained(tmp_path: Path) -> None:
    """After three tasks the first two prompts are what they were, bit for bit, and so is the base model."""
    base = {name: tensor.clone() for name, tensor in sharp_model().state_dict().items()}
    models = chain(tmp_path, 2)
    one, two = (stored_rows(tmp_path / task / "adapter") for task in TASKS[:2])
    assert torch.equal(two[2:], one)
    method, ctx, model = begin(tmp_path, 2)
    start = rows_of(model).clone()
    optimised = {name.rpartition(".")[2] for name in ctx.parameters}
    assert optimised == {
        "embedding",
        *(f"{p}_{kind}" for p in ("first", "last", "norm") for kind in ("weight", "bias")),
    }
    train(model)
    state = finish(method, ctx)
    three = stored_rows(ctx.this_stage.weights_dir)
    assert torch.equal(three[2:], two)
    assert not torch.allclose(three[:2], start[:2], atol=1e-3)
    assert len(three) == 6
    live = {name.replace(".base_layer.", "."): tensor for name, tensor in model.get_base_model().state_dict().items()}
    assert all(torch.equal(live[name], tensor) for name, tensor in base.items())
    assert state.meta["order"] == list(TASKS)
    assert len(set(state.meta["prompts"].values())) == 3
    assert len(models) == 2


def test_answers_of_an_earlier_task_stay_token_for_token(tmp_path: Path) -> None:
    """At stage 3 a question of task one is asked with task one's own prompts: `candidates` names them."""
    said, hashes = [], []
    for number in range(3):
        method, ctx, model = begin(tmp_path, number)
        train(model)
        finish(method, ctx)
        first = method.candidates(ctx)[0]
        assert (first.name, first.tasks, first.dir) == ("one", ("one",), tmp_path / "one" / "adapter")
        assert method.candidates(ctx)[-1].tasks == (TASKS[number],)
        served = TUNER.load(sharp_model(), first.dir, False).eval()
        said.append(served.generate(input_ids=IDS, max_new_tokens=6, do_sample=False, pad_token_id=0).tolist())
        hashes.append(sha256_file(first.dir / "adapter_model.safetensors"))
    assert said[0] == said[1] == said[2]
    assert len(set(hashes)) == 1
    assert method.needs_task_id()


def test_a_new_prompt_starts_at_embeddings_of_the_vocabulary(tmp_path: Path) -> None:
    chain(tmp_path, 1)
    starts = []
    for _ in range(2):
        _, _, model = begin(tmp_path, 1)
        starts.append(prompt_of(model).embedding.detach())
        known = model.get_base_model().get_input_embeddings().weight
        assert all((known == row).all(dim=1).any() for row in starts[-1])
    assert torch.equal(starts[0], starts[1])


def test_another_task_or_seed_starts_elsewhere(tmp_path: Path) -> None:
    chain(tmp_path, 2, mlp="none")
    starts = [prompt_of(begin(tmp_path, number, seed)[2]).embedding for number, seed in ((1, 0), (2, 0), (1, 1))]
    assert not any(torch.equal(starts[i], starts[j]) for i, j in ((0, 1), (0, 2), (1, 2)))


def test_every_task_starts_at_the_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = "swift_cl.tuners.soft_prompt.start.tokens_of"
    monkeypatch.setattr(target, lambda model, text: [7, 3] if text == "some text" else [])
    settings = {"init": "text", "init_text": "some text"}
    chain(tmp_path, 1, **settings)
    model = begin(tmp_path, 1, **settings)[2]
    assert torch.equal(prompt_of(model).embedding, sharp_model().get_input_embeddings().weight[[7, 3]])


def test_hashes_are_of_each_tasks_own_prompt(tmp_path: Path) -> None:
    """The newest rows stand first in the file; what was noted of a task stays."""
    found = []
    for number in range(3):
        method, ctx, model = begin(tmp_path, number)
        train(model)
        found.append(finish(method, ctx).meta["prompts"])
    three = stored_rows(tmp_path / "three" / "adapter")
    assert found[0] == {"one": rows_sha256(three[4:])}
    assert found[1] == {**found[0], "two": rows_sha256(three[2:4])}
    assert found[2] == {**found[1], "three": rows_sha256(three[:2])}


def test_one_rank_reads_what_was_written() -> None:
    assert ProgPrompt(ProgPromptConfig()).end_task(FakeContext(rank=1, world_size=2)) is None


def test_a_resumed_task_gets_no_second_prompt(tmp_path: Path) -> None:
    chain(tmp_path, 1)
    method, ctx, model = begin(tmp_path, 1)
    train(model)
    state = method.checkpoint_state(ctx)
    TUNER.save(model, tmp_path / "checkpoint", None)
    again = TUNER.load(sharp_model(), tmp_path / "checkpoint", True)
    other = FakeContext(again, task="two", earlier=TASKS[:1], folder=tmp_path)
    resumed = ProgPrompt(method.config)
    resumed.prepare_model(other, again)
    assert torch.equal(logits(again), logits(model))
    assert config_of(again).tasks == ["one", "two"]
    resumed.restore_checkpoint(other, state)
    with torch.no_grad():
        prompt_of(again).exact.mul_(2)  # type: ignore[union-attr]
    with pytest.raises(UserError, match="the prompts of earlier tasks are not those of the checkpoint"):
        resumed.restore_checkpoint(other, state)


def test_a_changed_stage_before_is_found_at_a_resume(tmp_path: Path) -> None:
    chain(tmp_path / "a", 1)
    chain(tmp_path / "b", 1, mlp="none")
    method, ctx, _ = begin(tmp_path / "a", 1)
    state = method.checkpoint_state(ctx)
    ctx.earlier = FakeContext(task="two", earlier=TASKS[:1], folder=tmp_path / "b").earlier
    with pytest.raises(UserError, match="the prompts of earlier tasks are not those of the stage before"):
        method.restore_checkpoint(ctx, state)


def test_a_chain_of_another_method_is_not_continued(tmp_path: Path) -> None:
    model = begin(tmp_path, 0)[2]
    config_of(model).tasks = []
    TUNER.save(model, tmp_path / "one" / "adapter", None)
    with pytest.raises(UserError, match="has the prompts of no task, but the stages before are one"):
        begin(tmp_path, 1)


def test_a_prompt_whose_training_did_not_end_is_not_continued(tmp_path: Path) -> None:
    """Its MLP would be lost: what is put in front is P, and the model was trained with P'."""
    TUNER.save(begin(tmp_path, 0)[2], tmp_path / "one" / "adapter", None)
    with pytest.raises(UserError, match="method 'prog_prompt' continues its own stages only"):
        begin(tmp_path, 1)


def test_too_many_embeddings(tmp_path: Path) -> None:
    chain(tmp_path, 2)
    with pytest.raises(UserError, match=r"--prog_prompt_max_total is 5, but 3 tasks of --prog_prompt_length 2 have 6"):
        begin(tmp_path, 2, max_total=5)


class TestFlags:
    @pytest.mark.parametrize(
        ("flags", "said"),
        [
            (["--prog_prompt_length", "201"], "--prog_prompt_length is 201, allowed: a whole number from 1 to 200"),
            (["--prog_prompt_length", "0"], "--prog_prompt_length is 0, allowed"),
            (["--prog_prompt_mlp", "mlp3"], "--prog_prompt_mlp is 'mlp3', allowed: none, mlp1, mlp2"),
            (["--prog_prompt_bottleneck", "1"], "--prog_prompt_bottleneck is 1, allowed: a whole number >= 2"),
            (
                ["--prog_prompt_max_total", "9"],
                r"--prog_prompt_max_total is 9, allowed: a whole number >= --prog_prompt",
            ),
            (["--prog_prompt_init", "text"], "--prog_prompt_init_text is '', allowed: a text"),
            (["--prog_prompt_layer_norm", "maybe"], "--prog_prompt_layer_norm is 'maybe', allowed: true, false"),
            (["--tuner_type", "lora"], "--tuner_type lora does not work with method 'prog_prompt'"),
            (["--soft_prompt_length", "5"], "--soft_prompt_length 5 does not work with method 'prog_prompt', which"),
        ],
    )
    def test_refused(self, flags: list[str], said: str) -> None:
        with pytest.raises(UserError) as caught:
            check_method_flags(["--model", "m", "--cl_method", "prog_prompt", "--cl_task", "t", *flags])
        assert said in str(caught.value)

    def test_they_become_the_tuners(self) -> None:
        own = ["--prog_prompt_length", "7", "--prog_prompt_init", "text", "--prog_prompt_init_text", "a b"]
        given = flag_values(complete_flags(["--model", "m", "--cl_method", "prog_prompt", "--cl_task", "t", *own]))
        found = {flag: given[flag] for flag in ("tuner_type", "soft_prompt_length", "soft_prompt_init_text")}
        assert found == {"tuner_type": ["soft_prompt"], "soft_prompt_length": ["7"], "soft_prompt_init_text": ["a b"]}
        assert given["soft_prompt_layer_norm"] == ["true"]
        assert given["soft_prompt_init"] == ["text"]
        assert given["weight_decay"] == ["1e-5"]
        shape = {"length": 7, "mlp": "mlp2", "bottleneck": 9, "layer_norm": False}
        assert ProgPrompt(ProgPromptConfig(**shape)).required_flags() == {
            "tuner_type": "soft_prompt", "soft_prompt_length": "7", "soft_prompt_mlp": "mlp2",
            "soft_prompt_bottleneck": "9", "soft_prompt_layer_norm": "false", "soft_prompt_init": "vocab",
        }  # fmt: skip

    def test_published_values(self) -> None:
        config = ProgPromptConfig()
        assert (config.length, config.mlp, config.bottleneck, config.layer_norm) == (10, "mlp1", 800, True)
        assert (config.init, config.max_total) == ("vocab", 2048)
