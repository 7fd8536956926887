"""The tuners under test, and settings with which each learns something in a few steps."""

from typing import Any

from swift_cl.tuners.registry import tuners

NAMES = sorted(tuners())
TUNER_FLAGS: dict[str, dict[str, Any]] = {
    "adalora": {"adalora_init_r": 4, "adalora_target_r": 2},
    "adapter": {"adapter_length": 8},
    "moelora": {"moe_lora_num_experts": 2},
    "p_tuning": {"p_tuning_num_virtual_tokens": 5, "p_tuning_hidden_size": 32},
    "prefix_tuning": {"prefix_tuning_num_virtual_tokens": 5, "prefix_tuning_hidden_size": 32},
    "prompt_tuning": {"prompt_tuning_num_virtual_tokens": 5},
    "soft_prompt": {"soft_prompt_length": 5, "soft_prompt_bottleneck": 8},
}


def flags_for(tuner: str) -> dict[str, Any]:
    """`--tuner_type` and what goes with it."""
    return {"tuner_type": tuner, **TUNER_FLAGS.get(tuner, {})}
