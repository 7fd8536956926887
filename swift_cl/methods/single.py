"""single: a model of its own for every task; nothing is carried over, so nothing is forgotten and nothing is shared."""

from dataclasses import dataclass
from typing import ClassVar

from swift_cl.methods.base import Method, MethodConfig, Support


@dataclass
class SingleConfig(MethodConfig):
    """`single` has no settings of its own."""


class Single(Method):
    """theta_t = argmin over theta of CE(D_t), started from the base model: what each task reaches alone."""

    name: ClassVar[str] = "single"
    title: ClassVar[str] = "One model per task"
    summary: ClassVar[str] = "a new adapter for every task, nothing carried over: the ceiling of New.ACC"
    cost: ClassVar[str] = "none"
    config_class: ClassVar[type[MethodConfig]] = SingleConfig
    support: ClassVar[Support] = Support(any_tuner=True, streaming=True, encoder_decoder=True)
    starts_fresh: ClassVar[bool] = True
