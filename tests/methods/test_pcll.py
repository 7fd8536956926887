"""pcll: divergence, pooling, weights and loss by hand, its codes and what is generated with them (section 5)."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from swift_cl.errors import UserError
from swift_cl.generation.engine import Answer, Prompt, Sampling
from swift_cl.generation.steering import steered
from swift_cl.io import MethodState, read_jsonl
from swift_cl.methods._code_loss import CodeLoss, Drawn, whole_rows
from swift_cl.methods._gen_rows import TaskMeta
from swift_cl.methods._latent import Heads, before_answer, beta, divergence, last_states, noise, pool
from swift_cl.methods._questions_first import QuestionsFirst
from swift_cl.methods._state import pack
from swift_cl.methods.pcll import MODULE, Pcll, PcllConfig
from swift_cl.training.flags import check_method_flags, complete_flags, flag_values
from tests.methods.test_lwf_teacher import Quiet
from tests.support.fake_context import FakeContext
from tests.support.fake_engine import Engines, FakeEngine, said
from tests.support.ranks import on_ranks
from tests.support.tiny_lora import continued, language_model, stage_adapter

CHANNELS = ["new/rec", "new/qa", "pseudo/rec", "pseudo/qa"]
WIDTH, SIZE = 16, 3


def pcll(**settings: Any) -> Pcll:
    config = PcllConfig(**{"z_dim": SIZE, "gen_batch_size": 8, **settings})
    config.validate()
    return Pcll(config)


class TestByHand:
    @pytest.mark.parametrize(
        ("posterior", "prior", "expected"),
        [
            ((1, 0), (0, 0), 0.5),
            ((0, math.log(4)), (0, 0), 0.8068528),
            ((0, 0), (0, math.log(4)), 0.3181472),
            ((1, math.log(4)), (0, 0), 1.3068528),
        ],
    )
    def test_divergence(self, posterior: Any, prior: Any, expected: float) -> None:
        values = (torch.tensor([float(value)]) for value in (*posterior, *prior))
        assert float(divergence(*values)) == pytest.approx(expected)

    def test_the_divergence_is_summed_over_the_code(self) -> None:
        zero = torch.zeros(2, 3)
        assert divergence(torch.ones(2, 3), zero, zero, zero).tolist() == pytest.approx([1.5, 1.5])

    def test_padding_is_not_pooled(self) -> None:
        """States 1 and 3, a pad 100, scores 0: 2.0; a 0/1 mask added to the scores would give 17.2."""
        states, mask = torch.tensor([[[1.0], [3.0], [100.0]]]), torch.tensor([[1, 1, 0]])
        assert float(pool(states, mask, torch.zeros(1))) == pytest.approx(2.0)
        weighed = pool(states, mask, torch.ones(1))
        scores = torch.nn.functional.gelu(torch.tensor([1.0, 3.0])).softmax(0)
        assert float(weighed) == pytest.approx(float(scores @ torch.tensor([1.0, 3.0])))

    def test_beta(self) -> None:
        found = [beta(step, 100, 4, 0.9) for step in (0, 5, 10, 20, 24, 25)]
        assert found == pytest.approx([0, 0.2222, 0.4444, 0.8889, 1, 0], abs=1e-4)
        assert [beta(step, 10, 1, 1.0) for step in (0, 5)] == [0, 0.5]

    def test_the_loss(self) -> None:
        """rec 1.99, divergence 1 at beta 1, answers 1, whole rows 2: 1.99 + .01 + .5 (1 + .5 x 2) = 3."""
        losses, ctx = CodeLoss(PcllConfig(beta_ratio=0.5, beta_cycles=1)), FakeContext()
        ctx.step, ctx.max_steps = 60, 100
        labels = torch.tensor([[-100, 1, 1], [-100, -100, 1]])
        batch = {"labels": labels, "input_ids": torch.ones_like(labels), "channel": ["new/rec", "new/qa"]}
        losses.window(ctx, [batch])
        total = losses._answers.total(ctx, torch.tensor([2 * 1.99, 1.0, 0.0, 0.0]), "pcll")
        total = total + losses._whole.total(ctx, torch.tensor([2 * 2.0, 0.0]), "pcll")
        total = total + losses.divergence_term(ctx, torch.tensor([1.0, 0.0]))
        assert float(total) == pytest.approx(3.0)
        assert (ctx.logged["pcll_beta"], ctx.logged["pcll_kl"]) == (1.0, 1.0)

    def test_the_loss_with_other_weights(self) -> None:
        """Step 60 of 100 is 0.2 of the second of two cycles, beta 0.2 / 0.5; divergences 1 and 3 of two own rows and 3
        of a generated one have the means 2 and 3: 1.99 + .3 x .4 x 5 + .8 (1 + .25 x 2) = 3.79."""
        config = PcllConfig(beta_ratio=0.5, beta_cycles=2, kl_weight=0.3, lm_weight=0.8, gen_weight=0.25)
        losses, ctx = CodeLoss(config), FakeContext()
        ctx.step, ctx.max_steps = 60, 100
        labels = torch.tensor([[-100, 1, 1], [-100, -100, -100], [-100, -100, -100], [-100, -100, 1]])
        channels = ["new/rec", "new/rec", "pseudo/rec", "new/qa"]
        losses.window(ctx, [{"labels": labels, "input_ids": torch.ones_like(labels), "channel": channels}])
        total = losses._answers.total(ctx, torch.tensor([2 * 1.99, 1.0, 0.0, 0.0]), "pcll")
        total = total + losses._whole.total(ctx, torch.tensor([2 * 2.0, 0.0]), "pcll")
        total = total + losses.divergence_term(ctx, torch.tensor([4.0, 3.0]))
        assert float(total) == pytest.approx(3.79)
        assert (ctx.logged["pcll_beta"], ctx.logged["pcll_kl"]) == pytest.approx((0.4, 5.0))

    def test_divergences_are_a_mean_over_the_rows_of_all_ranks(self) -> None:
        """One row with 1 and three with 6 together: 7 / 4 (and by ranks 1.5)."""
        rows, sums = [1, 3], [1.0, 6.0]

        def work(ctx: FakeContext) -> float:
            losses = CodeLoss(PcllConfig(kl_weight=1.0, beta_cycles=1, beta_ratio=0.5))
            ctx.step = 50
            labels = torch.ones(rows[ctx.rank], 2, dtype=torch.long)
            losses.window(ctx, [{"labels": labels, "input_ids": labels, "channel": ["new/rec"] * rows[ctx.rank]}])
            return float(losses.divergence_term(ctx, torch.tensor([sums[ctx.rank], 0.0])))

        found = on_ranks(2, lambda rank, size: FakeContext(rank=rank, world_size=size), work)
        assert sum(found) == pytest.approx(7 / 4)

    def test_codes_and_divergence_of_the_heads(self) -> None:
        """Prompt 1, 3 and text 8, a pad 100, pooled as means: prior N(2, 4), posterior N(2 x 4, 9). With noise 0.5 the
        code is 8 + 3 x 0.5 and adds 5 x 9.5; KL = (ln 4 - ln 9 + (36 + 9) / 4 - 1) / 2."""
        heads = Heads(1, 1)
        values = {"pooling": 0.0, "prior_mean": 1.0, "post_mean": 2.0, "to_embedding": 5.0}
        deviations = {"prior_logvar": math.log(4), "post_logvar": math.log(9)}
        assert {name.partition(".")[0] for name, _ in heads.named_parameters()} == values.keys() | deviations.keys()
        assert "to_embedding.bias" not in dict(heads.named_parameters())
        with torch.no_grad():
            for name, parameter in heads.named_parameters():
                module, _, kind = name.partition(".")
                parameter.fill_(deviations.get(module, 0.0) if kind == "bias" else values.get(module, 0.0))
        states = torch.tensor([[[1.0], [3.0], [8.0], [100.0]]])
        added, kl = heads(states, torch.tensor([[1, 1, 0, 0]]), torch.tensor([[1, 1, 1, 0]]), torch.tensor([[0.5]]))
        assert added.item() == pytest.approx(5 * 9.5)
        assert kl.item() == pytest.approx((math.log(4 / 9) + 45 / 4 - 1) / 2)

    def test_a_generated_token_is_half_its_teacher(self) -> None:
        """Cross-entropy ln 2 of two equal words; the teacher gives (.9, .1): (1 - a) ln 2 + a KL."""
        losses, ctx = CodeLoss(PcllConfig(kd_alpha=0.25)), FakeContext()
        inputs = {"labels": torch.tensor([[-100, 1]]), "input_ids": torch.tensor([[0, 1]])}
        ctx.channels = ["pseudo/qa"]
        logits = torch.zeros(1, 2, 2)
        teacher = torch.tensor([[[0.9, 0.1], [0.5, 0.5]]]).log()
        answered = (torch.tensor([0]), teacher)
        sums = losses._sums(losses._answers, ctx, inputs, logits, answered)
        kl = 0.9 * math.log(1.8) + 0.1 * math.log(0.2)
        assert sums.tolist() == pytest.approx([0, 0, 0, 0.75 * math.log(2) + 0.25 * kl])
        warm = CodeLoss(PcllConfig(kd_alpha=1.0, kd_temperature=2.0))  # the teacher's (.9, .1) become (.75, .25)
        sums = warm._sums(warm._answers, ctx, inputs, logits, answered)
        assert float(sums[3]) == pytest.approx(4 * (0.75 * math.log(1.5) + 0.25 * math.log(0.5)))
        ctx.channels = ["new/qa"]
        assert losses._sums(losses._answers, ctx, inputs, logits, None)[1] == pytest.approx(math.log(2))

    def test_which_tokens_count(self) -> None:
        """All real tokens of question rows; those of rows that teach to generate by their answer alone."""
        inputs = {
            "input_ids": torch.tensor([[1, 2, 3, 4], [0, 5, 6, 7]]),
            "attention_mask": torch.tensor([[1, 1, 1, 1], [0, 1, 1, 1]]),
            "labels": torch.tensor([[-100, -100, 3, 4], [-100, -100, -100, 7]]),
        }
        assert whole_rows(inputs, ["new/rec", "pseudo/qa"])["labels"].tolist() == [[-100] * 4, [-100, 5, 6, 7]]
        assert before_answer(inputs).tolist() == [[True, True, False, False], [False, True, True, False]]


def test_noise_belongs_to_the_row_and_not_to_the_batch() -> None:
    assert torch.equal(noise([3, 4], 5)[1], noise([4], 5)[0])
    assert not torch.equal(noise([3], 5), noise([4], 5))


class TestSteering:
    def test_every_position_or_the_prompt_alone(self) -> None:
        model, ids = language_model().eval(), torch.tensor([[1, 2, 3]])
        vector = torch.randn(1, WIDTH, generator=torch.Generator().manual_seed(0))
        table = model.get_input_embeddings()
        with steered(model, vector):
            assert torch.allclose(table(ids), table.weight[ids] + vector)
            assert torch.allclose(table(ids[:, :1]), table.weight[ids[:, :1]] + vector)
        with steered(model, vector, answers=False):
            assert torch.equal(table(ids[:, :1]), table.weight[ids[:, :1]])
        with steered(model, vector, torch.tensor([[True, False, False]])):
            assert torch.equal(table(ids)[0, 1:], table.weight[ids][0, 1:])
        assert torch.equal(table(ids), table.weight[ids])

    def test_cached_generation_is_that_of_the_whole_text(self) -> None:
        model, ids = language_model().eval(), torch.tensor([[1, 2, 3], [4, 5, 6]])
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(8 if parameter.dim() > 1 else 1)
        vectors = 3 * torch.randn(2, WIDTH, generator=torch.Generator().manual_seed(1))
        settings = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
        plain = model.generate(ids, attention_mask=torch.ones_like(ids), **settings)
        with steered(model, vectors):
            cached = model.generate(ids, attention_mask=torch.ones_like(ids), use_cache=True, **settings)
            with torch.no_grad():
                forced = model(input_ids=cached[:, :-1]).logits[:, 2:].argmax(-1)
        assert torch.equal(forced, cached[:, 3:])
        assert not torch.equal(plain, cached)
        with steered(model, 0 * vectors):
            assert torch.equal(model.generate(ids, attention_mask=torch.ones_like(ids), **settings), plain)


def batch() -> dict[str, Tensor]:
    """Four rows of six tokens, the last three supervised, one a channel."""
    torch.manual_seed(1)
    ids = torch.randint(3, 60, (4, 6))
    labels = ids.clone()
    labels[:, :3] = -100
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def heads_state(tasks: list[str]) -> MethodState:
    torch.manual_seed(5)
    heads = Heads(WIDTH, SIZE)
    tensors = {name: p.detach().clone() for name, p in heads.named_parameters()}
    means = {task: torch.full((SIZE,), float(i)) for i, task in enumerate(tasks)}
    logvars = {task: torch.full((SIZE,), -20.0) for task in tasks}
    metas = [TaskMeta(task, 4, f"System of {task}.", None).to_json() for task in tasks]
    return MethodState(pack(heads=tensors, prior_mean=means, prior_logvar=logvars), {}, {"tasks": metas})


def second_stage(folder: Path, **settings: Any) -> tuple[Pcll, Quiet, Any]:
    stage_adapter(folder)
    model = continued(folder)
    ctx = Quiet(model, task="t1", earlier=["gone", "t0"], folder=folder, state=heads_state(["t0"]))
    method = pcll(**settings)
    method.prepare_model(ctx, model)
    method.train_begin(ctx)
    return method, ctx, model


def loss_of(method: Pcll, ctx: Any, model: Any, inputs: dict[str, Tensor], channels: list[str]) -> Tensor:
    ctx.channels = channels
    method.window(ctx, [{**inputs, "channel": channels}])
    with method.forward(ctx, inputs):
        outputs = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])
    found = method.loss(ctx, model, inputs, torch.zeros(()), outputs)
    assert found is not None
    return found


class TestTraining:
    def test_whatever_is_in_a_batch_every_head_gets_a_gradient(self, tmp_path: Path) -> None:
        """Another process may have rows that teach to generate where this one has none."""
        method, ctx, model = second_stage(tmp_path)
        ctx.step = 5
        for channels in (CHANNELS, ["new/qa"] * 4):
            model.zero_grad()
            loss_of(method, ctx, model, batch(), channels).backward()
            grads = {name: p.grad for name, p in method._heads.named_parameters()}  # type: ignore[union-attr]
            assert all(grad is not None for grad in grads.values())
            assert any(bool(grad.any()) for grad in grads.values()) is (channels is CHANNELS)
            assert all(p.grad is None for name, p in model.named_parameters() if "pcll_teacher" in name)

    def test_the_code_reaches_rec_rows_alone(self, tmp_path: Path) -> None:
        method, ctx, model = second_stage(tmp_path, alpha_z=5.0)
        inputs, ctx.channels = batch(), CHANNELS
        plain = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
        with method.forward(ctx, inputs):
            coded = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
        same = [bool(torch.allclose(plain[i], coded[i], atol=1e-6)) for i in range(4)]
        assert same == [False, True, False, True]

    def test_all_parts_are_in_the_loss(self, tmp_path: Path) -> None:
        """The sum of what is logged, each part with its weight; two own rows and a generated one have codes."""
        settings = {"kl_weight": 0.3, "lm_weight": 0.8, "gen_weight": 0.25, "beta_cycles": 1, "beta_ratio": 0.5}
        method, ctx, model = second_stage(tmp_path, **settings)
        ctx.step = 20
        total = loss_of(method, ctx, model, batch(), ["new/rec", "new/rec", "pseudo/rec", "pseudo/qa"])
        logged = {name.removeprefix("pcll_"): value for name, value in ctx.logged.items()}
        assert min(logged[name] for name in ("new_rec", "pseudo_rec", "pseudo_qa", "pseudo_all")) > 0.1
        answers = logged["new_rec"] + logged["pseudo_rec"] + 0.8 * logged["pseudo_qa"]
        expected = answers + 0.8 * 0.25 * logged["pseudo_all"] + 0.3 * 0.4 * logged["kl"]
        assert total.item() == pytest.approx(expected)
        assert method._drawn is not None
        one, two, generated = method._drawn.latent.kl.tolist()
        assert logged["kl"] == pytest.approx((one + two) / 2 + generated)

    @pytest.mark.parametrize(("alpha", "wanted"), [(0.5, [4, 0]), (0.0, [0, 0])])
    def test_the_teacher_is_asked_in_the_micro_batch_that_has_generated_rows(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, alpha: float, wanted: list[int]
    ) -> None:
        """And in none where its share is 0."""
        method, ctx, model = second_stage(tmp_path, kd_alpha=alpha)
        inputs, micro_batches, asked = batch(), (["pseudo/qa"] * 4, ["new/qa"] * 4), []
        logits = method._teacher.logits  # type: ignore[union-attr]

        def counted(given: Any, rows: Any) -> Tensor:
            asked[-1] += len(rows["labels"])
            return logits(given, rows)

        monkeypatch.setattr(method._teacher, "logits", counted)
        method.window(ctx, [{**inputs, "channel": channels} for channels in micro_batches])
        for channels in micro_batches:
            ctx.channels = list(channels)
            asked.append(0)
            with method.forward(ctx, inputs):
                outputs = model(input_ids=inputs["input_ids"])
            method.loss(ctx, model, inputs, torch.zeros(()), outputs)
        assert asked == wanted

    def test_what_is_added_is_the_code_times_alpha(self, tmp_path: Path) -> None:
        """Every head has a part in it, as DDP expects of what gets a gradient."""
        method, ctx, _ = second_stage(tmp_path, alpha_z=5.0)
        ctx.channels = CHANNELS
        with method.forward(ctx, batch()):
            drawn = method._drawn
        assert drawn is not None
        assert drawn.latent.added.abs().max() > 0.1
        assert torch.allclose(drawn.vectors[[0, 2]], 5 * drawn.latent.added)
        assert method._heads is not None
        gradients = torch.autograd.grad(drawn.vectors.sum(), list(method._heads.parameters()), allow_unused=True)
        assert all(gradient is not None for gradient in gradients)

    def test_another_step_seed_or_task_has_other_noise(self, tmp_path: Path) -> None:
        method, ctx, _ = second_stage(tmp_path)
        ctx.channels, found = CHANNELS, []
        for ctx.step, ctx.seed, ctx.task in ((0, 0, "t1"), (0, 0, "t1"), (1, 0, "t1"), (0, 1, "t1"), (0, 0, "t2")):
            with method.forward(ctx, batch()):
                assert method._drawn is not None
                found.append(method._drawn.vectors[0].tolist())
        assert found[0] == found[1]
        assert len(set(map(tuple, found))) == 4

    @pytest.mark.parametrize("base", [True, False])
    def test_the_encoder_sees_no_dropout_and_no_padding(self, tmp_path: Path, base: bool) -> None:
        """Nor does a graph of it stay."""
        stage_adapter(tmp_path, lora_dropout=0.5)
        model = continued(tmp_path)
        inner = model.get_base_model().model
        inner.norm = torch.nn.Sequential(inner.norm, torch.nn.Dropout(0.5))
        ids, padded = torch.tensor([[5, 6, 7]]), torch.tensor([[0, 0, 5, 6, 7]])
        mask = torch.tensor([[0, 0, 1, 1, 1]])
        alone = last_states(Quiet(model), {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, base)
        beside = last_states(Quiet(model), {"input_ids": padded, "attention_mask": mask}, base)
        assert torch.allclose(alone, beside[:, 2:], atol=1e-5)
        assert not alone.requires_grad

    def test_the_same_code_in_a_batch_of_another_make(self, tmp_path: Path) -> None:
        method, ctx, _ = second_stage(tmp_path)
        inputs, ctx.channels = batch(), CHANNELS
        with method.forward(ctx, inputs):
            together = method._drawn
        ctx.channels = CHANNELS[2:3]
        with method.forward(ctx, {key: value[2:3] for key, value in inputs.items()}):
            alone = method._drawn
        assert together is not None
        assert alone is not None
        assert torch.allclose(together.vectors[2], alone.vectors[0], atol=1e-6)

    @pytest.mark.parametrize("scope", ["all", "prompt"])
    def test_where_the_code_is_added(self, tmp_path: Path, scope: str) -> None:
        method, ctx, model = second_stage(tmp_path, z_scope=scope)
        inputs, ctx.channels = batch(), CHANNELS
        table, seen = model.get_input_embeddings(), []
        with method.forward(ctx, inputs):
            handle = table.register_forward_hook(lambda module, args, out: seen.append(out))
            model(input_ids=inputs["input_ids"])
        handle.remove()
        moved = (seen[0] - table.weight[inputs["input_ids"]]).abs().sum(-1) > 0
        assert moved[0].tolist() == ([True] * 6 if scope == "all" else [True] * 3 + [False] * 3)

    @pytest.mark.parametrize("scope", ["all", "prompt"])
    def test_the_teacher_has_the_students_code(self, tmp_path: Path, scope: str) -> None:
        """Student = teacher: of generated rows the teacher's part is 0, also where a code was added. The own row in
        front of them has a shorter prompt."""
        method, ctx, model = second_stage(tmp_path, kd_alpha=1.0, alpha_z=5.0, kl_weight=0.0, z_scope=scope)
        inputs = batch()
        inputs["labels"][0, 1:] = inputs["input_ids"][0, 1:]
        loss_of(method, ctx, model, inputs, CHANNELS)
        for name in ("pseudo_rec", "pseudo_qa", "pseudo_all"):
            assert ctx.logged[f"pcll_{name}"] == pytest.approx(0, abs=1e-5)
        assert ctx.logged["pcll_new_rec"] > 1

    def test_the_frozen_encoder_is_the_base_model(self, tmp_path: Path) -> None:
        kept: dict[str, Drawn] = {}
        for encoder in ("frozen", "shared"):
            method, ctx, model = second_stage(tmp_path, encoder=encoder)
            before = [p.clone() for p in model.parameters()]
            inputs, ctx.channels = batch(), CHANNELS
            with method.forward(ctx, inputs):
                assert method._drawn is not None
                kept[encoder] = method._drawn
            assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
        assert not torch.allclose(kept["frozen"].latent.kl, kept["shared"].latent.kl)
        base = language_model().eval()
        with torch.no_grad():
            states = base.model(input_ids=inputs["input_ids"][[0, 2]]).last_hidden_state
        prompt = before_answer({key: value[[0, 2]] for key, value in inputs.items()})
        heads = method._heads
        assert heads is not None
        with torch.no_grad():
            _, expected = heads(states, prompt, torch.ones_like(prompt), torch.zeros(2, SIZE))
        assert torch.allclose(kept["frozen"].latent.kl, expected, atol=1e-5)

    def test_a_checkpoint_holds_the_heads(self, tmp_path: Path) -> None:
        method, ctx, _ = second_stage(tmp_path)
        stored = method.checkpoint_state(ctx)
        assert method._heads is not None
        with torch.no_grad():
            for parameter in method._heads.parameters():
                parameter.add_(1)
        method.restore_checkpoint(ctx, stored)
        wanted = heads_state(["t0"]).tensors
        assert all(torch.equal(p, wanted[f"heads/{name}"]) for name, p in method._heads.named_parameters())
        with pytest.raises(UserError, match="the checkpoint was trained with another teacher"):
            method.restore_checkpoint(ctx, MethodState(stored.tensors, {"teacher_sha256": "0"}))

    def test_heads_of_another_size(self, tmp_path: Path) -> None:
        with pytest.raises(UserError, match="the state of method 'pcll' does not fit"):
            second_stage(tmp_path, z_dim=4)

    @pytest.mark.parametrize("encoder", ["frozen", "shared"])
    def test_the_end_of_a_task(self, tmp_path: Path, encoder: str) -> None:
        """Heads and every task's prior under them; the base model is left as it was."""
        method, ctx, model = second_stage(tmp_path, encoder=encoder)
        method._tasks = [TaskMeta(task, 4, "", None) for task in ("t0", "t1")]
        asked: list[Any] = []

        def encode(prompts: Any) -> list[list[int]]:
            asked.extend(prompts)
            return [[3, 4, 5, 6 + len(asked)] for _ in prompts]

        ctx.encode_prompts = encode  # type: ignore[method-assign]
        heads = method._heads
        found = method.end_task(ctx)
        assert found is not None
        assert heads is not None
        assert [prompt[1]["content"] for prompt in asked] == [
            f'Write one input of the task "{t}".' for t in ("t0", "t1")
        ]
        assert all(prompt[0] == {"role": "system", "content": ""} for prompt in asked)
        with torch.no_grad():
            encodes = language_model() if encoder == "frozen" else continued(tmp_path).get_base_model()
            states = encodes.eval().model(input_ids=torch.tensor([[3, 4, 5, 8]])).last_hidden_state
            mean, logvar = heads.prior(states, torch.ones(1, 4))
        assert torch.allclose(found.tensors["prior_mean/t1"], mean[0], atol=1e-5)
        assert torch.allclose(found.tensors["prior_logvar/t1"], logvar[0], atol=1e-5)
        assert {"heads/pooling", "heads/to_embedding.weight", "prior_mean/t0"} <= found.tensors.keys()
        assert not hasattr(model.get_base_model(), MODULE)


