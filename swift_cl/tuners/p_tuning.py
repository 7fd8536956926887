"""p_tuning: embeddings in front of the input that a small trained encoder computes."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from swift_cl.settings import setting
from swift_cl.tuners._prompts import PromptTuner, check_length
from swift_cl.tuners.base import TunerSettings

MLP_LAYERS = 2
"""What PEFT's config says for an MLP, which always has three linear layers."""


@dataclass
class PTuningSettings(TunerSettings):
    """Flags of `p_tuning`."""

    num_virtual_tokens: int = setting(20, "Number of embeddings in front of the input, 1 to 512.")
    encoder: str = setting("mlp", "What computes them: three linear layers, or an LSTM and two.", ("mlp", "lstm"))
    hidden_size: int = setting(0, "Width of the encoder, >= 0; 0 for the model's own.")
    num_layers: int = setting(2, "Layers of the LSTM, >= 1; an MLP has always three.")
    dropout: float = setting(0.0, "Dropout between the layers of the LSTM, in [0, 1).")

    def validate(self) -> None:
        check_length("p_tuning", self)
        if self.hidden_size < 0:
            self.fail("p_tuning", "hidden_size", "a whole number >= 0")
        if self.num_layers < 1 or (self.encoder == "mlp" and self.num_layers != MLP_LAYERS):
            self.fail("p_tuning", "num_layers", "a whole number >= 1, and nothing but the default with an MLP")
        if not 0 <= self.dropout < 1 or (self.encoder == "mlp" and self.dropout > 0):
            self.fail("p_tuning", "dropout", "a number from 0 to below 1, and 0 with an MLP")


class PTuning(PromptTuner):
    """The model reads (f(e)_1 ... f(e)_n, embeddings of the input); e and the encoder f are trained."""

    name: ClassVar[str] = "p_tuning"
    title: ClassVar[str] = "P-tuning"
    paper: ClassVar[str] = "https://arxiv.org/abs/2103.10385"
    prefix: ClassVar[str] = "p_tuning"
    config_class: ClassVar[type[TunerSettings]] = PTuningSettings
    peft_type: ClassVar[str] = "P_TUNING"
    fixed: ClassVar[Mapping[str, str]] = {
        "p_tuning_num_virtual_tokens": "num_virtual_tokens",
        "p_tuning_encoder": "encoder_reparameterization_type",
        "p_tuning_hidden_size": "encoder_hidden_size",
        "p_tuning_num_layers": "encoder_num_layers",
    }
    zero_means: ClassVar[Mapping[str, str]] = {"p_tuning_hidden_size": "token_dim"}
    required: ClassVar[Mapping[str, str]] = {"use_logits_to_keep": "false"}
    defaults: ClassVar[Mapping[str, str]] = {"learning_rate": "1e-3"}

    @classmethod
    def peft_config(cls, args: Any, config: Any, model: Any) -> Any:
        from peft import PromptEncoderConfig

        return PromptEncoderConfig(
            task_type="CAUSAL_LM",
            num_virtual_tokens=config.num_virtual_tokens,
            encoder_reparameterization_type=config.encoder.upper(),
            encoder_hidden_size=config.hidden_size or model.config.hidden_size,
            encoder_num_layers=config.num_layers,
            encoder_dropout=config.dropout,
        )
