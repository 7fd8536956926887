"""prompt_tuning, prefix_tuning and p_tuning: sizes and losses by hand, what a file holds, and what is refused."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, PrefixTuningConfig, PromptEncoderConfig, PromptTuningConfig
from safetensors.torch import load_file, save_file
from torch import Tensor

from swift_cl.errors import RunFailure, UserError
from swift_cl.training.flags import check_method_flags, complete_flags, flag_values
from swift_cl.tuners import _prompt_model
from swift_cl.tuners._prompt_model import encoder_of, file_tensors, wrap
from swift_cl.tuners.registry import get_tuner
from tests.support.tiny_lora import language_model

IDS = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]])
N = 5
# The model: d 16, 2 layers, 1 key-value head of width 8, vocabulary 64.
CONFIGS: dict[str, Any] = {
    "prompt_tuning": lambda: PromptTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=N, prompt_tuning_init="SAMPLE_VOCAB"
    ),
    "prefix_tuning": lambda: PrefixTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=N, prefix_projection=True, encoder_hidden_size=12
    ),
    "p_tuning": lambda: PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=N, encoder_hidden_size=12),
}
ALL = pytest.mark.parametrize("name", sorted(CONFIGS))


def prompted(name: str, seed: int = 1) -> Any:
    """The small model with a prompt whose trained tensors are far from where they start."""
    model = wrap(language_model(), CONFIGS[name]())
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in encoder_of(model).parameters():
            parameter.add_(0.5 * torch.randn_like(parameter))
    return model.eval()


def trained_weights(model: Any) -> int:
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(input_ids=IDS, attention_mask=torch.ones_like(IDS)).logits
    return found


def test_sizes() -> None:
    """prompt n d; prefix without projection n 2 L kv, with it n kv + kv h + h + h 2 L kv + 2 L kv; p-tuning's MLP."""
    assert trained_weights(prompted("prompt_tuning")) == 5 * 16
    direct = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=N, prefix_projection=False)
    assert trained_weights(wrap(language_model(), direct)) == 5 * 2 * 2 * 8
    assert trained_weights(prompted("prefix_tuning")) == 5 * 8 + (8 * 12 + 12) + (12 * 32 + 32)
    assert trained_weights(prompted("p_tuning")) == 5 * 16 + (16 * 12 + 12) + (12 * 12 + 12) + (12 * 16 + 16)


@ALL
def test_only_the_prompt_is_trained(name: str) -> None:
    model = prompted(name)
    assert all(key.startswith("prompt_encoder.") for key, p in model.named_parameters() if p.requires_grad)
    model(input_ids=IDS, attention_mask=torch.ones_like(IDS), labels=IDS).loss.backward()
    assert all(parameter.grad is not None for parameter in encoder_of(model).parameters())


@pytest.mark.parametrize("name", ["prompt_tuning", "p_tuning"])
def test_the_model_reads_the_prompt_and_then_the_input(name: str) -> None:
    """Logits and loss are those of the base model on (prompt, embeddings), the prompt's positions left out."""
    model, base = prompted(name), language_model().eval()
    prompt = file_tensors(model, model.state_dict())["prompt_embeddings"]
    embedded = base.get_input_embeddings()(IDS)
    whole = base(inputs_embeds=torch.cat([prompt.expand(2, -1, -1), embedded], dim=1)).logits
    outputs = model(input_ids=IDS, attention_mask=torch.ones_like(IDS), labels=IDS)
    assert outputs.logits.shape == (2, 4, 64)
    assert torch.allclose(outputs.logits, whole[:, N:], atol=1e-5)
    # The prompt's labels are -100, so its last position, which is left out above, still predicts the first word.
    losses = torch.nn.functional.cross_entropy(whole[:, N - 1 : -1].reshape(-1, 64), IDS.reshape(-1))
    assert outputs.loss.item() == pytest.approx(losses.item(), abs=1e-5)