def test_the_first_heads_are_those_of_the_seed() -> None:
    """And the run's own random numbers stay where they are."""

    base = language_model()

    class First:
        def get_base_model(self) -> Any:
            return base

    def heads(seed: int, drawn: int) -> Tensor:
        torch.manual_seed(drawn)
        before, method = torch.get_rng_state(), pcll()
        method.prepare_model(FakeContext(task="t0", seed=seed), First())
        assert torch.equal(torch.get_rng_state(), before)
        assert method._heads is not None
        assert method._heads.prior_mean.out_features == SIZE
        return method._heads.post_mean.weight.detach()

    one = heads(0, 11)
    assert torch.equal(one, heads(0, 12))
    assert not torch.equal(one, heads(1, 11))


def row(question: str, answer: str, system: str = "Now.") -> dict[str, Any]:
    turns = (("system", system), ("user", question), ("assistant", answer))
    return {"messages": [{"role": role, "content": text} for role, text in turns]}


class TestRows:
    def prepared(self, folder: Path, engine: FakeEngine, **settings: Any) -> tuple[FakeContext, list[dict[str, Any]]]:
        ctx = FakeContext(task="t2", earlier=["t0", "t1"], folder=folder, state=heads_state(["t0", "t1"]))
        ctx.engines = Engines({folder / "t1" / "adapter": engine})
        rows = pcll(min_fill=0.0, gamma=1.0, **settings).prepare_task(ctx, [row(f"q {i}", "a") for i in range(4)])
        return ctx, rows

    def test_questions_of_old_tasks_and_then_their_answers(self, tmp_path: Path) -> None:
        numbers = iter(range(100))

        def speaks(prompt: Prompt, seed: int) -> Answer:
            if prompt.latent:
                return said(f"some question {next(numbers)}")
            return said(f"{prompt.messages[0]['content']} says {prompt.messages[1]['content'][-1]}")

        engine = FakeEngine(speaks)
        _, rows = self.prepared(tmp_path, engine)
        drawn = [prompt for prompt in engine.prompts if prompt.latent]
        texts = {prompt.messages[1]["content"] for prompt in drawn}
        assert texts == {'Write one input of the task "t0".', 'Write one input of the task "t1".'}, (
            "never the current one"
        )
        assert all(prompt.messages[0]["content"] == "" for prompt in drawn)
        samplings = {bool(prompts[0].latent): sampling for prompts, sampling, _ in engine.calls}
        assert (samplings[True].temperature, samplings[True].top_k) == (0.95, 100)
        assert (samplings[False].temperature, samplings[False].top_k) == (0.0, 0)
        assert [r["channel"] for r in rows] == [
            *["new/qa"] * 4, *["new/rec"] * 4, *(["pseudo/qa"] * 2 + ["pseudo/rec"] * 2) * 2,
        ]  # fmt: skip
        qa = [r["messages"] for r in rows if r["channel"] == "pseudo/qa"]
        assert [m[0]["content"] for m in qa] == ["System of t0."] * 2 + ["System of t1."] * 2
        assert all(m[2]["content"] == f"{m[0]['content']} says {m[1]['content'][-1]}" for m in qa)
        rec = [r["messages"] for r in rows if r["channel"] == "pseudo/rec"]
        assert [m[2]["content"] for m in rec] == [m[1]["content"] for m in qa]
        assert {m[1]["content"] for m in rec} == texts
        own = next(r["messages"] for r in rows if r["channel"] == "new/rec")
        assert [m["content"] for m in own] == ["", 'Write one input of the task "t2".', "q 0"]

    def test_the_code_of_a_candidate(self, tmp_path: Path) -> None:
        """With a variance of next to nothing it is alpha M mean: 0 of task t0, whose mean is 0."""
        engine = FakeEngine(lambda prompt, seed: said("one two three"))
        self.prepared(tmp_path, engine, alpha_z=2.0, z_scope="prompt", max_rounds=1)
        by_task = {p.messages[1]["content"][-4:-2]: p for p in engine.prompts if p.latent}
        matrix = heads_state([]).tensors["heads/to_embedding.weight"]
        assert by_task["t0"].latent == pytest.approx([0.0] * WIDTH, abs=1e-3)
        assert by_task["t1"].latent == pytest.approx((2 * matrix.sum(1)).tolist(), abs=1e-3)
        assert not by_task["t1"].latent_on_answer
        assert by_task["t1"].sha256 != Prompt(by_task["t1"].messages).sha256

    def test_codes_are_drawn_from_the_prior(self, tmp_path: Path) -> None:
        """Mean 1 and variance 4: what the codes of 300 candidates were is read back from what is added."""

        state = heads_state(["t0", "t1"])
        for old in ("t0", "t1"):
            state.tensors[f"prior_mean/{old}"] = torch.ones(SIZE)
            state.tensors[f"prior_logvar/{old}"] = torch.full((SIZE,), math.log(4))
        matrix = state.tensors["heads/to_embedding.weight"]

        def stage(task: str, **settings: Any) -> Pcll:
            method = pcll(**settings, alpha_z=2.0, min_fill=0.0, max_rounds=1)
            folder = tmp_path / f"{task} {settings}"
            ctx = FakeContext(task=task, earlier=["t0", "t1"], folder=folder, state=state)
            ctx.engines = Engines({folder / "t1" / "adapter": FakeEngine(lambda prompt, seed: said("a b c"))})
            method.prepare_task(ctx, [row("q", "a")])
            return method

        def code(method: Pcll, task: str, number: int) -> Tensor:
            added = method._prompt(TaskMeta(task, 4, "", None), number).latent
            assert added is not None
            return torch.linalg.lstsq(matrix, torch.tensor(added).unsqueeze(1)).solution[:, 0] / 2

        method = stage("t2")
        codes = torch.stack([code(method, "t0", number) for number in range(300)])
        assert float(codes.mean()) == pytest.approx(1.0, abs=0.3)
        assert float(codes.std()) == pytest.approx(2.0, abs=0.2)
        assert torch.allclose(codes[7], code(stage("t2"), "t0", 7), atol=1e-3)
        others = [code(stage("t3"), "t0", 7), code(stage("t2", gen_seed=5), "t0", 7), code(method, "t1", 7)]
        assert not any(torch.allclose(codes[7], other, atol=1e-3) for other in (*others, codes[8]))

    def test_the_prompt_in_words(self, tmp_path: Path) -> None:
        ctx = FakeContext(task="t0", folder=tmp_path)
        rows = pcll(prompt_template="Ask {task}, only {task}:").prepare_task(ctx, [row("q", "a")])
        assert rows[1]["messages"][1]["content"] == "Ask t0, only t0:"

    def test_what_is_dropped(self, tmp_path: Path) -> None:
        questions = iter(["two words", "一个红色的苹果", "three words here", "cut off here", *["x y z"] * 99])

        def speaks(prompt: Prompt, seed: int) -> Answer:
            if prompt.latent:
                text = next(questions)
                return said(text, "length" if text == "cut off here" else "stop")
            return said("" if prompt.messages[1]["content"] == "x y z" else "fine")

        ctx, rows = self.prepared(tmp_path, FakeEngine(speaks), max_rounds=2)
        kept = {r["messages"][1]["content"] for r in rows if r["channel"] == "pseudo/qa"}
        assert kept == {"一个红色的苹果", "three words here"}
        dropped = [reject["reason"] for reject in read_jsonl(ctx.generated_dir / "rejects.jsonl")]
        assert sorted(set(dropped)) == ["empty_y", "short_x", "truncated"]
        assert dropped.count("short_x") == 1

    def test_rows_without_a_generation_row(self, tmp_path: Path) -> None:
        ctx = FakeContext(task="t0", folder=tmp_path)
        turns = row("a", "b")["messages"] + row("c", "d")["messages"][1:]
        rows = pcll().prepare_task(ctx, [{"messages": turns}, row("__ans__", "a"), row("q", "a")])
        assert [r["channel"] for r in rows] == ["new/qa"] * 3 + ["new/rec"] * 2
        assert [r["messages"][2]["content"] for r in rows[3:]] == ["a", "q"], "the first question of several"
        assert len(ctx.notices) == 1

    def test_several_system_prompts(self, tmp_path: Path) -> None:
        with pytest.raises(UserError, match="but those of task 't0' have several"):
            pcll().prepare_task(FakeContext(task="t0", folder=tmp_path), [row("q", "a", "x"), row("p", "a", "y")])


