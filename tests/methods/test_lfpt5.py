"""lfpt5: its loss by hand, its teacher, types and their prompts, what is generated and kept (section 6)."""

from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from swift_cl.errors import UserError
from swift_cl.generation.engine import Answer, Prompt
from swift_cl.io import MethodState, sha256_file
from swift_cl.methods._gen_rows import TaskMeta
from swift_cl.methods.lfpt5 import Lfpt5, Lfpt5Config
from swift_cl.training.flags import check_method_flags, complete_flags, flag_values
from swift_cl.tuners.registry import get_tuner
from swift_cl.tuners.soft_prompt.model import prompt_of
from tests.methods.test_lwf_teacher import Quiet
from tests.support.fake_context import FakeContext
from tests.support.fake_engine import Engines, FakeEngine, in_order, said
from tests.support.ranks import on_ranks
from tests.support.soft_prompts import prompted, sharp_model

TUNER = get_tuner("soft_prompt")
TUNER.register()
CHANNELS = ["new/qa", "new/lm", "pseudo/qa", "pseudo/qa", "pseudo/lm"]


def lfpt5(**settings: Any) -> Lfpt5:
    config = Lfpt5Config(**{"prompt_length": 3, "task_type": "news", "gen_batch_size": 8, **settings})
    config.validate()
    return Lfpt5(config)


def state(types: dict[str, str], **metas: TaskMeta) -> MethodState:
    """What the stage before wrote."""
    known = [(metas.get(task) or TaskMeta(task, 4, "", None)).to_json() for task in types]
    return MethodState(rows={"tasks": known}, meta={"types": types})


def row(question: str, answer: str) -> dict[str, Any]:
    turns = (("system", ""), ("user", question), ("assistant", answer))
    return {"messages": [{"role": role, "content": text} for role, text in turns]}


@pytest.mark.parametrize(("combine", "expected"), [("paper", 1.703), ("authors", 1.689)])
def test_the_loss_by_hand(combine: str, expected: float) -> None:
    """Means: task 1.2, generation 2.0; token divergences [.1, .2] and [.3] of two generated rows.

    paper: 1.2 + .25 x 2 + .01 x (.3 + .3) / 2. authors: .99 x (1.2 + .5) + .01 x .6.
    """
    method, ctx = lfpt5(combine=combine), FakeContext()
    method._teacher = SimpleNamespace()  # type: ignore[assignment]
    method.train_begin(ctx)
    labels = torch.tensor([[-100, 1, 1, -100], [-100, 1, -100, -100], [-100, 1, 1, -100], [-100, 1, -100, -100]])
    method.window(ctx, [{"labels": labels, "channel": ["new/qa", "new/lm", "pseudo/qa", "pseudo/qa"]}])
    assert method._pooled is not None
    total = method._pooled.total(ctx, torch.tensor([5 * 1.2, 2.0]), "lfpt5")
    total = total + method.divergence_term(ctx, torch.tensor(0.1 + 0.2 + 0.3))
    assert float(total) == pytest.approx(expected)
    assert ctx.logged["lfpt5_kl"] == pytest.approx(0.3 if combine == "paper" else 0.6)


def test_the_divergence_is_a_mean_over_the_generated_rows_of_a_step() -> None:
    """Three question rows over two ranks of two micro-batches, their divergences .1, .2 and .6: a mean of .3; the
    generation row beside them is none of them."""
    channels = [[["pseudo/qa", "new/qa"], ["pseudo/qa", "new/lm"]], [["new/qa", "new/lm"], ["pseudo/lm", "pseudo/qa"]]]
    sums = [[0.1, 0.2], [0.0, 0.6]]

    def work(ctx: FakeContext) -> list[tuple[float, float]]:
        method = lfpt5(lambda_kl=2.0)
        method.train_begin(ctx)
        labels = torch.ones(2, 2, dtype=torch.long)
        method.window(ctx, [{"labels": labels, "channel": own} for own in channels[ctx.rank]])
        terms = [method.divergence_term(ctx, torch.tensor(own)).item() for own in sums[ctx.rank][:1]]
        logged = ctx.logged["lfpt5_kl"]
        terms += [method.divergence_term(ctx, torch.tensor(own)).item() for own in sums[ctx.rank][1:]]
        return list(zip(terms, (logged, ctx.logged["lfpt5_kl"]), strict=True))

    found = [pair for own in on_ranks(2, lambda r, size: FakeContext(rank=r, world_size=size), work) for pair in own]
    assert sum(term for term, _ in found) == pytest.approx(2 * 0.3)
    assert sum(logged for _, logged in found) / 4 == pytest.approx(0.3)


