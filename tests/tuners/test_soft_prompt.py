"""soft_prompt: its numbers by hand, its place in padded batches, what a file holds, and what is refused."""

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import PeftModel, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file
from torch import Tensor

from swift_cl.errors import UserError
from swift_cl.training.flags import check_method_flags
from swift_cl.tuners.registry import get_tuner
from swift_cl.tuners.soft_prompt import start
from swift_cl.tuners.soft_prompt.layer import Prompt
from swift_cl.tuners.soft_prompt.model import new_config, prompt_of
from swift_cl.tuners.soft_prompt.placing import Placed, positions
from swift_cl.tuners.soft_prompt.stacking import put_in_front
from tests.support.soft_prompts import WIDTH, config, prompted, rows_of, sharp_model

IDS = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]])
TUNER = get_tuner("soft_prompt")
KINDS = ("weight", "bias")


def logits(model: Any, ids: Tensor = IDS, mask: Tensor | None = None) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(input_ids=ids, attention_mask=torch.ones_like(ids) if mask is None else mask).logits
    return found


class TestPrompt:
    @pytest.mark.parametrize(("layer_norm", "wanted"), [(False, [3.0, -1.0]), (True, [1.999995, -1.999995])])
    def test_residual_mlp_by_hand(self, layer_norm: bool, wanted: list[float]) -> None:
        """W1 = I, W2 = 2 I: f((1, -1)) = (2, 0), normalised (1, -1) / sqrt(1 + 1e-5)."""
        prompt = Prompt(config(mlp="mlp1", layer_norm=layer_norm, hidden_size=2, bottleneck=2, length=1))
        tensors = dict(prompt.named_parameters())
        with torch.no_grad():
            tensors["embedding"].copy_(torch.tensor([[1.0, -1.0]]))
            tensors["first_weight"].copy_(torch.eye(2))
            tensors["last_weight"].copy_(2 * torch.eye(2))
            tensors["first_bias"].zero_()
            tensors["last_bias"].zero_()
        assert prompt().tolist()[0] == pytest.approx(wanted, abs=1e-6)

    def test_two_hidden_layers_by_hand(self) -> None:
        """All weights 1, biases 0: (1, 1) -> 4 x relu(2) -> 2 x tanh(8) -> 2 tanh(8), plus 1."""
        prompt = Prompt(config(mlp="mlp2", layer_norm=False, hidden_size=2, bottleneck=4, length=1))
        with torch.no_grad():
            for name, tensor in prompt.named_parameters():
                tensor.fill_(0.0 if name.endswith("bias") else 1.0)
        assert tuple(prompt.get_parameter("second_weight").shape) == (2, 4)
        assert prompt().tolist()[0] == pytest.approx([1 + 2 * math.tanh(8)] * 2)

    def test_only_the_own_prompt_is_trained(self) -> None:
        model = prompted(mlp="mlp1", earlier=2)
        model(input_ids=IDS, attention_mask=torch.ones_like(IDS), labels=IDS).loss.backward()
        trained = {name.split(".default.")[-1] for name, p in model.named_parameters() if p.requires_grad}
        assert trained == {"embedding", *(f"{part}_{kind}" for part in ("first", "last", "norm") for kind in KINDS)}
        assert all(p.grad is not None for p in prompt_of(model).parameters())
        model.set_adapter("default")  # PEFT sets everything of an adapter to be trained
        earlier = prompt_of(model).earlier
        assert earlier is not None
        assert not earlier.requires_grad
        assert TUNER.has_buffers  # FSDP2 must know