def test_an_answer_is_asked_for_whole_questions_only() -> None:
    engine = FakeEngine(lambda prompt, seed: said("q", "length") if prompt.latent else said("a"))
    prompt = Prompt(Prompt.chat("", "p").messages, None, (1.0,))
    found = QuestionsFirst(engine, {"p": "s"}).answer([prompt], Sampling(1.0, 8), [0])
    assert [answer.finish_reason for answer in found] == ["length"]
    assert len(engine.calls) == 1


def test_questions_and_answers_of_several_batches() -> None:
    """A batch without a whole question between two others; an answer that is cut off cuts the row off."""

    def speaks(prompt: Prompt, seed: int) -> Answer:
        if prompt.latent:
            return {1: said("cut off", "length"), 2: said(" ")}.get(seed, said(f"q{seed}"))
        return said(f"a of {prompt.messages[1]['content']}", "length" if seed == 4 else "stop")

    engine = FakeEngine(speaks)
    first = QuestionsFirst(engine, {"p": "s"})
    prompt = Prompt(Prompt.chat("", "p").messages, None, (1.0,))
    batches = [([prompt], [0]), ([prompt, prompt], [1, 2]), ([prompt, prompt], [3, 4])]
    found = first.answer_batches(batches, Sampling(1.0, 8))
    assert [[answer.text for answer in answers] for answers in found] == [
        ["q0\n__ans__\na of q0"], ["cut off", " "], ["q3\n__ans__\na of q3", "q4\n__ans__\na of q4"],
    ]  # fmt: skip
    reasons = [answer.finish_reason for answers in found for answer in answers]
    assert reasons == ["stop", "length", "stop", "stop", "length"]
    second = [call for call in engine.calls if not call[0][0].latent]
    assert {(sampling.temperature, sampling.max_new_tokens) for _, sampling, _ in second} == {(0.0, 8)}
    assert first.identity != engine.identity, "a round of whole rows is no round of questions"


