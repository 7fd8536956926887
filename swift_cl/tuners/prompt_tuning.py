"""prompt_tuning: trained embeddings in front of the input."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from swift_cl.settings import setting
from swift_cl.tuners._prompts import PromptTuner, check_length
from swift_cl.tuners.base import TunerSettings


@dataclass
class PromptTuningSettings(TunerSettings):
    """Flags of `prompt_tuning`."""

    num_virtual_tokens: int = setting(20, "Number of trained embeddings in front of the input, 1 to 512.")
    init: str = setting(
        "sample_vocab",
        "Where they start: at embeddings of random words of the vocabulary, at those of a text, or at N(0, 1).",
        ("sample_vocab", "text", "random"),
    )
    init_text: str = setting("", "The text of --prompt_tuning_init text, repeated or cut to the number of tokens.")

    def validate(self) -> None:
        check_length("prompt_tuning", self)
        if bool(self.init_text.strip()) != (self.init == "text"):
            self.fail("prompt_tuning", "init_text", "a text with --prompt_tuning_init text, and nothing without it")


class PromptTuning(PromptTuner):
    """The model reads (p_1 ... p_n, embeddings of the input); only p is trained."""

    name: ClassVar[str] = "prompt_tuning"
    title: ClassVar[str] = "Prompt tuning"
    paper: ClassVar[str] = "https://arxiv.org/abs/2104.08691"
    prefix: ClassVar[str] = "prompt_tuning"
    config_class: ClassVar[type[TunerSettings]] = PromptTuningSettings
    peft_type: ClassVar[str] = "PROMPT_TUNING"
    fixed: ClassVar[Mapping[str, str]] = {"prompt_tuning_num_virtual_tokens": "num_virtual_tokens"}
    required: ClassVar[Mapping[str, str]] = {"use_logits_to_keep": "false"}
    defaults: ClassVar[Mapping[str, str]] = {"learning_rate": "0.03"}

    @classmethod
    def peft_config(cls, args: Any, config: Any, model: Any) -> Any:
        from peft import PromptTuningConfig

        text = {"prompt_tuning_init_text": config.init_text, "tokenizer_name_or_path": model.model_dir}
        return PromptTuningConfig(
            task_type="CAUSAL_LM",
            num_virtual_tokens=config.num_virtual_tokens,
            prompt_tuning_init=config.init.upper(),
            **(text if config.init == "text" else {}),
        )
