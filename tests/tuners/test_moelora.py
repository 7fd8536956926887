"""moelora against numbers by hand, against PEFT's LoRA, and against being read as another adapter."""

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftConfig, PeftModel, PeftType, get_peft_model
from torch import nn

from swift_cl.errors import RunFailure, UserError
from swift_cl.training.flags import check_method_flags
from swift_cl.tuners import peft_types, register_tuners
from swift_cl.tuners.moelora import MoELoRA, MoELoRASettings
from swift_cl.tuners.moelora.layer import MoELoRALayer
from swift_cl.tuners.moelora.model import MoELoRAConfig
from swift_cl.tuners.peft_types import add_member, register_type
from tests.support.tiny_lora import language_model

register_tuners()
TARGETS = ["q_proj", "v_proj", "down_proj"]
IDS = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]])


def layer(r: int, experts: int, alpha: float, inputs: int = 2, outputs: int = 2, **settings: Any) -> MoELoRALayer:
    """A layer around W = 0."""
    base = nn.Linear(inputs, outputs, bias=False)
    nn.init.zeros_(base.weight)
    return MoELoRALayer(base, "default", MoELoRAConfig(r=r, num_experts=experts, lora_alpha=alpha, **settings))


def set_weights(found: MoELoRALayer, a: Any, b: Any, router: Any) -> None:
    with torch.no_grad():
        found.moelora_A["default"].weight.copy_(torch.as_tensor(a))
        found.moelora_B["default"].weight.copy_(torch.as_tensor(b))
        found.moelora_router["default"].weight.copy_(torch.as_tensor(router))


def model_with(config: Any, seed: int = 1, std: float = 0.3) -> Any:
    """The small model with an adapter whose tensors are all away from zero."""
    model = get_peft_model(language_model(), config)
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=std)
    return model.eval()


def moelora_config(**settings: Any) -> MoELoRAConfig:
    values = {"r": 4, "num_experts": 2, "target_modules": TARGETS, "task_type": "CAUSAL_LM", **settings}
    return MoELoRAConfig(**values)


@pytest.mark.parametrize(
    ("router", "gate", "delta"),
    [
        ([[math.log(3), 0.0], [0.0, 0.0]], [0.75, 0.25], [3.5, 1.0]),
        ([[0.0, 0.0], [0.0, 0.0]], [0.5, 0.5], [5.0, 2.0]),  # LoRA of the same A and B with scaling 1
    ],
)
def test_two_experts_by_hand(router: Any, gate: list[float], delta: list[float]) -> None:
    """A = I, B = [[1, 2], [0, 1]], alpha / r = 2, x = (1, 2)."""
    found = layer(2, 2, 4.0)
    set_weights(found, torch.eye(2), [[1.0, 2.0], [0.0, 1.0]], router)
    x = torch.tensor([1.0, 2.0])
    assert found.gate(x, "default").tolist() == pytest.approx(gate)
    assert found(x).tolist() == pytest.approx(delta)


def test_scaling_by_the_rank_of_one_expert_is_e_times_larger() -> None:
    assert layer(8, 2, 8.0).scaling["default"] == 1.0
    assert layer(8, 2, 8.0, scaling="expert").scaling["default"] == 2.0


def test_the_stacked_form_is_the_sum_over_experts() -> None:
    torch.manual_seed(0)
    found = layer(6, 3, 6.0, inputs=5, outputs=4)
    set_weights(found, torch.randn(6, 5), torch.randn(4, 6), torch.randn(3, 5))
    x = torch.randn(2, 7, 5)
    a, b = found.moelora_A["default"].weight, found.moelora_B["default"].weight
    gate = (x @ found.moelora_router["default"].weight.T).softmax(-1)
    experts = [x @ a[2 * i : 2 * i + 2].T @ b[:, 2 * i : 2 * i + 2].T for i in range(3)]
    wanted = sum(gate[..., i : i + 1] * expert for i, expert in enumerate(experts))
    assert torch.allclose(found(x), wanted, atol=1e-5)


