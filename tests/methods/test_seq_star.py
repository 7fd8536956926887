"""seq_star: heads, masks and freezing by hand (section 6 of the specification), and small real trainings."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from swift_cl.errors import RunFailure, UserError
from swift_cl.io import MethodState
from swift_cl.methods._classes import ClassTable, parse_labels
from swift_cl.methods._draws import seed32
from swift_cl.methods._heads import class_loss, cosine_logits, first_rows, make_head, visible_logits
from swift_cl.methods.base import Phase
from swift_cl.methods.seq_star import SeqStar, SeqStarConfig
from swift_cl.stages import load_stage
from swift_cl.training.flags import check_method_flags
from tests.support.fake_context import FakeContext
from tests.support.tiny_lora import language_model
from tests.support.train import CLASSES, MODEL, TASKS, adapter, stage_argv, train_stage

LABELS = {"a": ["x", "y"], "b": ["z", "w"]}
HEAD = "base_model.model.score.weight"


def seq_star(**settings) -> SeqStar:
    config = SeqStarConfig(**{"labels": json.dumps(LABELS), **settings})
    config.validate()
    return SeqStar(config)


class Classifier(nn.Module):
    """Stands for a PEFT model: a wrapped head, and one layer of an adapter with dropout."""

    def __init__(self, classes: int = 4, width: int = 2) -> None:
        super().__init__()
        self.score = nn.Module()
        self.score.modules_to_save = nn.ModuleDict({"default": nn.Linear(width, classes, bias=False)})
        self.lora = nn.Linear(width, width)
        self.drop = nn.Dropout(0.1)

    def get_base_model(self):
        return self

    @property
    def head(self):
        return self.score.modules_to_save["default"]


def small_classifier():
    """Qwen2 of two small layers with a LoRA and a head of four classes."""
    from peft import LoraConfig, get_peft_model
    from transformers import Qwen2ForSequenceClassification

    config = language_model().config
    config.num_labels = 4
    return get_peft_model(
        Qwen2ForSequenceClassification(config), LoraConfig(r=2, target_modules=["q_proj"], task_type="SEQ_CLS")
    )


class TestOracles:
    def test_a_softmax_over_the_visible_classes(self) -> None:
        logits, visible = torch.tensor([[2.0, 1.0, 5.0, 0.0]]), torch.tensor([True, True, False, False])
        p = torch.softmax(visible_logits(logits, visible), -1)[0]
        assert p.tolist() == pytest.approx([0.7311, 0.2689, 0, 0], abs=1e-4)
        assert float(class_loss(logits, torch.tensor([1]), visible)) == pytest.approx(1.3133, abs=1e-4)
        everything = torch.ones(4, dtype=torch.bool)
        assert float(class_loss(logits, torch.tensor([1]), everything)) == pytest.approx(4.0722, abs=1e-4)

    def test_b_cosine_with_a_scale(self) -> None:
        h, rows = torch.tensor([[3.0, 4.0]]), torch.tensor([[1.0, 0.0], [0.0, 2.0]])
        assert cosine_logits(h, rows, 1.0)[0].tolist() == pytest.approx([0.6, 0.8])
        logits = cosine_logits(h, rows, 10.0)
        assert torch.softmax(logits, -1)[0].tolist() == pytest.approx([0.1192, 0.8808], abs=1e-4)
        assert float(class_loss(logits, torch.tensor([0]), torch.ones(2, dtype=torch.bool))) == pytest.approx(
            2.1269, abs=1e-4
        )

    def test_the_last_axis_is_normalised(self) -> None:
        """Features [rows, positions, width]: a position never changes another one's logits."""
        h, rows = torch.randn(2, 3, 4), torch.randn(5, 4)
        assert torch.allclose(cosine_logits(h, rows, 2.0)[:, 1], cosine_logits(h[:, 1], rows, 2.0))

    @pytest.mark.parametrize("scale", [None, 10.0])
    def test_c_frozen_rows_get_no_gradient_and_no_decay(self, scale) -> None:
        head = nn.Linear(2, 4, bias=False)
        with torch.no_grad():
            head.weight.copy_(torch.tensor([[4.0, 4.0], [3.0, 3.0], [1.0, 2.0], [2.0, 1.0]]))
        before = head.weight.detach().clone()
        frozen = make_head(head, scale, [0, 1])
        loss = class_loss(frozen(torch.randn(6, 2)), torch.tensor([2, 3, 2, 3, 2, 3]), torch.ones(4, dtype=torch.bool))
        torch.autograd.backward(loss)
        assert head.weight.grad is not None
        assert torch.equal(head.weight.grad[:2], torch.zeros(2, 2))
        assert bool((head.weight.grad[2:] != 0).any())
        decay = float(seq_star().required_flags()["weight_decay"])
        torch.optim.AdamW(head.parameters(), lr=0.1, weight_decay=decay).step()
        assert torch.equal(head.weight[:2], before[:2])
        torch.optim.AdamW(head.parameters(), lr=0.1, weight_decay=0.1).step()
        moved = (before - head.weight.detach())[:2, 0]
        assert moved.tolist() == pytest.approx([0.04, 0.03], abs=1e-6), "what a decay of 0.1 would do"

    def test_rows_that_are_not_visible_get_no_gradient(self) -> None:
        logits = torch.tensor([[2.0, 1.0, 5.0, 0.0]], requires_grad=True)
        torch.autograd.backward(class_loss(logits, torch.tensor([1]), torch.tensor([True, True, False, False])))
        assert logits.grad is not None
        assert logits.grad[0, 2:].tolist() == [0, 0]


