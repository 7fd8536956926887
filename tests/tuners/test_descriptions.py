"""What a tuner says of itself is acted upon: defaults, refusals, what no later task may change, what serving needs."""

import copy
import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import PeftType
from safetensors.torch import load_file

from swift_cl.errors import UserError
from swift_cl.io import read_json, write_json
from swift_cl.methods.registry import get_method
from swift_cl.serving.adapters import Adapter, Deployment
from swift_cl.serving.backends import ServerOptions, pt
from swift_cl.training.arguments import check_encoder_decoder, check_tuner_support
from swift_cl.training.flags import complete_flags, flag_values
from swift_cl.training.preflight import check_adapter
from swift_cl.tuners import register_tuners
from swift_cl.tuners.base import PLAIN_LORA_ONLY, Tuner, refuse
from swift_cl.tuners.bridge import swift_tuner
from swift_cl.tuners.registry import get_tuner, tuners
from tests.support.tuners import NAMES
from tests.tuners.test_flags_reach_the_adapter import OWN, made

PROMPTS = ("p_tuning", "prefix_tuning", "prompt_tuning", "soft_prompt")
DEFAULTS: dict[str, dict[str, Any]] = {
    "moelora": {"num_experts": 8, "scaling": "total", "router_init": "default"},
    "adapter": {"init": "zero"},
    "adalora": {"warmup_share": 0.1, "final_share": 0.3},
    "prompt_tuning": {"num_virtual_tokens": 20, "init": "sample_vocab", "init_text": ""},
    "prefix_tuning": {"num_virtual_tokens": 20, "projection": True, "hidden_size": 512},
    "p_tuning": {"num_virtual_tokens": 20, "encoder": "mlp", "hidden_size": 0, "num_layers": 2, "dropout": 0.0},
    "soft_prompt": {
        "length": 10, "mlp": "mlp1", "bottleneck": 800, "layer_norm": True, "init": "vocab", "init_text": "",
    },
}  # fmt: skip
# Flags of ms-swift's that are set where they are not given.
ADDED = {
    "prompt_tuning": {"use_logits_to_keep": ["false"], "learning_rate": ["0.03"]},
    "prefix_tuning": {"gradient_checkpointing": ["false"], "learning_rate": ["5e-3"]},
    "p_tuning": {"use_logits_to_keep": ["false"], "learning_rate": ["1e-3"]},
    "soft_prompt": {"learning_rate": ["0.3"], "weight_decay": ["1e-5"]},
}
# What a file holds and a later task may not set to something else.
FIXED = {
    "moelora": ("lora_rank", "lora_alpha", "moe_lora_num_experts", "moe_lora_scaling"),
    "adapter": ("adapter_length", "adapter_act"),
    "adalora": (
        "lora_alpha", "adalora_init_r", "adalora_target_r", "adalora_beta1", "adalora_beta2", "adalora_deltaT",
        "adalora_orth_reg_weight",
    ),
    "prompt_tuning": ("prompt_tuning_num_virtual_tokens",),
    "prefix_tuning": (
        "prefix_tuning_num_virtual_tokens", "prefix_tuning_projection", "prefix_tuning_hidden_size",
    ),
    "p_tuning": ("p_tuning_num_virtual_tokens", "p_tuning_encoder", "p_tuning_hidden_size", "p_tuning_num_layers"),
    "soft_prompt": ("soft_prompt_length", "soft_prompt_mlp", "soft_prompt_bottleneck", "soft_prompt_layer_norm"),
}  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_defaults(name: str) -> None:
    assert dataclasses.asdict(get_tuner(name).config_class()) == DEFAULTS[name]
    argv = ["--model", "m", "--tuner_type", name]
    completed = flag_values(complete_flags(argv))
    assert completed == {**flag_values(argv), **ADDED.get(name, {})}


@pytest.mark.parametrize("name", NAMES)
def test_a_later_task_may_not_change_what_a_file_holds(name: str, tiny_base: Path, tmp_path: Path) -> None:
    tuner = get_tuner(name)
    tuner.save(made(name, OWN[name][0][0], tiny_base), tmp_path, None)
    stored = read_json(tmp_path / "adapter_config.json")
    assert sorted(tuner.fixed) == sorted(FIXED[name])
    for flag in FIXED[name]:
        same = str(stored[tuner.fixed[flag]])
        check_adapter(tmp_path, None, {"tuner_type": [name], flag: [same]}, None)
        with pytest.raises(UserError, match=f"--{flag} is 77, but the adapter that is continued .* has {same}"):
            check_adapter(tmp_path, None, {"tuner_type": [name], flag: ["77"]}, None)


@pytest.mark.parametrize(("width", "said"), [(16, "16"), (16, "0"), (24, "24")])
def test_a_width_of_0_is_the_models_own_for_every_task(width: int, said: str, tiny_base: Path, tmp_path: Path) -> None:
    tuner = get_tuner("p_tuning")
    tuner.save(made("p_tuning", {"hidden_size": width}, tiny_base), tmp_path, None)
    assert read_json(tmp_path / "adapter_config.json")["token_dim"] == 16
    given = {"tuner_type": ["p_tuning"], "p_tuning_hidden_size": [said]}
    check_adapter(tmp_path, None, given, None)
    if width != 16:
        with pytest.raises(UserError, match=f"--p_tuning_hidden_size is 0, but .* has {width}$"):
            check_adapter(tmp_path, None, {**given, "p_tuning_hidden_size": ["0"]}, None)


