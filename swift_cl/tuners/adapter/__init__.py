"""adapter: a small bottleneck network after the MLP of every layer (Houlsby's adapters)."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from swift_cl.errors import UserError, did_you_mean
from swift_cl.settings import setting
from swift_cl.tuners.base import Tuner, TunerSettings, refuse

PEFT_TYPE = "HOULSBY"


@dataclass
class AdapterSettings(TunerSettings):
    """Flags of `adapter`; width and activation are ms-swift's `--adapter_length` and `--adapter_act`."""

    init: str = setting(
        "zero",
        "Start of the second matrix: 0, so that the model is the base model at first, or random ('xavier').",
        ("zero", "xavier"),
    )


class Adapter(Tuner):
    """y + U act(D y + d) + u, y the output of a layer's MLP."""

    name: ClassVar[str] = "adapter"
    title: ClassVar[str] = "Bottleneck adapters (Houlsby)"
    paper: ClassVar[str] = "https://arxiv.org/abs/1902.00751"
    prefix: ClassVar[str] = "adapter"
    config_class: ClassVar[type[TunerSettings]] = AdapterSettings
    peft_type: ClassVar[str] = PEFT_TYPE
    own_type: ClassVar[bool] = True
    swift_flags: ClassVar[tuple[str, ...]] = ("adapter_length", "adapter_act")
    fixed: ClassVar[Mapping[str, str]] = {"adapter_length": "length", "adapter_act": "act"}

    @classmethod
    def check_flags(cls, config: Any, given: Mapping[str, list[str]]) -> None:
        refuse(given, cls, {"modules_to_save": (), "tuner_backend": ("peft",), "target_regex": ()})
        text = (given.get("adapter_length") or ["1"])[0]
        if not text.isdigit() or int(text) < 1:
            raise UserError(f"--adapter_length is {text!r}, allowed: a whole number >= 1")

    @classmethod
    def register(cls) -> None:
        from swift_cl.tuners._peft_types import register_type
        from swift_cl.tuners.adapter.model import PREFIX, HoulsbyConfig, HoulsbyModel

        register_type(PEFT_TYPE, HoulsbyConfig, HoulsbyModel, PREFIX)

    @classmethod
    def prepare_model(cls, args: Any, config: Any, model: Any) -> Any:
        from peft import get_peft_model
        from transformers.activations import ACT2FN

        from swift_cl.tuners.adapter.model import HoulsbyConfig

        if args.adapter_act not in ACT2FN:
            hint = did_you_mean(args.adapter_act, list(ACT2FN))
            raise UserError(f"--adapter_act is {args.adapter_act!r}, allowed: {', '.join(sorted(ACT2FN))}{hint}")
        return get_peft_model(
            model,
            HoulsbyConfig(
                task_type=args.task_type.upper(),
                length=args.adapter_length,
                act=args.adapter_act,
                init=config.init,
                hidden_size=model.config.get_text_config().hidden_size,
                target_modules=mlp_pattern(model),
            ),
        )


def mlp_pattern(model: Any) -> str:
    """A regular expression for the full names of the language model's MLPs, by ms-swift's table of architectures."""
    where = getattr(getattr(model.model_meta, "model_arch", None), "mlp", None)
    if not where:
        raise UserError(f"--tuner_type adapter: ms-swift does not know where {type(model).__name__} has its MLPs")
    return re.escape(str(where)).replace(re.escape("{}"), r"\d+")
