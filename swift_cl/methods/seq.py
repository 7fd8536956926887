"""seq: plain sequential fine-tuning, the lower bound that every table needs."""

from dataclasses import dataclass
from typing import ClassVar

from swift_cl.methods.base import Method, MethodConfig, Support


@dataclass
class SeqConfig(MethodConfig):
    """`seq` has no settings of its own."""


class Seq(Method):
    """theta_t = argmin over theta of CE(D_t), started from theta_{t-1}. Nothing else: bit-identical to `swift sft`."""

    name: ClassVar[str] = "seq"
    title: ClassVar[str] = "Sequential fine-tuning"
    summary: ClassVar[str] = "plain sequential tuning, the lower bound of every table"
    cost: ClassVar[str] = "none"
    config_class: ClassVar[type[MethodConfig]] = SeqConfig
    support: ClassVar[Support] = Support(any_tuner=True, streaming=True, encoder_decoder=True)