def test_a_prefix_is_keys_and_values_of_every_layer() -> None:
    from transformers import DynamicCache

    model, base = prompted("prefix_tuning"), language_model().eval()
    prompt = file_tensors(model, model.state_dict())["prompt_embeddings"]  # [n, layer x (key, value) x head x width]
    cache = DynamicCache()
    parts = prompt.reshape(N, 4, 1, 8).permute(1, 2, 0, 3)
    for layer in range(2):
        cache.update(*(parts[2 * layer + i].expand(2, -1, -1, -1) for i in range(2)), layer)
    mask = torch.ones(2, N + 4, dtype=torch.long)
    with torch.no_grad():
        wanted = base(input_ids=IDS, attention_mask=mask, past_key_values=cache).logits
    assert torch.allclose(logits(model), wanted, atol=1e-5)


@ALL
def test_file_and_back(tmp_path: Path, name: str) -> None:
    model, tuner = prompted(name), get_tuner(name)
    tuner.save(model, tmp_path, None)
    served, trained = tuner.load(language_model(), tmp_path, False), tuner.load(language_model(), tmp_path, True)
    assert torch.allclose(logits(served.eval())[:, -4:], logits(model), atol=1e-6)
    assert torch.equal(logits(trained.eval()), logits(model))
    assert trained_weights(trained) == trained_weights(model)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert list(tensors["prompt_embeddings"].shape) == [N, 32 if name == "prefix_tuning" else 16]
    assert json.loads((tmp_path / "adapter_config.json").read_text())["inference_mode"] is True
    assert model.peft_config["default"].inference_mode is False


@ALL
def test_a_resumed_run_reads_its_checkpoint_into_the_live_prompt(tmp_path: Path, name: str) -> None:
    tuner = get_tuner(name)
    for seed in (2, 3):
        tuner.save(prompted(name, seed), tmp_path / str(seed), None)
    model = prompted(name, 1)
    assert model.load_adapter(str(tmp_path / "2"), "default", is_trainable=True) is None
    assert torch.equal(logits(model), logits(prompted(name, 2)))
    assert trained_weights(model) == trained_weights(prompted(name))
    model.load_adapter(str(tmp_path / "3"), "beside")
    assert torch.equal(logits(model), logits(prompted(name, 2)))
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(language_model().eval()))


def changed(folder: Path, **values: Any) -> Path:
    """The same file with other settings."""
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))
    return folder


def test_a_prompt_that_started_at_a_text_is_trained_on_without_its_tokenizer(tmp_path: Path) -> None:
    tuner, model = get_tuner("prompt_tuning"), prompted("prompt_tuning")
    tuner.save(model, tmp_path, None)
    text = {"prompt_tuning_init": "TEXT", "prompt_tuning_init_text": "news", "tokenizer_name_or_path": "missing"}
    again = tuner.load(language_model(), changed(tmp_path, **text), True)
    assert torch.equal(logits(again.eval()), logits(model))
    assert again.peft_config["default"].prompt_tuning_init == "TEXT"


@ALL
def test_an_encoder_of_another_shape_is_not_trained(tmp_path: Path, name: str) -> None:
    get_tuner(name).save(prompted(name), tmp_path, None)
    with pytest.raises(
        UserError, match=r"its encoder does not fit \(embedding.weight.*\), so it can be served but not"
    ):
        get_tuner(name).load(language_model(), changed(tmp_path, num_virtual_tokens=N + 1), True)


def test_what_is_kept_has_the_precision_of_the_encoder(tmp_path: Path) -> None:
    model = prompted("p_tuning")
    encoder_of(model).bfloat16()
    get_tuner("p_tuning").save(model, tmp_path, None)
    assert {tensor.dtype for tensor in load_file(tmp_path / "adapter_model.safetensors").values()} == {torch.bfloat16}


