"""prefix_tuning: trained keys and values in front of those of every layer."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from swift_cl.settings import setting
from swift_cl.tuners._prompts import PromptTuner, check_length
from swift_cl.tuners.base import TunerSettings


@dataclass
class PrefixTuningSettings(TunerSettings):
    """Flags of `prefix_tuning`."""

    num_virtual_tokens: int = setting(20, "Number of keys and values in front of those of the input, 1 to 512.")
    projection: bool = setting(True, "Whether an MLP computes them while they are trained.")
    hidden_size: int = setting(512, "Width of that MLP, >= 1.")

    def validate(self) -> None:
        check_length("prefix_tuning", self)
        if self.hidden_size < 1:
            self.fail("prefix_tuning", "hidden_size", "a whole number >= 1")


class PrefixTuning(PromptTuner):
    """K = (P_K, K(x)), V = (P_V, V(x)) in every layer; P = MLP(e_1 ... e_n), or trained itself."""

    name: ClassVar[str] = "prefix_tuning"
    title: ClassVar[str] = "Prefix tuning"
    paper: ClassVar[str] = "https://arxiv.org/abs/2101.00190"
    prefix: ClassVar[str] = "prefix_tuning"
    config_class: ClassVar[type[TunerSettings]] = PrefixTuningSettings
    peft_type: ClassVar[str] = "PREFIX_TUNING"
    fixed: ClassVar[Mapping[str, str]] = {
        "prefix_tuning_num_virtual_tokens": "num_virtual_tokens",
        "prefix_tuning_projection": "prefix_projection",
        "prefix_tuning_hidden_size": "encoder_hidden_size",
    }
    # A prefix is a filled cache, and a checkpointed layer would be given it twice. (FSDP2's own is turned off with it.)
    required: ClassVar[Mapping[str, str]] = {"gradient_checkpointing": "false"}
    defaults: ClassVar[Mapping[str, str]] = {"learning_rate": "5e-3"}

    @classmethod
    def peft_config(cls, args: Any, config: Any, model: Any) -> Any:
        from peft import PrefixTuningConfig

        return PrefixTuningConfig(
            task_type="CAUSAL_LM",
            num_virtual_tokens=config.num_virtual_tokens,
            prefix_projection=config.projection,
            encoder_hidden_size=config.hidden_size,
        )