def test_without_generated_rows_there_is_no_divergence() -> None:
    method, ctx = lfpt5(combine="authors"), FakeContext()
    method.train_begin(ctx)
    assert method._pooled is not None
    assert method._pooled.weights == {"qa": 1.0, "lm": 0.25}


def batch() -> dict[str, Tensor]:
    """Five rows of six tokens, the last three supervised."""
    torch.manual_seed(1)
    ids = torch.randint(3, 60, (5, 6))
    labels = ids.clone()
    labels[:, :3] = -100
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def second_stage(folder: Path, **settings: Any) -> tuple[Lfpt5, Quiet, Any]:
    TUNER.save(prompted(7), folder / "one" / "adapter", None)
    model = TUNER.load(sharp_model(), folder / "one" / "adapter", True).train()
    ctx = Quiet(model, task="two", earlier=["one"], folder=folder, state=state({"one": "news"}))
    method = lfpt5(**settings)
    method.prepare_model(ctx, model)
    method.train_begin(ctx)
    return method, ctx, model


def loss_of(method: Lfpt5, ctx: Any, model: Any, inputs: dict[str, Tensor]) -> Tensor:
    ctx.channels = CHANNELS
    method.window(ctx, [{**inputs, "channel": CHANNELS}])
    outputs = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])
    found = method.loss(ctx, model, inputs, torch.zeros(()), outputs)
    assert found is not None
    return found


def test_the_teacher_is_a_copy_and_stays(tmp_path: Path) -> None:
    """At first the divergence is 0; after one step it is not, and the teacher is what it was."""
    method, ctx, model = second_stage(tmp_path)
    file, inputs = tmp_path / "one" / "adapter" / "adapter_model.safetensors", batch()
    before = sha256_file(file)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.5)
    found = loss_of(method, ctx, model, inputs)
    assert ctx.logged["lfpt5_kl"] == pytest.approx(0.0, abs=1e-6)
    found.backward()
    names = {name.rpartition(".")[0].rpartition(".")[2] for name, p in model.named_parameters() if p.requires_grad}
    assert names == {"default"}
    optimizer.step()
    loss_of(method, ctx, model, inputs)
    assert ctx.logged["lfpt5_kl"] > 0.01
    teacher = method._teacher
    assert teacher is not None
    assert teacher.sha256 == before == sha256_file(file)
    frozen = model.get_parameter("base_model.model.model.soft_prompt_of.lfpt5_teacher.embedding")
    assert torch.equal(frozen, prompt_of(prompted(7)).embedding)
    assert method.checkpoint_state(ctx) is not None


def test_the_divergence_is_that_of_generated_questions_alone(tmp_path: Path) -> None:
    """By hand: sum over the answer's tokens of the two generated question rows of KL(old || new), over 2 rows."""
    method, ctx, model = second_stage(tmp_path, lambda_kl=2.0, lambda_lm=0.0)
    inputs = batch()
    with torch.no_grad():
        prompt_of(model).embedding.add_(0.3)
        plain = loss_of(method, ctx, model, inputs)
        new = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits[2:4, 2:5]
        asked = prompted(7)(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
    old_log, new_log = asked[2:4, 2:5].log_softmax(-1), new.log_softmax(-1)
    wanted = (old_log.exp() * (old_log - new_log)).sum() / 2
    assert ctx.logged["lfpt5_kl"] == pytest.approx(float(wanted), rel=1e-4)
    assert float(plain) == pytest.approx(ctx.logged["lfpt5_qa"] + 2 * float(wanted), rel=1e-4)


def test_the_old_prompt_is_asked_in_the_micro_batch_that_has_generated_questions(tmp_path: Path) -> None:
    method, ctx, model = second_stage(tmp_path)
    with torch.no_grad():
        prompt_of(model).embedding.add_(0.3)
    inputs, micro_batches, found = batch(), (["pseudo/qa"] * 5, ["pseudo/lm"] * 5), []
    method.window(ctx, [{**inputs, "channel": channels} for channels in micro_batches])
    outputs = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])
    for channels in micro_batches:
        ctx.channels = list(channels)
        ctx.logged.clear()
        method.loss(ctx, model, inputs, torch.zeros(()), outputs)
        found.append(ctx.logged.get("lfpt5_kl", 0.0) > 1e-3)
    assert found == [True, False]