class TestHooks:
    @pytest.mark.parametrize(
        ("settings", "earlier", "visible", "frozen"),
        [
            ({}, [], [0, 1], []),
            ({}, ["a"], [0, 1, 2, 3], [0, 1]),
            ({"scenario": "til"}, ["a"], [2, 3], [0, 1]),
            ({"preallocate": True}, [], [0, 1, 2, 3], []),
            ({"freeze_old_heads": False}, ["a"], [0, 1, 2, 3], []),
        ],
    )
    def test_visible_and_frozen(self, settings, earlier, visible, frozen) -> None:
        method, ctx = seq_star(**settings), FakeContext(task="b" if earlier else "a", earlier=earlier)
        assert sorted(method.visible(ctx)) == visible
        assert method._frozen(ctx) == frozen

    @pytest.mark.parametrize(
        ("settings", "phase", "trained", "dropout"),
        [
            ({}, "", ["score.modules_to_save.default.weight"], 0.0),
            ({"warmup_target": "ce"}, "warmup", None, 0.1),
            ({"freeze_backbone": False}, "", None, 0.1),
        ],
    )
    def test_what_is_trained(self, settings, phase, trained, dropout) -> None:
        method, model = seq_star(**settings), Classifier()
        ctx = FakeContext(model, task="a")
        ctx.phase = phase
        method.prepare_model(ctx, model)
        assert (trained is None and len(ctx.parameters) == 3) or list(ctx.parameters) == trained
        assert model.drop.p == dropout

    @pytest.mark.parametrize("head", ["cosine", "linear"])
    def test_the_head_is_drawn_once(self, head: str) -> None:
        """In the first task: rows of length 1 for the cosine. A later one takes what was loaded."""
        method, model = seq_star(head=head), Classifier()
        method.prepare_model(FakeContext(model, task="a"), model)
        drawn = model.head.weight.detach().clone()
        assert torch.equal(drawn, first_rows(4, 2, head == "cosine", seed32("seq_star", 0)))
        later = Classifier()
        loaded = later.head.weight.detach().clone()
        method.prepare_model(FakeContext(later, task="b", earlier=["a"]), later)
        assert torch.equal(later.head.weight, loaded)

    def test_the_head_has_the_form_that_the_flags_say(self) -> None:
        scales = []
        for settings in ({}, {"cosine_scale": 2.5}, {"head": "linear"}):
            model = Classifier()
            seq_star(**settings).prepare_model(FakeContext(model, task="a"), model)
            scales.append(model.head.scale)
        assert scales == [16.0, 2.5, None]

    @pytest.mark.parametrize("scale", [None, 10.0])
    def test_logits_are_of_full_precision_whatever_the_trainings(self, scale) -> None:
        """1 + 2^-10 is 1 in bf16."""
        head = nn.Linear(1, 1, bias=False)
        with torch.no_grad():
            head.weight.fill_(1 + 2**-10)
        make_head(head, scale, [])
        h = torch.tensor([[3.0]])
        plain = head(h)
        with torch.autocast("cpu", torch.bfloat16):
            low = head(h)
        assert low.dtype == torch.float32
        assert torch.equal(low, plain)
        assert plain.item() == pytest.approx(3 * (1 + 2**-10) if scale is None else 10.0, abs=1e-6)

    def test_a_server_answers_with_the_classes_learned_so_far(self) -> None:
        for method in (seq_star(), seq_star(preallocate=True), seq_star(scenario="til")):
            files = method.export_files(FakeContext(task="a"))
            assert files == {"classes.json": {"labels": ["x", "y", "z", "w"], "visible": [0, 1]}}
            files = method.export_files(FakeContext(task="b", earlier=["a"]))
            assert files["classes.json"]["visible"] == [0, 1, 2, 3]

    @pytest.mark.parametrize(
        ("name", "had"),
        [
            ("head", "linear"),
            ("cosine_scale", 4.0),
            ("scenario", "til"),
            ("preallocate", True),
            ("labels", json.dumps({"a": ["y", "x"], "b": ["z", "w"]})),
        ],
    )
    def test_settings_of_the_stage_before(self, name: str, had) -> None:
        method, model = seq_star(), Classifier()
        ctx = FakeContext(model, task="b", earlier=["a"])
        method.prepare_model(ctx, model)
        ctx.state = MethodState(meta={"settings": {**vars(method.config), name: had}})
        with pytest.raises(UserError, match=f"--seq_star_{name} is .*, but the stage before was trained with"):
            method.train_begin(ctx)
        ctx.state = MethodState(meta={"settings": vars(method.config)})
        method.train_begin(ctx)

    @pytest.mark.parametrize("with_head", [False, True])
    def test_the_warm_up_goes_on(self, tmp_path: Path, with_head: bool) -> None:
        """What it trained is put in place: the adapter ('lm'), or adapter and head ('ce')."""
        from safetensors.torch import load_file, save_file

        model = small_classifier()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.normal_()
        model.save_pretrained(str(tmp_path))
        stored = {n: t for n, t in load_file(tmp_path / "adapter_model.safetensors").items() if with_head or n != HEAD}
        save_file(stored, tmp_path / "adapter_model.safetensors")
        model = small_classifier()
        ctx = FakeContext(model, task="a")
        ctx.phases = {"warmup": tmp_path}
        seq_star().prepare_model(ctx, model)
        model.save_pretrained(str(tmp_path / "again"))
        found = load_file(tmp_path / "again" / "adapter_model.safetensors")
        drawn = first_rows(4, 16, True, seed32("seq_star", 0))
        assert found.keys() == stored.keys() | {HEAD}
        assert all(torch.equal(found[name], stored.get(name, drawn)) for name in found)

    def test_the_mean_is_over_the_rows_of_the_step(self) -> None:
        """Two micro-batches of 3 rows and 1 row with CE ln 2 each: (3 + 1) ln 2 / 4."""
        method, ctx = seq_star(), FakeContext(Classifier(), task="a")
        method.prepare_model(ctx, ctx.model)
        method.train_begin(ctx)
        batches = [{"labels": torch.tensor([0, 1, 0])}, {"labels": torch.tensor([1])}]
        method.window(ctx, batches)

        class Output:
            logits: torch.Tensor

        total = 0.0
        for batch in batches:
            output = Output()
            output.logits = torch.zeros(len(batch["labels"]), 4)
            total += float(method.loss(ctx, None, batch, torch.tensor(9.0), output))
        assert total == pytest.approx(0.693147, abs=1e-6)

    def test_the_rows_of_the_step_are_those_of_all_ranks(self, monkeypatch) -> None:
        """Three rows here, five on another rank: the divisor is 8."""
        method, ctx = seq_star(), FakeContext(Classifier(), task="a")
        method.prepare_model(ctx, ctx.model)
        method.train_begin(ctx)
        monkeypatch.setattr(ctx, "all_reduce_sum", lambda tensor: tensor + 5)
        batch = {"labels": torch.tensor([0, 1, 0])}
        method.window(ctx, [batch])
        loss = method.loss(ctx, None, batch, torch.tensor(9.0), SimpleNamespace(logits=torch.zeros(3, 4)))
        assert float(loss) == pytest.approx(3 * 0.693147 / 8, abs=1e-6)

    def test_the_warm_up_is_a_training_of_its_own(self) -> None:
        lm = {"num_train_epochs": "2.0", "learning_rate": "0.0001", "cl_method": "seq", "task_type": "causal_lm"}
        ce = {"num_train_epochs": "2.0", "learning_rate": "0.0001"}
        assert seq_star(warmup_epochs=2.0).phases(True) == (Phase("warmup", lm), Phase(""))
        assert seq_star(warmup_epochs=2.0, warmup_target="ce").phases(True) == (Phase("warmup", ce), Phase(""))
        (warm, _) = seq_star(warmup_lr=0.5).phases(True)
        assert warm.flags == {**lm, "num_train_epochs": "1.0", "learning_rate": "0.5"}
        assert seq_star(warmup_epochs=0.0).phases(True) == seq_star().phases(False) == (Phase(""),)

    def test_export_chooses_the_same_class(self) -> None:
        """Cosine becomes linear with rows of length 1; frozen rows keep their bits."""
        method, ctx = seq_star(), FakeContext(task="b", earlier=["a"])
        rows = torch.randn(4, 6) * torch.tensor([[1.0], [7.0], [0.1], [3.0]])
        lora = torch.randn(2, 2)
        found = method.export(ctx, {"score.modules_to_save.weight": rows, "lora_A": lora})
        kept = found["score.modules_to_save.weight"]
        assert torch.equal(kept[:2], rows[:2])
        assert kept[2:].norm(dim=-1).tolist() == pytest.approx([1, 1])
        assert found["lora_A"] is lora
        new, h = torch.randn(64, 6), kept[2:]
        assert torch.equal((new @ h.T).argmax(-1), cosine_logits(new, rows[2:], 16.0).argmax(-1))
        assert seq_star(head="linear").export(ctx, {"score.x": rows})["score.x"] is rows

    def test_a_changed_old_row_is_found(self) -> None:
        method, ctx = seq_star(), FakeContext(Classifier(), task="b", earlier=["a"])
        method.prepare_model(ctx, ctx.model)
        method._before = ctx.model.head.weight.detach()[[0, 1]].clone()
        with torch.no_grad():
            ctx.model.head.weight[1, 0] += 1e-6
        with pytest.raises(RunFailure, match="rows of the head that belong to earlier tasks have changed"):
            method.end_task(ctx)

    def test_first_rows(self) -> None:
        """48 numbers, uniform within +-1/4."""
        rows = first_rows(3, 16, False, 1)
        assert 0.2 < float(rows.abs().max()) <= 0.25
        assert not torch.equal(first_rows(3, 16, False, 2), rows)
        assert torch.equal(first_rows(3, 16, False, 1), rows)
        assert first_rows(3, 16, True, 1).norm(dim=-1).tolist() == pytest.approx([1, 1, 1])