class TestPlace:
    def test_by_hand(self) -> None:
        """Two prompt rows 9 behind the padding 0 of each row."""
        mask = torch.tensor([[0, 0, 1], [1, 1, 1], [0, 1, 1]])
        tokens = torch.tensor([[0, 0, 1], [1, 2, 3], [0, 1, 2]])
        for order in ([0, 1, 2], [1, 2, 0]):  # also where the first row has no padding
            again = Placed.behind(mask[order], 2)
            assert torch.equal(again.take_out(again.put_in(torch.tensor([9, 9]), tokens[order])), tokens[order])
            assert again.begins is not None
        place = Placed.behind(mask, 2)
        assert place.put_in(torch.tensor([8, 9]), tokens)[0].tolist() == [0, 0, 8, 9, 1]
        whole = place.put_in(torch.tensor([9, 9]), tokens)
        assert whole.tolist() == [[0, 0, 9, 9, 1], [9, 9, 1, 2, 3], [0, 9, 9, 1, 2]]
        assert torch.equal(place.take_out(whole), tokens)
        assert positions(place.put_in(torch.tensor([1, 1]), mask)).tolist() == [
            [0, 0, 0, 1, 2],
            [0, 1, 2, 3, 4],
            [0, 0, 1, 2, 3],
        ]

    def test_another_mask_is_refused(self) -> None:
        with pytest.raises(ValueError, match=r"of the form \[batch, tokens\]"):
            Placed.behind(torch.ones(1, 1, 4, 4), 2)

    @pytest.mark.parametrize("mlp", ["none", "mlp1"])
    def test_the_model_reads_prompt_earlier_prompts_and_input(self, mlp: str) -> None:
        model, base = prompted(mlp=mlp, earlier=2), sharp_model()
        rows = rows_of(model)
        assert rows.shape == (5, WIDTH)
        assert rows[3:].tolist() == prompt_of(model).get_buffer("earlier").tolist()
        embedded = base.get_input_embeddings()(IDS)
        with torch.no_grad():
            whole = base(inputs_embeds=torch.cat([rows.expand(2, -1, -1), embedded], dim=1)).logits
            without_mask = model(input_ids=IDS).logits
            from_embeddings = model(inputs_embeds=embedded, attention_mask=torch.ones_like(IDS)).logits
        assert torch.allclose(logits(model), whole[:, 5:], atol=1e-4)
        assert torch.allclose(without_mask, whole[:, 5:], atol=1e-4)
        assert torch.allclose(from_embeddings, whole[:, 5:], atol=1e-4)

    @pytest.mark.parametrize("left", [True, False])
    def test_a_padded_row_answers_as_it_does_alone(self, left: bool) -> None:
        model, alone = prompted(earlier=2), torch.tensor([[5, 6, 7]])
        pads = torch.zeros(1, 3, dtype=torch.long)
        row, keep = ([pads, alone], slice(3, 6)) if left else ([alone, pads], slice(0, 3))
        ids = torch.cat([torch.cat(row, dim=1), torch.tensor([[1, 2, 3, 4, 5, 6]])])
        mask = torch.ones_like(ids)
        mask[0] = (torch.cat(row, dim=1) > 0)[0]
        assert torch.allclose(logits(model, ids, mask)[0, keep], logits(model, alone)[0], atol=1e-4)

    def test_pefts_own_prompts_answer_otherwise_in_a_padded_batch(self) -> None:
        """Why there is another tuner; where this fails PEFT has changed, and the pages are to say so."""
        model = get_peft_model(sharp_model(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5)).eval()
        with torch.no_grad():
            next(model.prompt_encoder.parameters()).normal_()
        ids, alone = torch.tensor([[0, 0, 0, 5, 6, 7]]), torch.tensor([[5, 6, 7]])
        padded = logits(model, ids, (ids > 0).long())[0, -3:]
        assert (padded - logits(model, alone)[0, -3:]).abs().max() > 0.1

    def test_generation_is_that_of_the_row_alone_and_the_cache_changes_nothing(self) -> None:
        model, rows = prompted(earlier=2), [[5, 6, 7], [9, 1, 2, 3, 4, 11]]
        ids = torch.tensor([[0, 0, 0, *rows[0]], rows[1]])
        settings = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
        together = model.generate(input_ids=ids, attention_mask=(ids > 0).long(), use_cache=True, **settings)
        for number, row in enumerate(rows):
            alone = torch.tensor([row])
            for cached in (True, False):
                said = model.generate(
                    input_ids=alone, attention_mask=torch.ones_like(alone), use_cache=cached, **settings
                )
                assert said[0, len(row) :].tolist() == together[number, 6:].tolist()
        without = sharp_model().generate(input_ids=ids, attention_mask=(ids > 0).long(), **settings)
        assert not torch.equal(without, together)

    def test_hidden_states_have_the_inputs_positions(self) -> None:
        model = prompted()
        with torch.no_grad():
            outputs = model(input_ids=IDS, attention_mask=torch.ones_like(IDS), output_hidden_states=True)
        assert {tuple(states.shape) for states in outputs.hidden_states} == {(2, 4, WIDTH)}