@pytest.mark.parametrize(("experts", "alpha"), [(1, 8.0), (4, 2.0)])
def test_is_lora_with_one_expert_and_with_a_uniform_gate(experts: int, alpha: float) -> None:
    """E = 1 is LoRA; E = 4 with R = 0 is LoRA with a quarter of alpha. Bit for bit."""
    lora = model_with(LoraConfig(r=4, lora_alpha=alpha, target_modules=TARGETS, task_type="CAUSAL_LM"))
    mixed = model_with(moelora_config(num_experts=experts, lora_alpha=8.0))
    with torch.no_grad():
        for name, parameter in mixed.named_parameters():
            if "moelora_router" in name and experts > 1:
                parameter.zero_()
            elif "moelora_A" in name or "moelora_B" in name:
                parameter.copy_(lora.get_parameter(name.replace("moelora_", "lora_")))
        assert torch.equal(lora(IDS).logits, mixed(IDS).logits)


def test_dropout_is_on_the_input_of_a_alone() -> None:
    """The gate sees the whole input, as every token's router does."""
    torch.manual_seed(0)
    found = layer(4, 2, 4.0, inputs=5, outputs=3, lora_dropout=0.5)
    a, b, router = torch.randn(4, 5), torch.randn(3, 4), torch.randn(2, 5)
    set_weights(found, a, b, router)
    x = torch.randn(6, 5)
    torch.manual_seed(1)
    dropped = torch.dropout(x, 0.5, True)
    torch.manual_seed(1)
    shares = (x @ router.T).softmax(-1).repeat_interleave(2, dim=-1)
    assert torch.allclose(found.train()(x), (shares * (dropped @ a.T)) @ b.T, atol=1e-6)
    assert torch.allclose(found.eval()(x), (shares * (x @ a.T)) @ b.T, atol=1e-6)


def test_a_starts_at_a_hundredth() -> None:
    torch.manual_seed(0)
    weight = layer(8, 2, 8.0, inputs=500).moelora_A["default"].weight.detach()
    assert float(weight.mean()) == pytest.approx(0, abs=1e-3)
    assert float(weight.std()) == pytest.approx(0.01, rel=0.1)


def test_changes_nothing_at_first() -> None:
    base = language_model().eval()
    model = get_peft_model(language_model(), moelora_config()).eval()
    assert torch.equal(model(IDS).logits, base(IDS).logits)


@pytest.mark.parametrize("init", ["default", "zero"])
def test_start_of_the_routers(init: str) -> None:
    model = get_peft_model(language_model(), moelora_config(router_init=init))
    routers = [parameter for name, parameter in model.named_parameters() if "moelora_router" in name]
    assert all(bool(router.any()) == (init == "default") for router in routers)


def test_number_of_trained_weights() -> None:
    """Per target r (in + out) + E in: 2 layers of q (16 -> 16) and v (16 -> 8), r 4, E 2."""
    model = get_peft_model(language_model(), moelora_config(target_modules=["q_proj", "v_proj"]))
    found = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert found == 2 * (4 * (16 + 16) + 2 * 16 + 4 * (16 + 8) + 2 * 16)
    assert all("moelora_" in name for name, p in model.named_parameters() if p.requires_grad)


def test_file_and_back(tmp_path: Path) -> None:
    model = model_with(moelora_config())
    model.save_pretrained(str(tmp_path))
    again = PeftModel.from_pretrained(language_model(), str(tmp_path)).eval()
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "MOELORA"
    assert type(again.peft_config["default"]) is MoELoRAConfig
    assert torch.equal(model(IDS).logits, again(IDS).logits)