def test_an_encoder_in_parts_is_not_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of live tensors that an engine holds in parts only the names count, and that they are the parameters."""
    monkeypatch.setattr(_prompt_model, "is_partitioned", lambda tensor: True)
    model = prompted("p_tuning")
    found = get_tuner("p_tuning").live_tensors(model)
    assert {name for name in found if name.startswith("encoder.")} | {"prompt_embeddings"} == found.keys()
    for name, parameter in encoder_of(model).named_parameters():
        assert found[f"encoder.{name}"] is parameter


def test_what_is_kept_is_what_the_encoder_computes(tmp_path: Path) -> None:
    model = prompted("p_tuning")
    get_tuner("p_tuning").save(model, tmp_path, None)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    with torch.no_grad():
        computed = encoder_of(model)(torch.arange(N))
    assert torch.equal(tensors["prompt_embeddings"], computed)
    live = dict(encoder_of(model).named_parameters())
    stored = {key: tensor for key, tensor in tensors.items() if key.startswith("encoder.")}
    assert stored.keys() == {f"encoder.{key}" for key in live}
    assert all(torch.equal(stored[f"encoder.{key}"], tensor) for key, tensor in live.items())


def test_what_is_kept_is_computed_without_dropout(tmp_path: Path) -> None:
    config = PromptEncoderConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=N, encoder_hidden_size=6, encoder_reparameterization_type="LSTM",
        encoder_num_layers=2, encoder_dropout=0.5,
    )  # fmt: skip
    model = wrap(language_model(), config)
    get_tuner("p_tuning").save(model.train(), tmp_path, None)
    with torch.no_grad():
        computed = encoder_of(model.eval())(torch.arange(N))
    assert torch.equal(load_file(tmp_path / "adapter_model.safetensors")["prompt_embeddings"], computed)


@ALL
def test_saving_draws_no_random_numbers(tmp_path: Path, name: str) -> None:
    """A run that was saved in between must draw the same dropout afterwards as one that was not."""
    model = prompted(name)
    torch.manual_seed(3)
    wanted = torch.rand(4)
    torch.manual_seed(3)
    get_tuner(name).save(model, tmp_path, None)
    assert torch.equal(torch.rand(4), wanted)


@ALL
def test_saving_uses_the_gathered_tensors(tmp_path: Path, name: str) -> None:
    """Under ZeRO-3 the live tensors are empty; what the Trainer gathered must be what is written."""
    model = prompted(name)
    state = {key: tensor + 1 for key, tensor in model.state_dict().items()}
    get_tuner(name).save(model, tmp_path, state)
    found = load_file(tmp_path / "adapter_model.safetensors")
    first = "prompt_embeddings" if name == "prompt_tuning" else "encoder.embedding.weight"
    assert torch.equal(found[first], state["prompt_encoder.default.embedding.weight"])
    with pytest.raises(RunFailure, match=r"the tensors to save hold no prompt_encoder\.default\."):
        get_tuner(name).save(model, tmp_path, {})


@pytest.mark.parametrize("name", ["prefix_tuning", "p_tuning"])
def test_a_file_without_its_encoder_is_served_but_not_trained(tmp_path: Path, name: str) -> None:
    """As PEFT itself writes it."""
    tuner = get_tuner(name)
    tuner.save(prompted(name), tmp_path, None)
    file = tmp_path / "adapter_model.safetensors"
    save_file({"prompt_embeddings": load_file(file)["prompt_embeddings"]}, file)
    assert torch.allclose(logits(tuner.load(language_model(), tmp_path, False).eval())[:, -4:], logits(prompted(name)))
    with pytest.raises(UserError, match=r"does not fit \(it has none\), so it can be served but not trained further"):
        tuner.load(language_model(), tmp_path, True)


@ALL
def test_two_adapters_and_the_base_in_turn(tmp_path: Path, name: str) -> None:
    tuner = get_tuner(name)
    for seed in (1, 2):
        tuner.save(prompted(name, seed), tmp_path / str(seed), None)
    model = PeftModel.from_pretrained(language_model(), str(tmp_path / "1"), adapter_name="one")
    model.load_adapter(str(tmp_path / "2"), "two")
    model.eval()

    def said(adapter: str | None) -> Tensor:
        if adapter is None:
            with model.disable_adapter():
                return logits(model)[:, -4:]
        model.set_adapter(adapter, inference_mode=True)
        return logits(model)[:, -4:]

    found: Mapping[Any, Tensor] = {key: said(key) for key in ("one", "two", None)}
    assert torch.equal(found[None], logits(language_model().eval()))
    assert not torch.allclose(found["one"], found["two"], atol=1e-2)
    assert not torch.allclose(found["one"], found[None], atol=1e-2)
    assert torch.equal(said("one"), found["one"])


@ALL
def test_the_base_model_comes_back(name: str) -> None:
    base, model = language_model().eval(), prompted(name)
    assert model.model is model.base_model
    assert torch.equal(logits(get_tuner(name).base_of(model).eval()), logits(base))


def refused(*flags: str) -> str:
    with pytest.raises(UserError) as caught:
        check_method_flags(["--model", "m", "--cl_method", "seq", "--cl_task", "t", *flags])
    assert "\n" not in str(caught.value)
    return str(caught.value)


class TestFlags:
    @ALL
    @pytest.mark.parametrize("value", ["0", "513"])
    def test_number_of_tokens(self, name: str, value: str) -> None:
        assert refused("--tuner_type", name, f"--{name}_num_virtual_tokens", value) == (
            f"--{name}_num_virtual_tokens is {value}, allowed: a whole number from 1 to 512"
        )

    @pytest.mark.parametrize(
        ("name", "flags", "said"),
        [
            (
                "prompt_tuning",
                ["--prompt_tuning_init", "text"],
                "--prompt_tuning_init_text is '', allowed: a text with",
            ),
            ("prompt_tuning", ["--prompt_tuning_init_text", "news"], "--prompt_tuning_init_text is 'news', allowed: a"),
            (
                "prompt_tuning",
                ["--prompt_tuning_init", "zero"],
                "--prompt_tuning_init is 'zero', allowed: sample_vocab",
            ),
            ("prompt_tuning", ["--use_logits_to_keep", "true"], "which needs false"),
            (
                "prompt_tuning",
                ["--prompt_tuning_init", "text", "--prompt_tuning_init_text", " "],
                "--prompt_tuning_init_text is ' ', allowed: a text with",
            ),
            ("prompt_tuning", ["--tuner_backend", "unsloth"], "--tuner_backend unsloth does not work with --tuner_"),
            ("prefix_tuning", ["--modules_to_save", "lm_head"], "--modules_to_save lm_head does not work with --"),
            ("p_tuning", ["--p_tuning_encoder", "lstm", "--p_tuning_num_layers", "0"], "num_layers is 0, allowed: a"),
            (
                "prefix_tuning",
                ["--prefix_tuning_hidden_size", "0"],
                "--prefix_tuning_hidden_size is 0, allowed: a whole",
            ),
            ("prefix_tuning", ["--gradient_checkpointing", "true"], "--gradient_checkpointing true does not work with"),
            (
                "p_tuning",
                ["--p_tuning_dropout", "0.1"],
                "--p_tuning_dropout is 0.1, allowed: a number from 0 to below 1",
            ),
            ("p_tuning", ["--p_tuning_num_layers", "3"], "--p_tuning_num_layers is 3, allowed: a whole number >= 1"),
            ("p_tuning", ["--p_tuning_encoder", "gru"], "--p_tuning_encoder is 'gru', allowed: mlp, lstm"),
            ("p_tuning", ["--task_type", "seq_cls"], "--task_type seq_cls does not work with --tuner_type p_tuning"),
            (
                "p_tuning",
                ["--prompt_tuning_init", "text"],
                "is a flag of tuner 'prompt_tuning', but --tuner_type is 'p_",
            ),
        ],
    )
    def test_refused(self, name: str, flags: list[str], said: str) -> None:
        assert said in refused("--tuner_type", name, *flags)

    def test_an_lstm_has_layers_and_dropout(self) -> None:
        flags = ["--p_tuning_encoder", "lstm", "--p_tuning_num_layers", "3", "--p_tuning_dropout", "0.1"]
        check_method_flags(["--model", "m", "--cl_method", "seq", "--cl_task", "t", "--tuner_type", "p_tuning", *flags])

    def test_a_learning_rate_of_its_own_where_none_is_given(self) -> None:
        flags = ["--model", "m", "--tuner_type", "prompt_tuning"]
        assert flag_values(complete_flags(flags))["learning_rate"] == ["0.03"]
        assert flag_values(complete_flags([*flags, "--learning_rate", "1e-4"]))["learning_rate"] == ["1e-4"]

    def test_an_lstm_encoder_trains_and_comes_back(self, tmp_path: Path) -> None:
        config = PromptEncoderConfig(
            task_type="CAUSAL_LM", num_virtual_tokens=N, encoder_hidden_size=6,
            encoder_reparameterization_type="LSTM", encoder_num_layers=1, encoder_dropout=0.0,
        )  # fmt: skip
        model, tuner = wrap(language_model(), config).eval(), get_tuner("p_tuning")
        tuner.save(model, tmp_path, None)
        assert torch.equal(logits(tuner.load(language_model(), tmp_path, True).eval()), logits(model))
