"""Hidden states of a forward that somebody else runs, taken at the decoder.

The decoder's own output is read, not the model's: under autocast accelerate would copy every one of the latter to fp32.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from swift_cl.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor


class HiddenStates:
    """Keeps the chosen hidden states of the last forward until they are taken.

    Args:
        model: has `get_decoder()`.
        layers: numbers of the states, 0 is the embedding and -1 the one after the final norm; None for all.
    """

    def __init__(self, model: Any, layers: Sequence[int] | None) -> None:
        self._layers = layers
        self._kept: list[Tensor] = []
        decoder = model.get_decoder()
        self._only_last = layers is not None and list(layers) == [-1]
        self._handles = [decoder.register_forward_hook(self._keep)]
        if not self._only_last:
            self._handles.append(decoder.register_forward_pre_hook(self._ask, with_kwargs=True))

    def _ask(self, module: Any, arguments: Any, options: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return arguments, {**options, "output_hidden_states": True}

    def _keep(self, module: Any, arguments: Any, output: Any) -> None:
        if self._only_last:
            self._kept = [output.last_hidden_state]
            return
        states = output.hidden_states
        if self._layers is None:
            self._kept = list(states)
            return
        wrong = [number for number in self._layers if not -len(states) <= number < len(states)]
        if wrong:
            raise UserError(f"there is no hidden state {wrong[0]}, allowed: {-len(states)} to {len(states) - 1}")
        self._kept = [states[number] for number in self._layers]

    def take(self) -> "list[Tensor]":
        """The states, each [rows, length, width]; they are let go here."""
        kept, self._kept = self._kept, []
        return kept

    def remove(self) -> None:
        """Leave the model as it was: the next stage of a chain may use the same one."""
        for handle in self._handles:
            handle.remove()
        self._kept = []