class TestFile:
    def test_and_back(self, tmp_path: Path) -> None:
        model = prompted(mlp="mlp2", earlier=2)
        TUNER.save(model, tmp_path, None)
        served, trained = TUNER.load(sharp_model(), tmp_path, False), TUNER.load(sharp_model(), tmp_path, True)
        assert torch.equal(logits(served.eval()), logits(model))
        assert torch.equal(logits(trained.eval()), logits(model))
        stored = load_file(tmp_path / "adapter_model.safetensors")
        of_mlp = {f"{part}_{kind}" for part in ("first", "second", "last", "norm") for kind in KINDS}
        assert {name.split("soft_prompt_of.")[-1] for name in stored} == {"embedding", "earlier"} | of_mlp

    def test_earlier_prompts_stay_bit_for_bit(self, tmp_path: Path) -> None:
        """Also under an engine that casts the module: DeepSpeed in bf16."""
        TUNER.save(prompted(earlier=2), tmp_path / "1", None)
        model = TUNER.load(sharp_model(), tmp_path / "1", True)
        model.bfloat16()
        TUNER.save(model, tmp_path / "2", None)
        one, two = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("1", "2"))
        name = next(key for key in one if key.endswith(".earlier"))
        assert torch.equal(one[name], two[name])

    def test_what_was_gathered_is_what_is_saved(self, tmp_path: Path) -> None:
        """Under ZeRO-3 the live tensors are empty; the earlier prompts are those that were loaded all the same."""
        TUNER.save(prompted(earlier=2), tmp_path / "1", None)
        model = TUNER.load(sharp_model(), tmp_path / "1", True)
        TUNER.save(model, tmp_path / "2", {name: tensor + 1 for name, tensor in model.state_dict().items()})
        one, two = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("1", "2"))
        assert len(one) == 2
        for name, tensor in one.items():
            assert torch.equal(two[name], tensor + name.endswith(".embedding")), name

    def test_adapters_and_the_base_in_turn(self, tmp_path: Path) -> None:
        """Prompts of two lengths beside each other: at stage k task i is asked with the prompts of stage i."""
        for number, earlier in ((1, 0), (2, 3)):
            TUNER.save(prompted(number, earlier=earlier), tmp_path / str(number), None)
        model: Any = PeftModel.from_pretrained(sharp_model(), str(tmp_path / "1"), adapter_name="one")
        model.load_adapter(str(tmp_path / "2"), "two")
        model.eval()
        said = {}
        for name in ("one", "two"):
            model.set_adapter(name, inference_mode=True)
            said[name] = logits(model)
        with model.disable_adapter():
            assert torch.equal(logits(model), logits(sharp_model()))
        assert torch.allclose(said["one"], logits(prompted(1)), atol=1e-6)
        assert torch.allclose(said["two"], logits(prompted(2, earlier=3)), atol=1e-6)
        with torch.no_grad():
            named = model(input_ids=IDS, attention_mask=torch.ones_like(IDS), adapter_names=["one", "one"]).logits
            nobody = model(input_ids=IDS, attention_mask=torch.ones_like(IDS), adapter_names=["__base__"]).logits
        assert torch.equal(named, said["one"])
        assert torch.equal(nobody, logits(sharp_model()))
        for names in (["one", "two"], ["one", "__base__"]):
            with pytest.raises(ValueError, match="one soft prompt for all its rows"):
                model(input_ids=IDS, attention_mask=torch.ones_like(IDS), adapter_names=names)
        model.base_model.set_adapter(["one", "two"])
        with pytest.raises(ValueError, match="one soft prompt is active at a time, not one, two"):
            logits(model)

    def test_the_base_model_comes_back(self) -> None:
        base = TUNER.base_of(prompted())
        assert torch.equal(logits(base.eval()), logits(sharp_model()))
        assert not [name for name, _ in base.named_parameters() if "soft_prompt" in name or "base_layer" in name]

    def test_a_config_of_another_form(self) -> None:
        for changes in ({"length": 0}, {"mlp": "mlp3"}, {"hidden_size": 0}, {"earlier": -1}, {"schema_version": 9}):
            with pytest.raises(ValueError, match=next(iter(changes))):
                config(**changes)


