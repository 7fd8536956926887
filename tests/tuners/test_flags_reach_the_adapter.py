"""No flag of a tuner is accepted and ignored: each with another value than its default makes another adapter."""

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from swift.callbacks import callbacks_map

from swift_cl.tuners import register_tuners
from swift_cl.tuners.registry import get_tuner
from tests.support.tiny_lora import language_model
from tests.support.tuners import NAMES

register_tuners()
# Of ms-swift's arguments those that the tuners read, each with a value that is no default of anything.
SWIFT: dict[str, Any] = {
    "task_type": "causal_lm", "seed": 5, "target_modules": ["q_proj"], "lora_rank": 6, "lora_alpha": 24.0,
    "lora_dropout": 0.125, "adapter_length": 7, "adapter_act": "silu", "adalora_init_r": 9, "adalora_target_r": 3,
    "adalora_deltaT": 4, "adalora_beta1": 0.5, "adalora_beta2": 0.625, "adalora_orth_reg_weight": 0.75,
}  # fmt: skip
FROM_SWIFT: dict[str, dict[str, Any]] = {
    "moelora": {"r": 6, "lora_alpha": 24.0, "lora_dropout": 0.125, "target_modules": {"q_proj"}},
    "adapter": {"length": 7, "act": "silu"},
    "adalora": {
        "init_r": 9, "target_r": 3, "deltaT": 4, "beta1": 0.5, "beta2": 0.625, "orth_reg_weight": 0.75,
        "lora_alpha": 24.0, "lora_dropout": 0.125, "target_modules": {"q_proj"},
    },
    "p_tuning": {}, "prefix_tuning": {}, "prompt_tuning": {}, "soft_prompt": {},
}  # fmt: skip
# Settings of one adapter, and what its configuration then says; every setting is in at least one of them.
OWN: dict[str, list[tuple[dict[str, Any], dict[str, Any]]]] = {
    "moelora": [
        (
            {"num_experts": 3, "scaling": "expert", "router_init": "zero"},
            {"num_experts": 3, "scaling": "expert", "router_init": "zero"},
        )
    ],
    "adapter": [({"init": "xavier"}, {"init": "xavier"})],
    "adalora": [({"warmup_share": 0.25, "final_share": 0.5}, {"cl_shares": (0.25, 0.5)})],
    "prompt_tuning": [
        ({"num_virtual_tokens": 3, "init": "random"}, {"num_virtual_tokens": 3, "prompt_tuning_init": "RANDOM"}),
        (
            {"init": "text", "init_text": "the news"},
            {"num_virtual_tokens": 20, "prompt_tuning_init": "TEXT", "prompt_tuning_init_text": "the news"},
        ),
    ],
    "prefix_tuning": [
        ({"num_virtual_tokens": 3, "projection": False}, {"num_virtual_tokens": 3, "prefix_projection": False}),
        ({"hidden_size": 9}, {"num_virtual_tokens": 20, "prefix_projection": True, "encoder_hidden_size": 9}),
    ],
    "p_tuning": [
        (
            {"num_virtual_tokens": 3, "hidden_size": 9, "encoder": "lstm", "num_layers": 3, "dropout": 0.25},
            {
                "num_virtual_tokens": 3, "encoder_hidden_size": 9, "encoder_reparameterization_type": "LSTM",
                "encoder_num_layers": 3, "encoder_dropout": 0.25,
            },
        ),
        ({}, {"encoder_hidden_size": 16, "encoder_reparameterization_type": "MLP"}),
    ],
    "soft_prompt": [
        ({"length": 3, "mlp": "mlp2", "bottleneck": 6}, {"length": 3, "mlp": "mlp2", "bottleneck": 6}),
        ({"layer_norm": False, "init": "text", "init_text": "the news"}, {"layer_norm": False, "mlp": "mlp1"}),
    ],
}  # fmt: skip


def made(name: str, settings: dict[str, Any], tiny_base: Path) -> Any:
    """The small model with a new adapter, as the first task makes it."""
    tuner, model = get_tuner(name), language_model()
    architecture = SimpleNamespace(mlp="model.layers.{}.mlp")
    model.model_meta = SimpleNamespace(is_multimodal=False, model_arch=architecture)
    model.model_dir = str(tiny_base)
    config: Any = tuner.config_class(**settings)
    if name == "prompt_tuning" and "init_text" in settings:  # its tokens are beyond the small model's vocabulary
        return SimpleNamespace(peft_config={"default": tuner.peft_config(None, config, model)})
    wrapped = tuner.prepare_model(SimpleNamespace(**SWIFT), config, model)
    tuner.configure(config, wrapped)
    return wrapped


def test_every_setting_of_every_tuner_is_tried() -> None:
    assert sorted(OWN) == sorted(FROM_SWIFT) == NAMES
    for name in NAMES:
        fields = {field.name for field in dataclasses.fields(get_tuner(name).config_class)}
        assert {key for settings, _ in OWN[name] for key in settings} == fields, name


@pytest.mark.parametrize(
    ("name", "settings", "wanted"),
    [(name, settings, {**FROM_SWIFT[name], **wanted}) for name in NAMES for settings, wanted in OWN[name]],
)
def test_what_was_set_stands_in_the_configuration(
    name: str, settings: dict[str, Any], wanted: dict[str, Any], tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from swift_cl.tuners.soft_prompt import start

    monkeypatch.setattr(start, "tokens_of", lambda model, text: [1, 2])
    found = made(name, settings, tiny_base).peft_config["default"]
    assert found.task_type == "CAUSAL_LM"
    if "init_text" in settings and name == "prompt_tuning":
        assert found.tokenizer_name_or_path == str(tiny_base)
    said = {key: getattr(found, key) for key in wanted}
    assert {key: getattr(value, "value", value) for key, value in said.items()} == wanted


def test_ms_swift_knows_the_callback_that_takes_triplets_away() -> None:
    from swift_cl.tuners.adalora.allocation import Allocation

    assert callbacks_map["adalora"] is Allocation
