"""Embeddings of texts by one sentence encoder: texts longer than it reads, and a cache on disk for references."""

import sys
import unicodedata
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from swift_cl.evaluation.scorers._library import cache_dir
from swift_cl.io import atomic_write, sha256_json, sha256_tensors
from swift_cl.sentence_encoder import LONG_WORK

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

EXTRA_TOKENS = 4
"""More tokens than a text has bytes: an encoder's special tokens, and the mark that SentencePiece puts first."""


class Embedder:
    """Encodes texts, each distinct one once; `encode` of sentence-transformers sorts a call's texts by length itself.

    Args:
        encoder: the model.
        chunks: whether a text longer than the encoder reads is cut into pieces, whose embeddings are averaged weighted
            by their numbers of tokens; otherwise the encoder reads its beginning only.
    """

    def __init__(self, encoder: "SentenceTransformer", chunks: bool = False) -> None:
        self.encoder, self.chunks = encoder, chunks
        self._vectors: dict[str, Any] = {}
        self._lengths: dict[str, int] = {}

    def __getitem__(self, text: str) -> Any:
        """The unit vector of a text that was encoded, float32 of shape (dimensions,)."""
        return self._vectors[text]

    @cached_property
    def max_tokens(self) -> int | None:
        """Tokens of a text that the encoder reads, special tokens included; None for no limit."""
        length: int | None = self.encoder.max_seq_length
        return length

    @cached_property
    def identity(self) -> str | None:
        """Hash of all that the vectors depend on: weights, modules, tokeniser, length, device kind; None without
        weights."""
        if not hasattr(self.encoder, "state_dict"):
            return None
        modules = [[type(module).__name__, _config(module)] for module in self.encoder]
        device = str(self.encoder.device).partition(":")[0]
        weights = sha256_tensors(self.encoder.state_dict())
        return sha256_json([weights, modules, _words(self.encoder.tokenizer), self.max_tokens, self.chunks, device])

    def encode(self, texts: Iterable[str]) -> None:
        """Encode the texts that are not known yet, in one call."""
        new = sorted(set(texts) - self._vectors.keys())
        if new:
            self._vectors.update(zip(new, self._encode(new), strict=True))

    def encode_kept(self, texts: Iterable[str]) -> None:
        """The same, through the cache on disk, under the encoder and the set of the texts.

        The texts are encoded by themselves, never together with others: a batch's composition moves the last bits of a
        vector, and a score must not depend on whether the cache was there.
        """
        wanted = sorted(set(texts))
        if all(text in self._vectors for text in wanted):
            return
        if self.identity is None:
            self.encode(wanted)
            return
        path = cache_dir("embeddings") / self.identity[:32] / f"{sha256_json(wanted)[:32]}.safetensors"
        vectors = _read(path, len(wanted))
        if vectors is None:
            vectors = self._encode(wanted)
            _write(path, vectors)
        self._vectors.update(zip(wanted, vectors, strict=True))

    def is_long(self, text: str) -> bool:
        """Whether a text has more tokens than the encoder reads."""
        return self.max_tokens is not None and self._length(text) > self.max_tokens

    def _length(self, text: str) -> int:
        """Tokens of a text; for one that is short enough whatever its tokens are, an upper bound."""
        bound = len(text.encode(errors="replace")) + EXTRA_TOKENS
        if self.max_tokens is None or (bound <= self.max_tokens and text.isascii()):
            return bound
        bound = len(unicodedata.normalize("NFKC", text).encode(errors="replace")) + EXTRA_TOKENS
        if bound <= self.max_tokens:
            return bound
        if text not in self._lengths:
            self._lengths[text] = len(self.encoder.tokenizer(text, truncation=False, verbose=False)["input_ids"])
        return self._lengths[text]

    def _encode(self, texts: Sequence[str]) -> Any:
        if self.chunks and any(self.is_long(text) for text in texts):
            return self._encode_in_chunks(texts)
        return self._vectors_of(list(texts))

    def _vectors_of(self, texts: list[str]) -> Any:
        bar = len(texts) >= LONG_WORK
        return self.encoder.encode(texts, convert_to_numpy=True, normalize_embeddings=True, show_progress_bar=bar)

    def _encode_in_chunks(self, texts: Sequence[str]) -> Any:
        import numpy as np

        parts = [self._chunks(text) for text in texts]
        flat = [piece for pieces in parts for piece, _ in pieces]
        vectors = self._vectors_of(flat)
        found, start = [], 0
        for pieces in parts:
            own = vectors[start : start + len(pieces)]
            start += len(pieces)
            if len(pieces) == 1:
                found.append(own[0])
                continue
            mean = np.average(own, axis=0, weights=[weight for _, weight in pieces])
            found.append((mean / np.linalg.norm(mean)).astype(own.dtype))
        return np.stack(found)

    def _chunks(self, text: str) -> list[tuple[str, int]]:
        """Pieces of a text, each as long as the encoder reads, with their numbers of tokens."""
        if self.max_tokens is None or not self.is_long(text):
            return [(text, 1)]
        tokenizer: Any = self.encoder.tokenizer
        size = self.max_tokens - tokenizer.num_special_tokens_to_add()
        spans = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)["offset_mapping"]
        groups = [spans[start : start + size] for start in range(0, len(spans), size)]
        return [(text[group[0][0] : group[-1][1]], len(group)) for group in groups]


def _words(tokenizer: Any) -> Any:
    """What a tokeniser is made of. Padding and truncation are left out: they are set anew by every call."""
    import json

    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return sorted(tokenizer.get_vocab().items())
    return {key: value for key, value in json.loads(backend.to_str()).items() if key not in ("padding", "truncation")}


def _config(module: Any) -> Any:
    """What a module says about itself, as JSON."""
    import json

    return json.loads(json.dumps(module.get_config_dict(), default=str)) if hasattr(module, "get_config_dict") else None


def _read(path: Path, count: int) -> Any:
    """Stored vectors; None where there are none, or not `count` of them."""
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        vectors = load_file(path)["vectors"]
    except (OSError, SafetensorError, KeyError):
        return None
    return vectors if len(vectors) == count else None


def _write(path: Path, vectors: Any) -> None:
    """Store vectors; a folder that cannot be written costs time later, and nothing else."""
    from safetensors.numpy import save

    try:
        with atomic_write(path) as stream:
            stream.write(save({"vectors": vectors}))
    except OSError as error:
        print(f"{path.parent}: embeddings cannot be kept ({error.strerror}); set SWIFT_CL_CACHE", file=sys.stderr)