class TestLabels:
    def test_rows_lose_their_answer_and_get_a_number(self) -> None:
        row = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "w"}]}
        assert ClassTable(LABELS).labelled("b", [row]) == [{"messages": [{"role": "user", "content": "q"}], "label": 3}]

    @pytest.mark.parametrize(
        ("text", "said"),
        [
            ("", "it is missing"),
            ("none.json", "'none.json' is no file"),
            ("{", "not valid JSON"),
            ('{"a": []}', "expected"),
            ('{"a": ["x"], "b": ["y", "x"]}', "the label 'x' stands in 'a' and in 'b'"),
            ('{"a": ["x", "x"]}', "the label 'x' stands in 'a' and in 'a'"),
        ],
    )
    def test_refused(self, text, said) -> None:
        with pytest.raises(UserError, match=said):
            parse_labels(text, "--seq_star_labels")

    def test_a_stage_without_labels_is_refused_before_anything_is_loaded(self, tmp_path: Path) -> None:
        with pytest.raises(UserError, match="it is missing"):
            train_stage("seq_star", TASKS[0], tmp_path, seq_star_labels=None)

    def test_rows_refused(self) -> None:
        table = ClassTable(LABELS)
        other = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "x"}]}
        with pytest.raises(UserError, match="task 'b', row 0: the answer 'x' is none of the task's labels: z, w"):
            table.labelled("b", [other])
        with pytest.raises(UserError, match="row 0: several turns"):
            table.labelled("a", [{"messages": [*other["messages"], *other["messages"]]}])
        with pytest.raises(UserError, match="task 'c' has no labels; --cl_task must be one of: a, b"):
            table.of("c")

    @pytest.mark.parametrize(
        ("changes", "said"),
        [
            ({"seq_star_cosine_scale": 0}, "--seq_star_cosine_scale"),
            ({"seq_star_head": "linear", "seq_star_cosine_scale": 2}, "only with --seq_star_head cosine"),
            ({"seq_star_warmup_epochs": -1}, "--seq_star_warmup_epochs"),
            ({"seq_star_warmup_lr": 0}, "--seq_star_warmup_lr"),
            ({"seq_star_scenario": "til", "seq_star_preallocate": True}, "--seq_star_preallocate"),
            ({"weight_decay": 0.1}, "--weight_decay 0.1 does not work with method 'seq_star', which needs 0"),
            ({"task_type": "causal_lm"}, "--task_type causal_lm does not work"),
        ],
    )
    def test_flags_refused(self, tmp_path: Path, changes, said) -> None:
        with pytest.raises(UserError, match=said):
            check_method_flags(stage_argv("seq_star", TASKS[0], tmp_path, **changes))


