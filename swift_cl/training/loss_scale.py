"""Loss scales of ours for ms-swift, which looks a scale up by name and passes no settings: each weight is a name.

`--loss_scale all+prompt_weight_0.5` lets a prompt token weigh half an answer's; with
`--loss_scale default+separator_weight_5.0` a separator of generation rows weighs five times their other tokens.
"""

import re
from typing import Any

from swift.loss_scale import LossScale, loss_scale_map
from swift.template import ContextType

from swift_cl.errors import UserError
from swift_cl.methods._gen_rows import GEN, SEPARATORS


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


class SeparatorWeight(LossScale):
    """Separators in the text of generation rows count `weight`, all other trained tokens 1.

    A separator is a text of its own for the tokenizer, so that its tokens hold nothing of what stands beside it.
    """

    is_binary = False
    weight = 1.0

    def get_loss_scale(self, context: Any, *, query: Any = None, **kwargs: Any) -> Any:
        if not (isinstance(context, str) and isinstance(query, str) and query.startswith(GEN)):
            return super().get_loss_scale(context, **kwargs)
        parts = [part for part in re.split(f"({'|'.join(map(re.escape, SEPARATORS))})", context) if part]
        return parts, [self.weight if part in SEPARATORS else 1.0 for part in parts]


SCALES: dict[str, type[Any]] = {"prompt_weight_": PromptWeight, "separator_weight_": SeparatorWeight}


def register_loss_scale(value: str) -> None:
    """Make the scales of ours that a value of `--loss_scale` names known to ms-swift."""
    for name in value.split("+"):
        for prefix, scale in SCALES.items():
            if name.startswith(prefix) and name not in loss_scale_map:
                weight = float(name.removeprefix(prefix))
                loss_scale_map[name] = type(scale.__name__, (scale,), {"weight": weight})
