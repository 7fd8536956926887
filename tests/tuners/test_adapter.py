"""adapter: output and size by hand, the start, several adapters on one model, and what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftConfig, PeftModel, get_peft_model
from torch import nn

from swift_cl.errors import UserError
from swift_cl.training.flags import check_method_flags
from swift_cl.tuners import register_tuners
from swift_cl.tuners.adapter import Adapter, mlp_pattern
from swift_cl.tuners.adapter.model import HoulsbyConfig, HoulsbyLayer
from tests.support.tiny_lora import language_model

register_tuners()
IDS = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]])


def config(**settings: Any) -> HoulsbyConfig:
    values = {"length": 3, "hidden_size": 16, "target_modules": ["mlp"], "task_type": "CAUSAL_LM", **settings}
    return HoulsbyConfig(**values)


def adapted(seed: int) -> Any:
    model = get_peft_model(language_model(), config())
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


def test_two_adapters_and_the_base_in_turn(tmp_path: Path) -> None:
    for seed in (1, 2):
        Adapter.save(adapted(seed), tmp_path / str(seed), None)
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
    assert torch.equal(base, language_model().eval()(IDS).logits)
    assert not torch.allclose(one, two, atol=1e-2)
    assert torch.allclose(mixed[0], one[0], atol=1e-6)
    assert torch.allclose(mixed[1], two[1], atol=1e-6)


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
    [({"length": 0}, "length is 0"), ({"init": "one"}, "init is 'one'"), ({"schema_version": 2}, "expected 1")],
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
        (["--modules_to_save", "lm_head"], "--modules_to_save lm_head does not work with --tuner_type adapter"),
    ],
)
def test_refused_flags(flags: list[str], said: str) -> None:
    with pytest.raises(UserError) as caught:
        check_method_flags(["--model", "m", "--cl_method", "seq", "--cl_task", "t", "--tuner_type", "adapter", *flags])
    assert str(caught.value).startswith(said)


def test_a_model_without_known_mlps_is_refused() -> None:
    class Model:
        model_meta = None

    with pytest.raises(UserError, match="ms-swift does not know where Model has its MLPs"):
        mlp_pattern(Model())
