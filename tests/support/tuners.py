"""The tuners under test, and settings with which each learns something in a few steps."""

from typing import Any

from swift_cl.tuners.registry import tuners

NAMES = sorted(tuners())
TUNER_FLAGS: dict[str, dict[str, Any]] = {
    "moelora": {"moe_lora_num_experts": 2},
}


def flags_for(tuner: str) -> dict[str, Any]:
    """`--tuner_type` and what goes with it."""
    return {"tuner_type": tuner, **TUNER_FLAGS.get(tuner, {})}
