"""A loss scale of ours for ms-swift: `--loss_scale all+prompt_weight_0.5` lets a prompt token weigh half an answer's.

ms-swift looks a scale up by name and passes no settings, so each weight is a name of its own.
"""

from typing import Any

from swift.loss_scale import LossScale, loss_scale_map
from swift.template import ContextType

from swift_cl.errors import UserError

PREFIX = "prompt_weight_"


class PromptWeight(LossScale):
    """Answers and their ends count 1, all other tokens `weight`."""

    is_binary = False
    weight = 1.0
    _knows_the_type = False

    def _inner_call(self, context: Any, context_type: Any, *args: Any, **kwargs: Any) -> Any:
        self._knows_the_type = True
        contexts, scales = super()._inner_call(context, context_type, *args, **kwargs)
        self._knows_the_type = False
        if context_type not in (ContextType.RESPONSE, ContextType.SUFFIX):
            scales = [scale * self.weight for scale in scales]
        return contexts, scales

    def get_loss_scale(self, context: Any, **kwargs: Any) -> Any:
        if not self._knows_the_type:
            # For templates of thinking models ms-swift joins scales, and asks each without the kind of text.
            raise UserError("a weight for prompt tokens does not work with the template of a hybrid thinking model")
        return super().get_loss_scale(context, **kwargs)


def register_loss_scale(value: str) -> None:
    """Make the scales of ours that a value of `--loss_scale` names known to ms-swift."""
    for name in value.split("+"):
        if name.startswith(PREFIX) and name not in loss_scale_map:
            weight = float(name.removeprefix(PREFIX))
            loss_scale_map[name] = type("PromptWeight", (PromptWeight,), {"weight": weight})
