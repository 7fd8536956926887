"""How each method is set for the results table: its tuner, its learning rates, and what its defaults do not fit."""

from dataclasses import dataclass, field
from typing import Any

TRAIN: dict[str, Any] = {
    "model_type": "qwen2", "template": "qwen2_5", "torch_dtype": "float32", "use_cpu": True,
    "gradient_accumulation_steps": 1, "gradient_checkpointing": False, "save_steps": 100000, "logging_steps": 10,
    "dataset_num_proc": 1, "dataloader_num_workers": 0,
}  # fmt: skip


@dataclass(frozen=True)
class TunerSettings:
    """What a tuner is trained with; `rates` is the grid of learning rates, the same for all methods that use it."""

    rates: tuple[float, ...]
    train: dict[str, Any] = field(default_factory=dict)


LORA = {"lora_rank": 16, "lora_alpha": 32, "lora_dropout": 0.0}
TUNERS = {
    "lora": TunerSettings((2e-3, 5e-3), LORA),
    "moelora": TunerSettings((2e-3, 5e-3), LORA),
    "soft_prompt": TunerSettings((1e-2, 1e-1)),
}
TUNER_OF = {"moe_lora": "moelora", "cl_moe": "moelora", "prog_prompt": "soft_prompt", "lfpt5": "soft_prompt"}
SHARE = 0.25
"""Rehearsed rows for each row of the task, the same for every method that rehearses: 10 % of 64 rows are six."""
COUNTED = {"pseudo_replay": "num_samples"}
"""Flags that name the rehearsed rows by their number."""
GENERATION = {"max_new_tokens": 192, "gen_batch_size": 32, "min_fill": 0.0}
# Settings that the defaults do not fit, because a task has some tens of rows and steps; all others are defaults.
SETTINGS: dict[str, dict[str, Any]] = {
    "replay": {"ratio": SHARE},
    "abscl": {"replay_ratio": SHARE},
    "ssr": {**GENERATION, "ratio": SHARE, "embedder": "model"},
    "pseudo_replay": GENERATION,
    "lamol": {**GENERATION, "gamma": SHARE},
    "lamol_kd": {**GENERATION, "gamma": SHARE},
    "l2kd": {**GENERATION, "gamma": SHARE},
    "pcll": {**GENERATION, "gamma": SHARE},
    "lfpt5": {**GENERATION, "task_type": "all", "prompt_length": 32},
    "ewc": {"fisher_samples": 64},
    "gem": {"mem_batch": 4, "refresh_steps": 2},
    "i_lora": {"lambda": 0.95},
    "sdft": {"max_new_tokens": 12},
    "dynamic_conpet": {"batch_limit": 100},
    "dynamic_conpet_cls": {"batch_limit": 100},
}


def tuner_of(method: str) -> str:
    """The tuner that a method is compared with."""
    return TUNER_OF.get(method, "lora")


def flags_of(method: str, rows: int) -> dict[str, Any]:
    """A method's settings by flag name, for tasks of so many rows."""
    counted = {COUNTED[method]: round(SHARE * rows)} if method in COUNTED else {}
    return {f"{method}_{name}": value for name, value in {**SETTINGS.get(method, {}), **counted}.items()}
