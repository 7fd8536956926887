"""Adapters of other tuners as plain LoRAs: the same outputs, by PEFT alone, or a refusal."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AdaLoraConfig, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from swift_cl.cli.main import main
from swift_cl.errors import UserError
from swift_cl.io import read_json, sha256_file
from swift_cl.tuners import register_tuners
from swift_cl.tuners._plain_lora import write_plain_lora
from swift_cl.tuners.adalora import AdaLoRA
from swift_cl.tuners.moelora import MoELoRA
from swift_cl.tuners.moelora.model import MoELoRAConfig
from swift_cl.tuners.registry import tuners
from tests.support.tiny_lora import language_model

register_tuners()
COMMON: dict[str, Any] = {"target_modules": ["q_proj", "v_proj", "down_proj"], "task_type": "CAUSAL_LM"}
IDS = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]])


def stored(folder: Path, config: Any, change: Any = None) -> Path:
    """An adapter with all numbers away from zero, as a file, after `change(name, tensor)`."""
    model = get_peft_model(language_model(), config)
    torch.manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.3)
                if change is not None:
                    change(name, parameter)
    model.save_pretrained(str(folder))
    return folder


def logits(folder: Path) -> torch.Tensor:
    """What the small model says with an adapter, fp32."""
    with torch.no_grad():
        found: torch.Tensor = PeftModel.from_pretrained(language_model(), str(folder)).eval()(IDS).logits
    return found


def assert_the_same(adapter: Path, output: Path) -> None:
    config = read_json(output / "adapter_config.json")
    assert config["peft_type"] == "LORA"
    assert config["lora_alpha"] == config["r"]
    assert {name.split(".")[-2] for name in load_file(output / "adapter_model.safetensors")} == {"lora_A", "lora_B"}
    ours, theirs = logits(adapter), logits(output)
    with torch.no_grad():
        base = language_model().eval()(IDS).logits
    assert float((ours - base).abs().max()) > 0.1, "the adapter does nothing"
    assert float((ours - theirs).abs().max()) < 1e-5


def some_triplets(name: str, parameter: torch.Tensor) -> None:
    """Kept triplets: 2 of the first layer's query, none of its value, all of the others."""
    if "layers.0.self_attn.q_proj" in name and "lora_E" in name:
        parameter[1:3] = 0
    if "layers.0.self_attn.v_proj" in name and "lora_E" in name:
        parameter.zero_()


def adalora(**settings: Any) -> AdaLoraConfig:
    return AdaLoraConfig(init_r=4, target_r=2, lora_alpha=16, total_step=100, **{**COMMON, **settings})


def moelora(**settings: Any) -> MoELoRAConfig:
    return MoELoRAConfig(**{"r": 4, "num_experts": 2, "lora_alpha": 8, **COMMON, **settings})


def no_router(name: str, parameter: torch.Tensor) -> None:
    if "router" in name:
        parameter.zero_()


def test_adalora_by_hand() -> None:
    """A [[1, 2], [3, 4]], B = I, E (2, 0), scaling 4, init_r 2, x (1, 1): (11.99994, 0), the first triplet alone."""
    tensors = {
        "q.lora_A": torch.tensor([[1.0, 2.0], [3.0, 4.0]]),
        "q.lora_B": torch.eye(2),
        "q.lora_E": torch.tensor([[2.0], [0.0]]),
    }
    pair = AdaLoRA.as_lora(tensors, {"init_r": 2, "lora_alpha": 4})["q"]
    assert pair.a.shape == (1, 2)
    out = pair.scale * (pair.b @ (pair.a @ torch.ones(2)))
    assert out.tolist() == pytest.approx([11.99994, 0.0], abs=1e-5)
    assert AdaLoRA.as_lora(tensors, {"init_r": 2, "lora_alpha": 0})["q"].scale == pytest.approx(2 / 2.00001, abs=1e-9)


def test_moelora_by_hand() -> None:
    """Gates (1/2, 1/2) of a router of zeros, and beta 0 with a task's gate (3/4, 1/4): both columns of B are scaled."""
    tensors = {
        "q.moelora_A.weight": torch.eye(2),
        "q.moelora_B.weight": torch.tensor([[1.0, 2.0], [0.0, 1.0]]),
        "q.moelora_router.weight": torch.zeros(2, 2),
        "q.moelora_task.weight": torch.tensor([3.0, 1.0]).log(),
    }
    config: dict[str, Any] = {"r": 2, "num_experts": 2, "lora_alpha": 4, "scaling": "total"}
    pair = MoELoRA.as_lora(tensors, config)["q"]
    assert (pair.scale, pair.b.tolist()) == (2.0, [[0.5, 1.0], [0.0, 0.5]])
    assert MoELoRA.as_lora(tensors, {**config, "scaling": "expert"})["q"].scale == 4.0
    tensors["q.moelora_router.weight"] = torch.ones(2, 2)
    pair = MoELoRA.as_lora(tensors, {**config, "beta": 0.0})["q"]
    assert torch.allclose(pair.b, torch.tensor([[0.75, 0.5], [0.0, 0.25]]))
    tensors["q.moelora_router.weight"] = torch.zeros(2, 2)
    pair = MoELoRA.as_lora(tensors, {**config, "beta": 0.5})["q"]
    assert torch.allclose(pair.b, torch.tensor([[0.625, 0.75], [0.0, 0.375]]))


