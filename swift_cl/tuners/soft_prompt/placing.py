"""Where prompts stand in a batch: behind each row's padding on the left, in front of its first token."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Placed:
    """A batch with prompts in it.

    Attributes:
        begins: position of each row's first token before the prompts went in, [batch]; None where all are 0.
        length: of the prompts.
    """

    begins: Tensor | None
    length: int

    @classmethod
    def behind(cls, mask: Tensor | None, length: int) -> "Placed":
        """Prompts for a batch with this attention mask, [batch, tokens].

        Raises:
            ValueError: a mask of another form.
        """
        if mask is None:
            return cls(None, length)
        if not isinstance(mask, Tensor) or mask.dim() != 2:
            raise ValueError("soft prompts need an attention mask of the form [batch, tokens], or none")
        begins = (mask != 0).long().argmax(dim=1)
        return cls(begins if bool(begins.any()) else None, length)

    def put_in(self, prompts: Tensor, tokens: Tensor) -> Tensor:
        """[batch, tokens, ...] with prompts [length, ...] in every row, [batch, length + tokens, ...]."""
        both = torch.cat([prompts.expand(len(tokens), *prompts.shape), tokens], dim=1)
        if self.begins is None:
            return both
        place = torch.arange(both.shape[1], device=both.device)
        begins = self.begins.unsqueeze(1)
        source = torch.where(place < begins, place + self.length, place)
        source = torch.where((place >= begins) & (place < begins + self.length), place - begins, source)
        return both[torch.arange(len(both), device=both.device).unsqueeze(1), source]

    def take_out(self, states: Tensor) -> Tensor:
        """The inverse: [batch, length + tokens, ...] without the prompts."""
        if self.begins is None:
            return states[:, self.length :]
        place = torch.arange(states.shape[1] - self.length, device=states.device)
        source = torch.where(place < self.begins.unsqueeze(1), place, place + self.length)
        return states[torch.arange(len(states), device=states.device).unsqueeze(1), source]


def positions(mask: Tensor) -> Tensor:
    """Position ids of a mask [batch, tokens]: the first token of every row has 0, and so has its padding."""
    return (mask.long().cumsum(dim=1) - 1).clamp(min=0)
