"""Where a model's logits stand to the labels: one before them, or, in an encoder-decoder, at the labels themselves.

Imports torch lazily: methods import this module at their top.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from swift_cl.lazy import LazyModule

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    torch = LazyModule("torch")

IGNORED = -100


def is_encoder_decoder(module: Any) -> bool:
    """Whether the model's decoder gets the labels moved by one, so that logit t is the prediction of label t."""
    return bool(getattr(getattr(module, "config", None), "is_encoder_decoder", False))


def predicted(module: Any, labels: "Tensor") -> "Tensor":
    """For each logit the label that it predicts, -100 for none; [batch, length] as the labels."""
    if is_encoder_decoder(module):
        return labels
    # Moving the labels, not the logits, spares a copy of the logits.
    return torch.nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORED)


def predicted_tokens(module: Any, labels: Any) -> int:
    """How many labels of one encoded row are predicted; in one sequence the first has nothing before it."""
    values = labels.tolist() if hasattr(labels, "tolist") else list(labels)
    return sum(label != IGNORED for label in values[0 if is_encoder_decoder(module) else 1 :])


def unlabelled(module: Any, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Inputs for a forward that computes no loss: a decoder of its own still needs to be told the answer."""
    given = {key: value for key, value in inputs.items() if key != "labels"}
    if is_encoder_decoder(module):
        given["decoder_input_ids"] = module.prepare_decoder_input_ids_from_labels(labels=inputs["labels"])
    return given