def test_without_weight_there_is_no_second_forward(tmp_path: Path) -> None:
    method, ctx, _ = second_stage(tmp_path, lambda_kl=0.0)
    assert method._teacher is None
    assert method.checkpoint_state(ctx) is None


def test_only_the_same_old_prompt_goes_on(tmp_path: Path) -> None:
    method, ctx, _ = second_stage(tmp_path)
    kept = method.checkpoint_state(ctx)
    assert kept is not None
    method.restore_checkpoint(ctx, kept)
    with pytest.raises(UserError, match="the checkpoint was trained with another teacher: sha256 abc"):
        method.restore_checkpoint(ctx, MethodState(meta={"teacher_sha256": "abc"}))


class TestStart:
    def tokens(self, rows: list[dict[str, Any]], seed: int = 0, task: str = "one", **settings: Any) -> list[int]:
        ctx = FakeContext(task=task, seed=seed)
        ctx.rows = rows
        return lfpt5(**settings)._first_tokens(ctx)

    def test_every_token_of_the_rows_as_often(self) -> None:
        rows = [{"input_ids": [5, 6, 9, 9, 8], "labels": [-100, -100, 9, 9, 8]}]
        assert Counter(self.tokens(rows, prompt_length=1024)) == dict.fromkeys((5, 6, 8, 9), 256)

    def test_the_most_frequent_answer_first(self) -> None:
        """9 twice and 8 once in answers; 5, read three times, is in none."""
        rows = [{"input_ids": [5, 5, 5, 9, 9, 8], "labels": [-100, -100, -100, 9, 9, 8]}]
        assert self.tokens(rows, init="labels", prompt_length=2) == [9, 8]
        assert 5 in self.tokens(rows, init="labels", prompt_length=6)[2:]

    def test_the_most_frequent_5000_in_an_order_of_the_seed(self) -> None:
        """Tokens 1000 to 5999 are read twice, 0 to 999 once."""
        rows = [{"input_ids": list(range(6000)), "labels": []}, {"input_ids": list(range(1000, 6000)), "labels": []}]
        found = self.tokens(rows, prompt_length=1000)
        assert min(found) >= 1000
        assert len(set(found)) == 1000
        assert found != sorted(found)
        assert found == self.tokens(rows, prompt_length=1000)
        assert found != self.tokens(rows, seed=1, prompt_length=1000)
        assert found != self.tokens(rows, task="two", prompt_length=1000)


class TestRows:
    def prepared(
        self, folder: Path, engine: FakeEngine, known: MethodState, which: str, **settings: Any
    ) -> tuple[Lfpt5, FakeContext, list[dict[str, Any]]]:
        types = list(known.meta["types"])
        ctx = FakeContext(task="now", earlier=types, folder=folder, state=known)
        ctx.engines = Engines({folder / which / "adapter": engine})
        method = lfpt5(min_fill=0.0, **settings)
        return method, ctx, method.prepare_task(ctx, [row("q", "a")])

    def test_so_many_of_each_label(self, tmp_path: Path) -> None:
        """Labels {a, b}, two of each: of a, a, a, b, c the first two a and b are kept; one b is missing."""
        texts = ["x1\n__ans__\na", "x2\n__ans__\na", "x3\n__ans__\na", "x4\n__ans__\nb", "x5\n__ans__\nc"]
        engine = FakeEngine(in_order(*map(said, texts)))
        known = state({"old": "news"}, old=TaskMeta("old", 20, "", ["a", "b"]))
        _, ctx, rows = self.prepared(tmp_path, engine, known, "old", num_per_class=2, max_rounds=1)
        kept = [r["messages"][-1]["content"] for r in rows if r["channel"] == "pseudo/qa"]
        assert kept == ["a", "a", "b"]
        assert [r["channel"] for r in rows].count("pseudo/lm") == 3
        assert any("only 3 of 4 rows" in line and "label_full 1" in line for line in ctx.notices)
        assert any("label_set 1" in line for line in ctx.notices)
        assert {prompt.messages[1]["content"] for prompt in engine.prompts} == {"__gen__:old"}

    def test_three_of_each_label(self, tmp_path: Path) -> None:
        """Of a, a, a, a, b, b, b, b the first three of each."""
        answers = iter(enumerate("aaaabbbb"))

        def speaks(prompt: Prompt, seed: int) -> Answer:
            number, label = next(answers)
            return said(f"x{number}\n__ans__\n{label}")

        known = state({"old": "news"}, old=TaskMeta("old", 20, "", ["a", "b"]))
        _, _, rows = self.prepared(tmp_path, FakeEngine(speaks), known, "old", num_per_class=3, max_rounds=1)
        kept = [r["messages"] for r in rows if r["channel"] == "pseudo/qa"]
        assert [(m[1]["content"], m[2]["content"]) for m in kept] == [
            ("x0", "a"), ("x1", "a"), ("x2", "a"), ("x4", "b"), ("x5", "b"), ("x6", "b"),
        ]  # fmt: skip

    def test_only_domains_of_the_type_are_generated_by_its_own_prompt(self, tmp_path: Path) -> None:
        numbers = iter(range(100))
        engine = FakeEngine(lambda prompt, seed: said(f"x{next(numbers)}\n__ans__\ny"))
        known = state({"one": "news", "tags": "ner", "two": "news", "more": "ner"})
        method, ctx, rows = self.prepared(tmp_path, engine, known, "two", num_per_task=3)
        assert ctx.engines is not None
        assert ctx.engines.opened == [tmp_path / "two" / "adapter"]
        assert {prompt.messages[1]["content"] for prompt in engine.prompts} == {"__gen__:one", "__gen__:two"}
        assert [r["channel"] for r in rows].count("pseudo/qa") == 6
        kept = method.end_task(ctx)
        assert kept is not None
        assert kept.meta["types"] == {"one": "news", "tags": "ner", "two": "news", "more": "ner", "now": "news"}
        assert len(kept.rows["tasks"]) == 5

    def test_a_new_type_generates_nothing(self, tmp_path: Path) -> None:
        _, ctx, rows = self.prepared(tmp_path, FakeEngine(in_order(said("x"))), state({"one": "ner"}), "one")
        assert ctx.engines is not None
        assert ctx.engines.opened == []
        assert [r["channel"] for r in rows] == ["new/qa", "new/lm"]

    def test_an_untrained_generator_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(UserError, match=r"--lfpt5_lambda_lm is 0\.0, allowed: more than 0 where earlier tasks"):
            self.prepared(tmp_path, FakeEngine(in_order(said("x"))), state({"one": "news"}), "one", lambda_lm=0.0)


