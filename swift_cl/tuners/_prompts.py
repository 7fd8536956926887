"""What prompt_tuning, p_tuning and prefix_tuning share: trained vectors in front of the input, an unchanged model.

PEFT's own way cannot be chained: it refuses to train a loaded prompt, keeps only what an encoder computed (so that the
encoder cannot be trained further), and saves by a forward of the live encoder, which hangs under ZeRO-3.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from swift_cl.tuners.base import Tuner, TunerSettings, TunerSupport, refuse

if TYPE_CHECKING:
    from torch import Tensor

LONGEST = 512


class PromptTuner(Tuner, ABC):
    """Base of the three; a subclass gives PEFT's config."""

    support: ClassVar[TunerSupport] = TunerSupport(packing=False, sequence_parallel=False, multimodal=False)

    @classmethod
    def check_flags(cls, config: Any, given: Mapping[str, list[str]]) -> None:
        refuse(given, cls, {"task_type": ("causal_lm",), "tuner_backend": ("peft",), "modules_to_save": ()})

    @classmethod
    @abstractmethod
    def peft_config(cls, args: Any, config: Any, model: Any) -> Any:
        """PEFT's config for a new adapter."""

    @classmethod
    def prepare_model(cls, args: Any, config: Any, model: Any) -> Any:
        from swift_cl.tuners._prompt_model import wrap

        return wrap(model, cls.peft_config(args, config, model))

    @classmethod
    def load(cls, model: Any, folder: Path, trainable: bool) -> Any:
        from swift_cl.tuners._prompt_model import wrap_trained

        return wrap_trained(model, folder) if trainable else super().load(model, folder, trainable)

    @classmethod
    def save(cls, model: Any, folder: Path, state: "Mapping[str, Tensor] | None") -> None:
        from swift_cl.tuners._prompt_model import save_prompt

        save_prompt(model, folder, state)

    @classmethod
    def live_tensors(cls, model: Any) -> "dict[str, Tensor]":
        from swift_cl.tuners._prompt_model import file_tensors

        return file_tensors(model, model.state_dict(keep_vars=True))

    @classmethod
    def base_of(cls, model: Any) -> Any:
        return model.base_model


def check_length(prefix: str, config: TunerSettings) -> None:
    """Refuse a number of virtual tokens out of range."""
    if not 1 <= config.num_virtual_tokens <= LONGEST:  # type: ignore[attr-defined]
        config.fail(prefix, "num_virtual_tokens", f"a whole number from 1 to {LONGEST}")
