"""adapter: output and size by hand, the start, several adapters on one model, and what is refused."""

import json
import math
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import PeftConfig, PeftModel, get_peft_model
from torch import nn

from swift_cl.errors import UserError
from swift_cl.training.flags import check_method_flags
from swift_cl.tuners import register_tuners
from swift_cl.tuners.adapter import Adapter, AdapterSettings, mlp_pattern
from swift_cl.tuners.adapter.model import HoulsbyConfig, HoulsbyLayer
from tests.support.tiny_lora import language_model

register_tuners()
IDS = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]])


def config(**settings: Any) -> HoulsbyConfig:
    values = {"length": 3, "hidden_size": 16, "target_modules": ["mlp"], "task_type": "CAUSAL_LM", **settings}
    return HoulsbyConfig(**values)


def adapted(seed: int, **settings: Any) -> Any:
    model = get_peft_model(language_model(), config(**settings))
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "houlsby_" in name:
                parameter.normal_(std=0.5)
    return model.eval()


@pytest.mark.parametrize(
    ("act", "wanted"),
    [("relu", [2.0 + 2.0, -4.0 + 5.0]), ("linear", [2.0 + 2.0 - 3.0 * 7.0, -4.0 + 4.0 - 3.0 * 7.0 + 1.0])],
)
def test_output_by_hand(act: str, wanted: list[float]) -> None:
    """y = 2 x = (2, -4); D y + d = (2, -4 + 1), through ReLU (2, 0); U of it plus u is then (2, 4 + 1)."""
    base = nn.Linear(2, 2, bias=False)
    layer = HoulsbyLayer(base, "default", config(length=2, hidden_size=2, act=act))
    with torch.no_grad():
        base.weight.copy_(2 * torch.eye(2))
        layer.houlsby_down["default"].weight.copy_(torch.eye(2))
        layer.houlsby_down["default"].bias.copy_(torch.tensor([0.0, 1.0]))
        layer.houlsby_up["default"].weight.copy_(torch.tensor([[1.0, 7.0], [2.0, 7.0]]))
        layer.houlsby_up["default"].bias.copy_(torch.tensor([0.0, 1.0]))
    assert layer(torch.tensor([[1.0, -2.0]])).tolist() == [wanted]


def test_number_of_trained_weights() -> None:
    """2 layers of 2 d m + m + d, d 16, m 3."""
    model = get_peft_model(language_model(), config())
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 2 * (2 * 16 * 3 + 3 + 16)


@pytest.mark.parametrize("init", ["zero", "xavier"])
def test_start(init: str) -> None:
    base = language_model().eval()
    model = get_peft_model(language_model(), config(init=init)).eval()
    assert torch.equal(model(IDS).logits, base(IDS).logits) == (init == "zero")


@pytest.mark.parametrize("init", ["zero", "xavier"])
def test_start_by_hand(init: str) -> None:
    """Uniform up to sqrt(6 / (500 + 100)) = 0.1; the second matrix and the biases 0."""
    torch.manual_seed(0)
    layer = HoulsbyLayer(nn.Linear(2, 2), "default", config(length=100, hidden_size=500, init=init))
    down, up = layer.houlsby_down["default"], layer.houlsby_up["default"]
    assert (down.weight.shape, up.weight.shape) == ((100, 500), (500, 100))
    for weight, bound in ((down.weight, 0.1), (up.weight, 0.1 * (init == "xavier"))):
        assert float(weight.detach().abs().max()) == pytest.approx(bound, rel=1e-2)
        assert float(weight.detach().std()) == pytest.approx(bound / math.sqrt(3), rel=1e-2)
    assert not down.bias.any()
    assert not up.bias.any()


def test_two_adapters_and_the_base_in_turn(tmp_path: Path) -> None:
    other = {"length": 5, "act": "relu"}
    for seed, settings in ((1, {}), (2, other)):
        Adapter.save(adapted(seed, **settings), tmp_path / str(seed), None)
    model = PeftModel.from_pretrained(language_model(), str(tmp_path / "1"), adapter_name="one")
    model.load_adapter(str(tmp_path / "2"), "two")
    model.eval()
    with torch.no_grad():
        one = model(IDS).logits
        model.set_adapter("two")
        two = model(IDS).logits
        with model.disable_adapter():
            base = model(IDS).logits
        mixed = model(IDS, adapter_names=["one", "two"]).logits
    assert torch.equal(one, adapted(1)(IDS).logits)
    assert torch.equal(two, adapted(2, **other)(IDS).logits)
    assert torch.equal(base, language_model().eval()(IDS).logits)
    assert not torch.allclose(one, two, atol=1e-2)
    assert torch.allclose(mixed[0], one[0], atol=1e-6)
    assert torch.allclose(mixed[1], two[1], atol=1e-6)