def test_published_values() -> None:
    config = PcllConfig()
    assert (config.gen_temperature, config.top_k, config.top_p, config.gamma) == (0.95, 100, 0.95, 0.2)
    assert (config.z_dim, config.alpha_z, config.kl_weight, config.beta_cycles) == (128, 0.1, 0.01, 4)
    assert (config.beta_ratio, config.gen_weight, config.lm_weight) == (0.9, 0.5, 0.5)
    assert (config.kd_alpha, config.kd_temperature, config.encoder, config.z_scope) == (0.5, 1.0, "frozen", "all")


class TestFlags:
    @pytest.mark.parametrize(
        ("flag", "value", "allowed"),
        [
            ("gamma", "0", "a number in (0, 1]"),
            ("z_dim", "0", "a whole number >= 1"),
            ("alpha_z", "-1", "a number >= 0"),
            ("kl_weight", "inf", "a number >= 0"),
            ("beta_cycles", "0", "a whole number >= 1"),
            ("beta_ratio", "1.5", "a number in (0, 1]"),
            ("gen_weight", "-0.1", "a number >= 0"),
            ("lm_weight", "-0.1", "a number >= 0"),
            ("kd_alpha", "1.1", "a number in [0, 1]"),
            ("kd_temperature", "0", "a number > 0"),
            ("encoder", "none", "frozen, shared"),
            ("z_scope", "none", "all, prompt"),
            ("prompt_template", "Write.", "a text that holds {task}"),
            ("gen_backend", "vllm", "transformers, because vLLM takes nothing that is added to embeddings"),
            ("top_p", "0", "a number in (0, 1]"),
        ],
    )
    def test_refused(self, flag: str, value: str, allowed: str) -> None:
        with pytest.raises(UserError) as caught:
            check_method_flags(["--model", "m", "--cl_method", "pcll", "--cl_task", "t", f"--pcll_{flag}", value])
        assert str(caught.value).startswith(f"--pcll_{flag} is ")
        assert str(caught.value).endswith(f"allowed: {allowed}")

    def test_logits_of_every_position(self) -> None:
        given = flag_values(complete_flags(["--model", "m", "--cl_method", "pcll", "--cl_task", "t"]))
        assert given["use_logits_to_keep"] == ["false"]
