"""Vectors added to the embeddings of a batch: how a latent code reaches a model. Imports torch."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor


@contextmanager
def steered(model: Any, vectors: Tensor, where: Tensor | None = None, answers: bool = True) -> Iterator[None]:
    """Within the block every input embedding of row i is that of its token plus vector i.

    Args:
        vectors: [rows, width]; the gradient flows into them.
        where: positions that get it, [rows, length]; None for all.
        answers: whether generated tokens get it too, which are read one at a time after the prompt.
    """

    def add(module: Any, arguments: Any, embedded: Tensor) -> Tensor:
        if not answers and embedded.shape[1] == 1:
            return embedded
        added = vectors.to(embedded.dtype).unsqueeze(1)
        return embedded + (added if where is None else added * where.to(embedded.dtype).unsqueeze(-1))

    handle = model.get_input_embeddings().register_forward_hook(add)
    try:
        yield
    finally:
        handle.remove()
