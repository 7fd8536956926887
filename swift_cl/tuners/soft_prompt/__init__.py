"""soft_prompt: embeddings in front of the input, trained themselves or through a residual MLP."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from swift_cl.settings import Settings, setting
from swift_cl.tuners.base import Tuner, TunerSettings, TunerSupport, refuse

if TYPE_CHECKING:
    from torch import Tensor

PEFT_TYPE = "SOFT_PROMPT"
LONGEST = 1024


@dataclass
class PromptStart(Settings):
    """Where a prompt starts."""

    init: str = setting(
        "vocab", "Where it starts: at embeddings of random words of the vocabulary, or of a text.", ("vocab", "text")
    )
    init_text: str = setting("", "The text of init 'text', repeated or cut to the length.")

    def check_start(self, prefix: str) -> None:
        """Refuse a start that is not fully said."""
        if bool(self.init_text.strip()) != (self.init == "text"):
            self.fail(prefix, "init_text", f"a text with --{prefix}_init text, and nothing without it")


@dataclass
class PromptShape(Settings):
    """What a prompt is made of."""

    length: int = setting(10, "Number of embeddings in front of the input, >= 1.")
    mlp: str = setting(
        "mlp1",
        "What the model reads: the embeddings P themselves ('none') or P + f(P), f an MLP with one hidden layer "
        "('mlp1') or two ('mlp2').",
        ("none", "mlp1", "mlp2"),
    )
    bottleneck: int = setting(800, "Width of that MLP, >= 2.")
    layer_norm: bool = setting(True, "Whether the MLP ends in a LayerNorm.")

    def check_shape(self, prefix: str, longest: int) -> None:
        """Refuse sizes out of range."""
        if not 1 <= self.length <= longest:
            self.fail(prefix, "length", f"a whole number from 1 to {longest}")
        if self.bottleneck < 2:
            self.fail(prefix, "bottleneck", "a whole number >= 2")
        for name in ("bottleneck", "layer_norm"):
            if self.mlp == "none" and getattr(self, name) != getattr(PromptShape, name):
                self.fail(prefix, name, f"nothing but the default with --{prefix}_mlp none")


@dataclass
class SoftPromptSettings(PromptStart, PromptShape, TunerSettings):
    """Flags of `soft_prompt`."""

    def validate(self) -> None:
        self.check_shape("soft_prompt", LONGEST)
        self.check_start("soft_prompt")


class SoftPrompt(Tuner):
    """The model reads (padding, P', prompts of earlier tasks, input); the P and MLP of P' = P + f(P) are trained.

    Unlike PEFT's prompts they stand behind the padding of a batch and not before it, so that no answer depends on the
    batch that it is in.
    """

    name: ClassVar[str] = "soft_prompt"
    title: ClassVar[str] = "Soft prompts, with a residual MLP"
    paper: ClassVar[str] = "https://arxiv.org/abs/2305.03937"
    prefix: ClassVar[str] = "soft_prompt"
    config_class: ClassVar[type[TunerSettings]] = SoftPromptSettings
    peft_type: ClassVar[str] = PEFT_TYPE
    own_type: ClassVar[bool] = True
    has_buffers: ClassVar[bool] = True
    support: ClassVar[TunerSupport] = TunerSupport(packing=False, sequence_parallel=False, multimodal=False)
    fixed: ClassVar[Mapping[str, str]] = {
        f"soft_prompt_{name}": name for name in ("length", "mlp", "bottleneck", "layer_norm")
    }
    defaults: ClassVar[Mapping[str, str]] = {"learning_rate": "0.3", "weight_decay": "1e-5"}

    @classmethod
    def check_flags(cls, config: Any, given: Mapping[str, list[str]]) -> None:
        refuse(given, cls, {"task_type": ("causal_lm",), "tuner_backend": ("peft",), "modules_to_save": ()})

    @classmethod
    def register(cls) -> None:
        from swift_cl.tuners.peft_types import register_type
        from swift_cl.tuners.soft_prompt.model import PREFIX, SoftPromptConfig, SoftPromptModel

        register_type(PEFT_TYPE, SoftPromptConfig, SoftPromptModel, PREFIX)

    @classmethod
    def prepare_model(cls, args: Any, config: Any, model: Any) -> Any:
        from peft import get_peft_model

        from swift_cl.tuners.soft_prompt.model import new_config
        from swift_cl.tuners.soft_prompt.start import start_at

        wrapped = get_peft_model(model, new_config(model, config))
        start_at(wrapped, config.init, config.init_text, args.seed)
        return wrapped

    @classmethod
    def load(cls, model: Any, folder: Path, trainable: bool) -> Any:
        from swift_cl.tuners.soft_prompt.model import remember_earlier

        loaded = super().load(model, folder, trainable)
        remember_earlier(loaded)
        return loaded

    @classmethod
    def save(cls, model: Any, folder: Path, state: "Mapping[str, Tensor] | None") -> None:
        from swift_cl.tuners.soft_prompt.model import with_exact_earlier

        super().save(model, folder, with_exact_earlier(model, state))