def test_adalora_is_a_lora_of_the_kept_rank(tmp_path: Path) -> None:
    adapter = stored(tmp_path / "in", adalora(), some_triplets)
    assert write_plain_lora(adapter, tmp_path / "out") == 4
    assert_the_same(adapter, tmp_path / "out")
    record = read_json(tmp_path / "out" / "plain_lora.json")
    assert record["tuner"] == "adalora"
    assert record["sha256"] == sha256_file(adapter / "adapter_model.safetensors")


def test_the_rank_is_what_is_left(tmp_path: Path) -> None:
    def one_left(name: str, parameter: torch.Tensor) -> None:
        if "lora_E" in name:
            parameter[1:] = 0

    adapter = stored(tmp_path / "in", adalora(), one_left)
    assert write_plain_lora(adapter, tmp_path / "out") == 1
    assert_the_same(adapter, tmp_path / "out")


@pytest.mark.parametrize(
    ("settings", "change"),
    [({"num_experts": 1}, None), ({}, no_router), ({"scaling": "expert"}, no_router), ({"num_experts": 4}, no_router)],
)
def test_moelora_with_a_gate_that_is_fixed(tmp_path: Path, settings: dict[str, Any], change: Any) -> None:
    adapter = stored(tmp_path / "in", moelora(**settings), change)
    assert write_plain_lora(adapter, tmp_path / "out") == 4
    assert_the_same(adapter, tmp_path / "out")


def test_cl_moe_with_beta_0_is_a_lora_a_task(tmp_path: Path) -> None:
    adapter = stored(tmp_path / "in", moelora(beta=0.0, schema_version=2))
    write_plain_lora(adapter, tmp_path / "out")
    assert_the_same(adapter, tmp_path / "out")


def test_a_router_that_chooses_is_refused(tmp_path: Path) -> None:
    adapter = stored(tmp_path / "in", moelora())
    with pytest.raises(UserError, match=r"the router of model\.layers\.0\.\S+ chooses by the input") as refused:
        write_plain_lora(adapter, tmp_path / "out")
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "out").exists()
    adapter = stored(tmp_path / "half", moelora(beta=0.5, schema_version=2))
    with pytest.raises(UserError, match="chooses by the input"):
        write_plain_lora(adapter, tmp_path / "out")


@pytest.mark.parametrize("tuner", sorted(set(tuners()) - {"adalora", "moelora"}))
def test_other_tuners_are_refused(tuner: str) -> None:
    with pytest.raises(UserError, match=f"--tuner_type {tuner} has no plain LoRA: "):
        tuners()[tuner].as_lora({}, {})


def test_what_is_no_such_adapter(tmp_path: Path) -> None:
    plain = stored(tmp_path / "plain", LoraConfig(r=2, **COMMON))
    with pytest.raises(UserError, match="is of type LORA, which PEFT knows by itself; nothing to do"):
        write_plain_lora(plain, tmp_path / "out")
    with pytest.raises(UserError, match=r"no adapter, adapter_config\.json not found"):
        write_plain_lora(tmp_path / "none", tmp_path / "out")
    adapter = stored(tmp_path / "in", adalora())
    with pytest.raises(UserError, match="is there already; name a new folder"):
        write_plain_lora(adapter, tmp_path)
    file = adapter / "adapter_model.safetensors"
    save_file({**load_file(file), "base_model.model.score.weight": torch.ones(2, 2)}, file)
    with pytest.raises(UserError, match=r"trained base_model\.model\.score\.weight, which a plain LoRA does not hold"):
        write_plain_lora(adapter, tmp_path / "out")
    torn = {name: tensor[:2] if "lora_A" in name else tensor for name, tensor in load_file(file).items()}
    save_file(torn, file)
    with pytest.raises(UserError, match=r"has 2 triplets, not init_r \(4\)"):
        write_plain_lora(adapter, tmp_path / "out")


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    adapter = stored(tmp_path / "in", adalora())
    with pytest.raises(SystemExit) as stopped:
        main(["plain-lora", str(adapter), str(tmp_path / "out")])
    assert stopped.value.code == 0
    assert capsys.readouterr().out == f"{tmp_path / 'out'}: LoRA of rank 4\n"
    with pytest.raises(SystemExit) as stopped:
        main(["plain-lora", str(adapter), str(tmp_path / "out")])
    assert stopped.value.code == 2
    assert "is there already" in capsys.readouterr().err