class TestTypes:
    def stage(self, folder: Path, earlier: dict[str, str], task: str, **settings: Any) -> tuple[Lfpt5, Any, Any]:
        """A stage after others whose prompts were written before, the last of which is loaded."""
        names = list(earlier)
        for number, name in enumerate(names):
            TUNER.save(prompted(number), folder / name / "adapter", None)
        start = folder / names[-1] / "adapter" if names else None
        model = TUNER.load(sharp_model(), start, True) if start else prompted(99)
        ctx = FakeContext(model, task=task, earlier=names, folder=folder, state=state(earlier))
        ctx.rows = [{"input_ids": [5, 6, 7, 5], "labels": [-100, -100, 7, 5]}]
        method = lfpt5(**settings)
        strip = {
            name.removeprefix("base_model.model.").replace(".default.", "."): p for name, p in ctx.parameters.items()
        }
        ctx = _Named(ctx, strip)
        method.prepare_model(ctx, model)
        return method, ctx, model

    def test_a_type_goes_on_from_its_own_last_prompt(self, tmp_path: Path) -> None:
        earlier = {"one": "news", "tags": "ner"}
        method, ctx, model = self.stage(tmp_path, earlier, "two", task_type="news")
        assert torch.equal(prompt_of(model).embedding, prompt_of(prompted(0)).embedding)
        assert method._teacher is not None
        assert method._teacher.sha256 == sha256_file(tmp_path / "one" / "adapter" / "adapter_model.safetensors")
        found = [(c.name, c.tasks, c.dir.parent.name) for c in method.candidates(ctx)]
        assert found == [("news", ("one", "two"), "two"), ("ner", ("tags",), "tags")]
        assert method.needs_task_id()

    @pytest.mark.parametrize("fkt", [False, True])
    def test_a_new_type_begins_anew_or_at_the_last_prompt(self, tmp_path: Path, fkt: bool) -> None:
        """Training it leaves the other type's file as it was, and that prompt is not in the model."""
        method, _, model = self.stage(tmp_path, {"one": "news"}, "tags", task_type="ner", fkt=fkt)
        old = prompt_of(prompted(0)).embedding
        assert torch.equal(prompt_of(model).embedding, old) is fkt
        assert method._teacher is None
        if not fkt:
            known = sharp_model().get_input_embeddings().weight
            assert all(
                any(torch.equal(known[token], start) for token in (5, 6, 7)) for start in prompt_of(model).embedding
            )
        before = sha256_file(tmp_path / "one" / "adapter" / "adapter_model.safetensors")
        ids = torch.tensor([[1, 2, 3]])
        model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids).loss.backward()
        assert len([p for p in model.parameters() if p.grad is not None]) == 1
        assert sha256_file(tmp_path / "one" / "adapter" / "adapter_model.safetensors") == before

    def test_answers_first(self, tmp_path: Path) -> None:
        _, _, model = self.stage(tmp_path, {}, "one", init="labels")
        known = sharp_model().get_input_embeddings().weight
        assert torch.equal(prompt_of(model).embedding[:2], known[[5, 7]])

    def test_one_type_needs_no_task_id(self, tmp_path: Path) -> None:
        method, ctx, _ = self.stage(tmp_path, {"one": "news"}, "two")
        assert not method.needs_task_id()
        assert [c.dir.parent.name for c in method.candidates(ctx)] == ["two"]

    def test_the_type_of_a_task(self) -> None:
        pairs = Lfpt5Config(task_type="one=news, two = ner")
        assert (pairs.type_of("one", True), pairs.type_of("two", False)) == ("news", "ner")
        assert Lfpt5Config().type_of("one", True) == "default"
        with pytest.raises(UserError, match="from the second task on it must be said"):
            Lfpt5Config().type_of("two", False)
        with pytest.raises(UserError, match="pairs with one of task 'three'"):
            pairs.type_of("three", False)