def test_a_new_adapter_starts_as_the_flags_say(monkeypatch: pytest.MonkeyPatch) -> None:
    TUNER.register()
    starts: list[Any] = []
    monkeypatch.setattr(start, "start_at", lambda model, *how: starts.append(how))
    TUNER.prepare_model(SimpleNamespace(seed=5), TUNER.config_class(init="text", init_text="news"), sharp_model())
    TUNER.prepare_model(SimpleNamespace(seed=6), TUNER.config_class(), sharp_model())
    assert starts == [("text", "news", 5), ("vocab", "", 6)]


def test_tokens_of_a_text_are_those_of_its_words(monkeypatch: pytest.MonkeyPatch) -> None:
    class Tokenizer:
        def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
            return {"input_ids": [0] * add_special_tokens + [len(word) for word in text.split()]}

    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", lambda folder: {"m": Tokenizer()}[folder])
    assert start.tokens_of(SimpleNamespace(model_dir="m"), "of good news") == [2, 4, 4]


class TestStart:
    @staticmethod
    def started(monkeypatch: pytest.MonkeyPatch, init: str, seed: int) -> Tensor:
        """The rows of a prompt of five, of a text with three tokens."""
        monkeypatch.setattr(start, "tokens_of", lambda model, text: [7, 3, 9])
        model = get_peft_model(sharp_model(), config(length=5))
        start.start_at(model, init, "some text", seed)
        return rows_of(model)

    def test_at_the_tokens_of_a_text_from_its_beginning_again(self, monkeypatch: pytest.MonkeyPatch) -> None:
        words = sharp_model().get_input_embeddings().weight
        assert torch.equal(self.started(monkeypatch, "text", 1), words[[7, 3, 9, 7, 3]])

    def test_at_tokens_that_the_seed_draws(self, monkeypatch: pytest.MonkeyPatch) -> None:
        words = sharp_model().get_input_embeddings().weight
        rows = self.started(monkeypatch, "vocab", 1)
        assert all(bool((row == words).all(dim=1).any()) for row in rows)
        assert len(rows.unique(dim=0)) > 1
        assert torch.equal(rows, self.started(monkeypatch, "vocab", 1))
        assert not torch.equal(rows, self.started(monkeypatch, "vocab", 2))

    def test_a_text_without_a_token(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(start, "tokens_of", lambda model, text: [])
        with pytest.raises(UserError, match="the text in which the prompt is to start has no token: ' '"):
            start.start_at(get_peft_model(sharp_model(), config()), "text", " ", 0)


def test_the_prompts_of_three_tasks_stand_the_newest_first() -> None:
    """Each is frozen as it was computed when its task ended; the model reads new, second, first."""
    model = get_peft_model(sharp_model(), config(length=2, mlp="none"))
    start.set_rows(model, torch.full((2, WIDTH), 1.0))
    put_in_front(model, seed=0)
    start.set_rows(model, torch.full((2, WIDTH), 2.0))
    put_in_front(model, seed=0)
    start.set_rows(model, torch.full((2, WIDTH), 3.0))
    assert rows_of(model)[:, 0].tolist() == [3.0, 3.0, 2.0, 2.0, 1.0, 1.0]
    assert model.peft_config["default"].earlier == 4


def test_a_new_prompt_draws_with_a_seed_of_its_own() -> None:
    """The run's random numbers go on as if there had been none."""
    found = []
    for seed in (7, 7, 8):
        model = get_peft_model(sharp_model(), config(mlp="mlp1"))
        torch.manual_seed(3)
        wanted = torch.rand(4)
        torch.manual_seed(3)
        put_in_front(model, seed)
        assert torch.equal(torch.rand(4), wanted)
        found.append(prompt_of(model).get_parameter("first_weight"))
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


class TestFlags:
    @pytest.mark.parametrize(
        ("flags", "said"),
        [
            (["--soft_prompt_length", "0"], "--soft_prompt_length is 0, allowed: a whole number from 1 to 1024"),
            (["--soft_prompt_length", "1025"], "--soft_prompt_length is 1025, allowed: a whole number from 1"),
            (["--soft_prompt_mlp", "mlp3"], "--soft_prompt_mlp is 'mlp3', allowed: none, mlp1, mlp2"),
            (["--soft_prompt_bottleneck", "1"], "--soft_prompt_bottleneck is 1, allowed: a whole number >= 2"),
            (
                ["--soft_prompt_mlp", "none", "--soft_prompt_layer_norm", "false"],
                "--soft_prompt_layer_norm is False, allowed: nothing but the default with --soft_prompt_mlp none",
            ),
            (["--soft_prompt_init", "text"], "--soft_prompt_init_text is '', allowed: a text with --soft_prompt_init"),
            (["--soft_prompt_init_text", "news"], "--soft_prompt_init_text is 'news', allowed: a text with"),
            (
                ["--soft_prompt_mlp", "none", "--soft_prompt_bottleneck", "9"],
                "--soft_prompt_bottleneck is 9, allowed: nothing but the default with --soft_prompt_mlp none",
            ),
            (["--soft_prompt_init", "text", "--soft_prompt_init_text", " "], "is ' ', allowed: a text with"),
            (["--tuner_backend", "unsloth"], "--tuner_backend unsloth does not work with --tuner_type soft_prompt"),
            (["--modules_to_save", "lm_head"], "--modules_to_save lm_head does not work with --tuner_type soft"),
            (["--task_type", "seq_cls"], "--task_type seq_cls does not work with --tuner_type soft_prompt"),
        ],
    )
    def test_refused(self, flags: list[str], said: str) -> None:
        with pytest.raises(UserError) as caught:
            check_method_flags(
                ["--model", "m", "--cl_method", "seq", "--cl_task", "t", "--tuner_type", "soft_prompt", *flags]
            )
        assert said in str(caught.value)

    def test_at_the_ends_of_their_ranges(self) -> None:
        flags = ["--tuner_type", "soft_prompt", "--soft_prompt_length", "1024", "--soft_prompt_bottleneck", "2"]
        check_method_flags(["--model", "m", "--cl_method", "seq", "--cl_task", "t", *flags])

    def test_a_model_without_one_backbone(self) -> None:
        from transformers import T5Config, T5ForConditionalGeneration

        sizes = {"vocab_size": 8, "d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2}
        model = T5ForConditionalGeneration(T5Config(**sizes))
        with pytest.raises(UserError, match="T5ForConditionalGeneration is no language model with one backbone"):
            new_config(model, TUNER.config_class())
        for name in ("", "decoder"):
            model = SimpleNamespace(base_model_prefix=name, config=SimpleNamespace(is_encoder_decoder=False))
            with pytest.raises(UserError, match="SimpleNamespace is no language model with one backbone"):
                new_config(model, TUNER.config_class())