@pytest.mark.parametrize(
    "change",
    [
        {"packing": True},
        {"padding_free": True},
        {"sequence_parallel_size": 2},
        {"model_meta": SimpleNamespace(is_multimodal=True)},
    ],
    ids=lambda change: next(iter(change)),
)
@pytest.mark.parametrize("name", NAMES)
def test_prompts_need_a_text_and_a_row_for_each_sample(name: str, change: dict[str, Any]) -> None:
    usual = {
        "deepspeed": None, "fsdp": None, "packing": False, "padding_free": False, "quant_bits": 4, "model": "m",
        "sequence_parallel_size": 1, "model_meta": SimpleNamespace(is_multimodal=False),
    }  # fmt: skip
    check_tuner_support(SimpleNamespace(**usual), get_tuner(name))
    args = SimpleNamespace(**{**usual, **change})
    if name not in PROMPTS:
        check_tuner_support(args, get_tuner(name))
        return
    with pytest.raises(UserError, match=f"does not work with --tuner_type {name}$"):
        check_tuner_support(args, get_tuner(name))


@pytest.mark.parametrize("name", NAMES)
def test_models_with_a_decoder_of_their_own_are_refused(name: str) -> None:
    method = get_method("seq")
    with pytest.raises(UserError, match=f"--tuner_type {name} does not work with an encoder-decoder model"):
        check_encoder_decoder(SimpleNamespace(template="t5"), method(method.config_class()), get_tuner(name))


@pytest.mark.parametrize("name", NAMES)
def test_a_server_imports_what_peft_does_not_know(name: str, tmp_path: Path) -> None:
    write_json(tmp_path / "adapter_config.json", {"peft_type": get_tuner(name).peft_type})
    deployment = Deployment("m", adapters=(Adapter("a", tmp_path, "0"),))
    env = pt.arguments(deployment, {}, ServerOptions("pt")).env
    assert ("SWIFT_CL_PLUGINS" in env) == (name in ("adapter", "moelora", "soft_prompt"))


def test_what_ms_swift_asks_for_is_handed_on(tmp_path: Path) -> None:
    """Also in a plain `swift sft`: settings that a file does not hold, gathered tensors, and what is to be trained."""
    calls: list[Any] = []

    class Told(Tuner):
        prefix = "p_tuning"
        config_class = get_tuner("p_tuning").config_class

        @classmethod
        def prepare_model(cls, args: Any, config: Any, model: Any) -> Any:
            calls.append((config.dropout, model))
            return "made"

        @classmethod
        def configure(cls, config: Any, model: Any) -> None:
            calls.append((config.dropout, model))

        @classmethod
        def load(cls, model: Any, folder: Path, trainable: bool) -> Any:
            calls.append((model, folder, trainable))

        @classmethod
        def save(cls, model: Any, folder: Path, state: Any) -> None:
            calls.append((model, folder, state))

    args = SimpleNamespace(**{name: field.default for name, field in Told.flags()})
    args.p_tuning_dropout = 0.25
    bridge = swift_tuner(Told)
    assert bridge.prepare_model(args, "base") == "made"
    bridge.save_pretrained("made", str(tmp_path), {"gathered": 1}, safe_serialization=True)
    bridge.from_pretrained("base", str(tmp_path), is_trainable=True)
    bridge.from_pretrained("base", str(tmp_path), adapter_name="default")
    assert calls == [
        (0.25, "base"),
        (0.25, "made"),
        ("made", tmp_path, {"gathered": 1}),
        ("base", tmp_path, True),
        ("base", tmp_path, False),
    ]


@pytest.mark.parametrize("name", ["adalora", "adapter", "moelora"])
def test_what_was_gathered_is_what_is_saved(name: str, tiny_base: Path, tmp_path: Path) -> None:
    """Under ZeRO-3 the live tensors are empty. An adapter beside the trained one is no part of the stage's."""
    tuner, model = get_tuner(name), made(name, OWN[name][0][0], tiny_base)
    live = tuner.live_tensors(model)
    assert all(tensor is not None and tensor.requires_grad for tensor in live.values())
    beside = copy.copy(model.peft_config["default"])
    beside.inference_mode = True
    model.add_adapter("beside", beside)
    tuner.save(model, tmp_path, {key: tensor + 1 for key, tensor in model.state_dict().items()})
    found = load_file(tmp_path / "adapter_model.safetensors")
    assert found.keys() == live.keys()
    assert all(torch.equal(found[key], tensor + 1) for key, tensor in live.items())
    assert [file.name for file in tmp_path.iterdir() if file.is_dir()] == []


def test_values_that_change_nothing_are_accepted() -> None:
    refuse({"use_dora": ["False"], "lora_bias": ["none"]}, get_tuner("moelora"), PLAIN_LORA_ONLY)
    others = {
        "use_dora": "true", "use_rslora": "true", "use_swift_lora": "true", "lora_bias": "all", "init_weights": "pissa",
        "tuner_backend": "unsloth", "modules_to_save": "lm_head", "lorap_lr_ratio": "2",
    }  # fmt: skip
    assert others.keys() == PLAIN_LORA_ONLY.keys()
    for flag, value in others.items():
        with pytest.raises(UserError, match=f"--{flag} {value} does not work with --tuner_type moelora"):
            refuse({flag: [value]}, get_tuner("moelora"), PLAIN_LORA_ONLY)
    with pytest.raises(UserError, match=r"--lora_bias all does not work with --tuner_type moelora, allowed: none$"):
        refuse({"lora_bias": ["all"]}, get_tuner("moelora"), PLAIN_LORA_ONLY)


def test_ours_stand_in_front_of_those_of_ms_swift() -> None:
    from swift.tuner_plugin import tuners_map

    register_tuners()
    assert list(tuners()) == sorted(tuners())
    for name in NAMES:
        assert tuners_map[name].__name__ == f"{get_tuner(name).__name__}Bridge"
        assert get_tuner(name).peft_type in PeftType.__members__