def test_rows_of_one_batch_under_different_names(tmp_path: Path) -> None:
    """Row 0 of adapter `two`, row 1 of the base model; one name stands for all rows."""
    model_with(moelora_config(), seed=1).save_pretrained(str(tmp_path / "1"))
    model_with(moelora_config(), seed=2).save_pretrained(str(tmp_path / "2"))
    model = PeftModel.from_pretrained(language_model(), str(tmp_path / "1"), adapter_name="one")
    model.load_adapter(str(tmp_path / "2"), "two")
    model.eval()
    with torch.no_grad():
        mixed = model(IDS, adapter_names=["two", "__base__"]).logits
        for_all = model(IDS, adapter_names=["two"]).logits
        model.set_adapter("two")
        two = model(IDS).logits
        model.set_adapter("one")
        one = model(IDS).logits
        with model.disable_adapter():
            base = model(IDS).logits
    assert torch.allclose(for_all, two, atol=1e-6)
    assert torch.allclose(mixed[0], two[0], atol=1e-6)
    assert torch.allclose(mixed[1], base[1], atol=1e-6)
    with torch.no_grad():
        other_way = model(IDS, adapter_names=["__base__", "two"]).logits
    assert torch.allclose(other_way[0], base[0], atol=1e-6)
    assert torch.allclose(other_way[1], two[1], atol=1e-6)
    assert not torch.allclose(one, two, atol=1e-2)
    with pytest.raises(ValueError, match="adapters three are not loaded, there are: __base__, one, two"):
        model(IDS, adapter_names=["three"])
    with pytest.raises(ValueError, match="the model is in training mode"):
        model.train()(IDS, adapter_names=["one"])


def test_several_active_adapters_add_up() -> None:
    """Of one layer: x (1, 2), A = I, R = 0, alpha / r = 1; B of one (1, 2; 0, 1), of two (0, 1; 1, 0)."""
    found = layer(2, 2, 2.0)
    found.update_layer("two", MoELoRAConfig(r=2, num_experts=2, lora_alpha=2.0))
    found.update_layer("three", MoELoRAConfig(r=2, num_experts=2, lora_alpha=2.0))
    for name, b in (
        ("default", [[1.0, 2.0], [0.0, 1.0]]),
        ("two", [[0.0, 1.0], [1.0, 0.0]]),
        ("three", [[9.0] * 2] * 2),
    ):
        with torch.no_grad():
            found.moelora_A[name].weight.copy_(torch.eye(2))
            found.moelora_B[name].weight.copy_(torch.tensor(b))
            found.moelora_router[name].weight.zero_()
    x = torch.tensor([1.0, 2.0])
    assert found(x).tolist() == pytest.approx([2.5, 1.0])
    found.set_adapter(["default", "two"])
    assert found(x).tolist() == pytest.approx([2.5 + 1.0, 1.0 + 0.5])


def test_a_layer_that_an_adapter_leaves_out_adds_nothing(tmp_path: Path) -> None:
    model_with(moelora_config(target_modules=["q_proj"]), seed=1).save_pretrained(str(tmp_path / "1"))
    model_with(moelora_config(target_modules=["v_proj"]), seed=2).save_pretrained(str(tmp_path / "2"))
    model = PeftModel.from_pretrained(language_model(), str(tmp_path / "1"), adapter_name="one")
    model.load_adapter(str(tmp_path / "2"), "two")
    model.eval()
    for name, target, seed in (("one", "q_proj", 1), ("two", "v_proj", 2)):
        model.set_adapter(name, inference_mode=True)
        alone = model_with(moelora_config(target_modules=[target]), seed=seed)
        with torch.no_grad():
            assert torch.equal(model(IDS).logits, alone(IDS).logits)
            named = model(IDS, adapter_names=[name, "__base__"]).logits
        assert torch.allclose(named[0], alone(IDS).logits[0], atol=1e-6)


def test_names_do_not_outlive_their_call(tmp_path: Path) -> None:
    model_with(moelora_config()).save_pretrained(str(tmp_path))
    model = PeftModel.from_pretrained(language_model(), str(tmp_path), adapter_name="one").eval()
    with pytest.raises(IndexError):
        model(torch.tensor([[64]]), adapter_names=["__base__"])  # the vocabulary has 64
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_rows_of_a_beam_search_keep_their_names(tmp_path: Path) -> None:
    """Each row becomes as many as there are beams."""
    model_with(moelora_config(), seed=1, std=2.0).save_pretrained(str(tmp_path))
    model = PeftModel.from_pretrained(language_model(), str(tmp_path), adapter_name="one").eval()
    how: dict[str, Any] = {"num_beams": 2, "do_sample": False, "max_new_tokens": 4, "pad_token_id": 0}
    one = model.generate(input_ids=IDS, **how)
    with model.disable_adapter():
        base = model.generate(input_ids=IDS, **how)
    assert not torch.equal(one[1], base[1])
    mixed = model.generate(input_ids=IDS, adapter_names=["one", "__base__"], **how)
    assert torch.equal(mixed, torch.stack([one[0], base[1]]))
    mixed = model.generate(input_ids=IDS, adapter_names=["__base__", "one"], **how)
    assert torch.equal(mixed, torch.stack([base[0], one[1]]))