class _Named:
    """A context whose parameters have the names that a session gives them."""

    def __init__(self, ctx: FakeContext, parameters: dict[str, Any]) -> None:
        self._ctx, self.parameters = ctx, parameters

    def __getattr__(self, name: str) -> Any:
        return getattr(self._ctx, name)


class TestFlags:
    @pytest.mark.parametrize(
        ("flags", "said"),
        [
            (["--lfpt5_prompt_length", "0"], "--lfpt5_prompt_length is 0, allowed: a whole number from 1 to 1024"),
            (["--lfpt5_lambda_lm", "-1"], "--lfpt5_lambda_lm is -1.0, allowed: a number >= 0"),
            (["--lfpt5_lambda_kl", "inf"], "--lfpt5_lambda_kl is inf, allowed: a number >= 0"),
            (["--lfpt5_lambda_kl", "2", "--lfpt5_combine", "authors"], "--lfpt5_lambda_kl is 2.0, allowed: a"),
            (["--lfpt5_combine", "sum"], "--lfpt5_combine is 'sum', allowed: paper, authors"),
            (["--lfpt5_num_per_class", "0"], "--lfpt5_num_per_class is 0, allowed: 1 or more"),
            (["--lfpt5_num_per_task", "0"], "--lfpt5_num_per_task is 0, allowed: 1 or more"),
            (["--lfpt5_gen_backend", "vllm"], "--lfpt5_gen_backend is 'vllm', allowed: transformers, because vLLM"),
            (["--lfpt5_task_type", "a=,b=c"], "--lfpt5_task_type is 'a=,b=c', allowed: a name, or task=type pairs"),
            (["--lfpt5_top_k", "-1"], "--lfpt5_top_k is -1, allowed: 0 or more"),
            (["--lfpt5_init", "random"], "--lfpt5_init is 'random', allowed: vocab, labels"),
            (["--soft_prompt_mlp", "mlp1"], "--soft_prompt_mlp mlp1 does not work with method 'lfpt5', which"),
        ],
    )  # fmt: skip
    def test_refused(self, flags: list[str], said: str) -> None:
        with pytest.raises(UserError) as caught:
            check_method_flags(["--model", "m", "--cl_method", "lfpt5", "--cl_task", "t", *flags])
        assert said in str(caught.value)

    def test_they_become_the_tuners(self) -> None:
        given = flag_values(complete_flags(["--model", "m", "--cl_method", "lfpt5", "--cl_task", "t"]))
        assert (given["tuner_type"], given["soft_prompt_length"]) == (["soft_prompt"], ["300"])
        assert given["soft_prompt_mlp"] == ["none"]
        assert lfpt5(prompt_length=17).required_flags()["soft_prompt_length"] == "17"

    def test_published_values(self) -> None:
        config = Lfpt5Config()
        assert (config.lambda_lm, config.lambda_kl, config.combine, config.init) == (0.25, 0.01, "paper", "vocab")
        assert (config.prompt_length, config.num_per_class, config.num_per_task, config.fkt) == (300, 2, 4, False)
        assert (config.top_k, config.repetition_penalty, config.max_new_tokens) == (64, 2.5, 256)