@pytest.mark.slow
@pytest.mark.parametrize("target", ["lm", "ce"])
def test_two_tasks(tmp_path: Path, target: str) -> None:
    """The warm-up moves the adapter, nothing else ever does; old rows keep their bits, rows of later tasks too; and
    PEFT alone chooses the classes that the training's own head chooses."""
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification

    one, two = tmp_path / "1", tmp_path / "2"
    own = {"seq_star_warmup_target": target, "seq_star_warmup_lr": 1e-2}
    train_stage("seq_star", TASKS[0], one, **own)
    sft = train_stage("seq_star", TASKS[1], two, one, **own)
    before, after = adapter(one), adapter(two)
    lora = [name for name in before if "lora_" in name]
    assert any(bool(before[name].any()) for name in lora if "lora_B" in name), "the warm-up taught nothing"
    assert all(torch.equal(before[name], after[name]) for name in lora)
    assert torch.equal(before[HEAD][:2], after[HEAD][:2])
    assert not torch.equal(before[HEAD][2:], after[HEAD][2:])
    start = first_rows(5, before[HEAD].shape[1], True, seed32("seq_star", 42))
    assert torch.allclose(before[HEAD][2:], start[2:], atol=1e-6), "classes of the second task moved in the first"
    stage = load_stage(two)
    assert stage.model_args["task_type"] == "seq_cls"
    assert stage.model_args["num_labels"] == "5"
    assert json.loads((stage.weights_dir / "classes.json").read_text()) == {
        "labels": ["weather", "sport", "food", "travel", "music"], "visible": [0, 1, 2, 3, 4]
    }  # fmt: skip
    assert not list((one / "cl_data" / "seq_star").glob("warmup-*")), "the warm-up's folder is left"

    base = AutoModelForSequenceClassification.from_pretrained(MODEL, num_labels=5, dtype=torch.float32)
    served = PeftModel.from_pretrained(base, str(stage.weights_dir)).eval()
    live = sft.trainer.model.eval()
    for row in json.loads((CLASSES / f"{TASKS[1]}.json").read_text())[:4]:
        ids = torch.tensor([sft.template.encode({"messages": row["messages"][:1]})["input_ids"]])
        with torch.no_grad():
            ours, theirs = (
                model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits for model in (live, served)
            )
        assert int(ours.argmax()) == int(theirs.argmax())


@pytest.mark.slow
def test_a_stage_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    one = tmp_path / "1"
    quick = {"seq_star_warmup_epochs": 0, "max_steps": 1}
    train_stage("seq_star", TASKS[0], one, **quick)
    with pytest.raises(UserError, match="--seq_star_head is 'linear', but the stage before was trained with 'cosine'"):
        train_stage("seq_star", TASKS[1], tmp_path / "2", one, seq_star_head="linear", **quick)