def test_an_additional_adapter_is_not_trained() -> None:
    """Neither in layers that have one already, nor in layers that get their first."""
    model = get_peft_model(language_model(), moelora_config(target_modules=["q_proj"]))
    model.add_adapter("two", moelora_config(target_modules=["q_proj", "v_proj"]))
    trained = {name.split(".")[-2] for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {"default"}
    assert any("v_proj" in name and ".two." in name for name, _ in model.named_parameters())


def test_it_is_never_merged() -> None:
    with pytest.raises(ValueError, match="an adapter of MoELoRALayer is never merged"):
        layer(2, 2, 2.0).unmerge()
    with pytest.raises(ValueError, match="cannot be merged: what it adds depends on the input"):
        model_with(moelora_config()).merge_and_unload()


def test_unloading_gives_the_base_model_back() -> None:
    base, model = language_model().eval(), model_with(moelora_config())
    assert torch.equal(MoELoRA.base_of(model)(IDS).logits, base(IDS).logits)


class TestAnotherLoader:
    """A MoELoRA adapter never loads as plain LoRA, nor the other way round."""

    def test_its_config_is_no_lora_config(self, tmp_path: Path) -> None:
        moelora_config().save_pretrained(str(tmp_path))
        assert not isinstance(PeftConfig.from_pretrained(str(tmp_path)), LoraConfig)

    def test_it_cannot_stand_beside_lora(self, tmp_path: Path) -> None:
        model_with(moelora_config()).save_pretrained(str(tmp_path))
        lora = model_with(LoraConfig(r=4, target_modules=TARGETS, task_type="CAUSAL_LM"))
        with pytest.raises(ValueError, match="Cannot combine adapters with different peft types"):
            lora.load_adapter(str(tmp_path), "two")

    @pytest.mark.parametrize(
        ("change", "said"),
        [
            ({"num_experts": 3}, "num_experts is 3, but it must divide r"),
            ({"num_experts": 0}, "num_experts is 0, but it must divide r"),
            ({"r": 0}, r"num_experts is 2, but it must divide r \(0\)"),
            ({"scaling": "sum"}, "scaling is 'sum', allowed: total, expert"),
            ({"router_init": "one"}, "router_init is 'one', allowed: default, zero"),
            ({"schema_version": 0}, "schema_version of a MOELORA adapter is 0, expected 1"),
            ({"schema_version": 2}, "schema_version of a MOELORA adapter is 2, expected 1"),
        ],
    )
    def test_an_edited_file_is_refused(self, tmp_path: Path, change: dict[str, Any], said: str) -> None:
        moelora_config().save_pretrained(str(tmp_path))
        file = tmp_path / "adapter_config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
        with pytest.raises(ValueError, match=said):
            PeftConfig.from_pretrained(str(tmp_path))

    def test_what_is_no_linear_layer_is_named(self) -> None:
        with pytest.raises(ValueError, match=r"embed_tokens is Embedding; moelora works on linear layers"):
            get_peft_model(language_model(), moelora_config(target_modules=["embed_tokens"]))


class TestTypes:
    def test_a_second_registration_changes_nothing(self) -> None:
        before = list(PeftType)
        register_tuners()
        assert list(PeftType) == before
        assert add_member("MOELORA") is PeftType("MOELORA")

    def test_a_type_that_peft_has_itself_is_not_taken_over(self) -> None:
        with pytest.raises(RunFailure, match=r"PEFT has an adapter type LOHA of its own \(peft.tuners.loha"):
            register_type("LOHA", MoELoRAConfig, nn.Module, "loha_")

    def test_a_member_that_works_halfway_is_refused(self) -> None:
        """As another version of Python might make it."""
        with pytest.raises(RunFailure, match="the adapter type LOHA cannot be added to PEFT's types on this version"):
            peft_types._check(PeftType, "LOHA", PeftType.LOKR)

    def test_json_and_members(self) -> None:
        assert json.dumps(PeftType["MOELORA"]) == '"MOELORA"'
        assert "MOELORA" in list(PeftType)
        assert {PeftType("MOELORA"): 1}["MOELORA"] == 1


def refused(*flags: str) -> str:
    with pytest.raises(UserError) as caught:
        check_method_flags(["--model", "m", "--cl_method", "seq", "--cl_task", "t", *flags])
    assert "\n" not in str(caught.value)
    return str(caught.value)


class TestFlags:
    def test_experts_divide_the_rank(self) -> None:
        assert refused("--tuner_type", "moelora", "--moe_lora_num_experts", "3") == (
            "--moe_lora_num_experts is 3, allowed: a whole number that divides --lora_rank (8)"
        )
        assert refused("--tuner_type", "moelora", "--lora_rank", "6") == (
            "--moe_lora_num_experts is 8, allowed: a whole number that divides --lora_rank (6)"
        )
        assert "allowed: a whole number >= 1" in refused("--tuner_type", "moelora", "--moe_lora_num_experts", "0")

    def test_flag_of_the_tuner_without_it(self) -> None:
        assert refused("--moe_lora_num_experts", "4") == (
            "--moe_lora_num_experts is a flag of tuner 'moelora', but --tuner_type is 'lora'"
        )

    def test_unknown_flag(self) -> None:
        said = refused("--tuner_type", "moelora", "--moe_lora_num_expert", "4")
        assert said.startswith("--moe_lora_num_expert is unknown, moelora has: moe_lora_num_experts, ")

    def test_choices(self) -> None:
        said = refused("--tuner_type", "moelora", "--moe_lora_scaling", "sum")
        assert said == "--moe_lora_scaling is 'sum', allowed: total, expert"

    @pytest.mark.parametrize(("experts", "warns"), [(3, True), (2, False), (1, False)])
    def test_experts_of_rank_1_are_told(self, experts: int, warns: bool, caplog: pytest.LogCaptureFixture) -> None:
        """Three experts that share a rank of 3; not two that share 4, nor the one of a rank of 1."""
        rank = {3: 3, 2: 4, 1: 1}[experts]
        args = SimpleNamespace(
            lora_rank=rank, lora_alpha=8, lora_dropout=0.0, task_type="causal_lm", target_modules=["q_proj"]
        )
        model = language_model()
        model.model_meta = SimpleNamespace(is_multimodal=False)
        MoELoRA.prepare_model(args, MoELoRASettings(num_experts=experts), model)
        assert [record.message for record in caplog.records if record.name == "swift_cl"] == [
            f"moelora: --lora_rank {rank} over {experts} experts gives experts of rank 1; the paper's have rank 16"
        ] * warns

    @pytest.mark.parametrize(
        "flags",
        [
            ("--use_dora", "true"),
            ("--lora_bias", "all"),
            ("--init_weights", "pissa"),
            ("--use_rslora", "true"),
            ("--target_parameters", "experts"),
        ],
    )
    def test_settings_of_lora_that_it_has_not(self, flags: tuple[str, str]) -> None:
        assert refused("--tuner_type", "moelora", *flags).startswith(
            f"{flags[0]} {flags[1]} does not work with --tuner_type moelora"
        )

    def test_the_method_brings_its_tuner(self) -> None:
        flags = ["--model", "m", "--cl_method", "moe_lora", "--cl_task", "t", "--moe_lora_num_experts", "4"]
        assert check_method_flags(flags) is not None
        with pytest.raises(
            UserError, match="--tuner_type lora does not work with method 'moe_lora', which needs moelora"
        ):
            check_method_flags([*flags, "--tuner_type", "lora"])