@pytest.mark.parametrize("names", [None, ["default"], ["default", "__base__"]])
def test_the_output_has_the_precision_of_the_model(names: list[str] | None) -> None:
    layer = HoulsbyLayer(nn.Linear(2, 2).bfloat16(), "default", config(length=3, hidden_size=2, init="xavier"))
    found = layer(torch.ones(2, 2, dtype=torch.bfloat16), adapter_names=names)
    assert found.dtype == torch.bfloat16
    assert layer.houlsby_up["default"].weight.dtype == torch.float32


def test_unloading_gives_the_base_model_back() -> None:
    assert torch.equal(Adapter.base_of(adapted(1))(IDS).logits, language_model().eval()(IDS).logits)


def test_an_mlp_that_returns_more_than_one_tensor_is_named() -> None:
    class Experts(nn.Linear):
        def forward(self, x: Any) -> Any:
            return super().forward(x), None

    layer = HoulsbyLayer(Experts(2, 2), "default", config(length=1, hidden_size=2))
    with pytest.raises(ValueError, match="Experts returns tuple, not one tensor"):
        layer(torch.ones(1, 2))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"length": 0}, "length is 0"),
        ({"hidden_size": 0}, "hidden_size 0"),
        ({"init": "one"}, "init is 'one'"),
        ({"schema_version": 2}, "expected 1"),
    ],
)
def test_an_edited_file_is_refused(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    config().save_pretrained(str(tmp_path))
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    with pytest.raises(ValueError, match=said):
        PeftConfig.from_pretrained(str(tmp_path))


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--adapter_length", "0"], "--adapter_length is '0', allowed: a whole number >= 1"),
        (["--adapter_init", "one"], "--adapter_init is 'one', allowed: zero, xavier"),
        (["--adapter_lenght", "8"], "--adapter_lenght is unknown, adapter has: adapter_init"),
        (["--adapter_length", "wide"], "--adapter_length is 'wide', allowed: a whole number >= 1"),
        (["--modules_to_save", "lm_head"], "--modules_to_save lm_head does not work with --tuner_type adapter"),
        (["--tuner_backend", "unsloth"], "--tuner_backend unsloth does not work with --tuner_type adapter"),
        (["--target_regex", "mlp"], "--target_regex mlp does not work with --tuner_type adapter"),
    ],
)
def test_refused_flags(flags: list[str], said: str) -> None:
    with pytest.raises(UserError) as caught:
        check_method_flags(["--model", "m", "--cl_method", "seq", "--cl_task", "t", "--tuner_type", "adapter", *flags])
    assert str(caught.value).startswith(said)


def test_width_and_activation_are_flags_of_ms_swift() -> None:
    for flags in ([], ["--adapter_length", "64", "--adapter_act", "relu"]):
        check_method_flags(["--model", "m", "--cl_method", "seq", "--cl_task", "t", "--tuner_type", "adapter", *flags])


def test_an_unknown_activation_is_refused() -> None:
    args = SimpleNamespace(adapter_act="gelo")
    with pytest.raises(UserError, match=r"--adapter_act is 'gelo', allowed: .*did you mean 'gelu'"):
        Adapter.prepare_model(args, AdapterSettings(), None)


def test_where_the_mlps_are() -> None:
    """All layers, a hundred of them too; nothing inside them, and no other name that a dot would fit."""
    model = SimpleNamespace(model_meta=SimpleNamespace(model_arch=SimpleNamespace(mlp="model.layers.{}.mlp")))
    pattern = mlp_pattern(model)
    assert re.fullmatch(pattern, "model.layers.0.mlp")
    assert re.fullmatch(pattern, "model.layers.113.mlp")
    for other in ("model.layers.0.mlp.up_proj", "model.layers.0_mlp", "visual.model.layers.0.mlp"):
        assert not re.fullmatch(pattern, other)


def test_a_model_without_known_mlps_is_refused() -> None:
    class Model:
        model_meta = None

    with pytest.raises(UserError, match="ms-swift does not know where Model has its MLPs"):
        mlp_pattern(Model())
