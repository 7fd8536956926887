"""Extra adapters beside the trained one: loading and switching change nothing else."""

from pathlib import Path

import pytest
import torch
from torch import nn

from swift_cl.errors import UserError
from swift_cl.methods._adapters import AdapterSwitch, load_frozen_adapter
from tests.support.tiny_lora import continued, stage_adapter

NAME = "history"


def test_a_frozen_adapter_changes_nothing_else(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    stage_adapter(tmp_path, lora_dropout=0.5)
    model = continued(tmp_path)
    before = {name: (p.requires_grad, p.detach().clone()) for name, p in model.named_parameters()}
    torch.manual_seed(7)
    expected_draw = torch.rand(3)
    torch.manual_seed(7)
    load_frozen_adapter(model, tmp_path / "t0" / "adapter", NAME)
    assert torch.equal(torch.rand(3), expected_draw)  # no random number was used up

    after = dict(model.named_parameters())
    for name, (trained, value) in before.items():
        assert after[name].requires_grad == trained, name
        assert torch.equal(after[name], value), name
    stored = load_file(tmp_path / "t0" / "adapter" / "adapter_model.safetensors")
    added = {name: p for name, p in after.items() if name not in before}
    assert len(added) == len(stored)
    for name, parameter in added.items():
        assert not parameter.requires_grad
        assert torch.equal(parameter, stored[name.replace(f".{NAME}", "")])
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    assert layer.active_adapters == ["default"]
    assert isinstance(layer.lora_dropout[NAME], nn.Identity)


def test_the_switch_restores_after_an_error(tmp_path: Path) -> None:
    stage_adapter(tmp_path)
    model = continued(tmp_path)
    load_frozen_adapter(model, tmp_path / "t0" / "adapter", NAME)
    trained = [p.requires_grad for p in model.parameters()]
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    switch = AdapterSwitch(model)

    def fail_inside() -> None:
        with switch.active(NAME):
            assert layer.active_adapters == [NAME]
            assert [p.requires_grad for p in model.parameters()] == trained
            raise KeyError

    with pytest.raises(KeyError):
        fail_inside()
    assert layer.active_adapters == ["default"]
    assert [p.requires_grad for p in model.parameters()] == trained


def test_an_adapter_with_biases_is_refused(tmp_path: Path) -> None:
    stage_adapter(tmp_path, bias="lora_only")
    with pytest.raises(UserError, match="bias 'lora_only', allowed: none"):
        load_frozen_adapter(continued(tmp_path), tmp_path / "t0" / "adapter", NAME)
