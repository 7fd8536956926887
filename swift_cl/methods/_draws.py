"""Random numbers without a state: a draw is a function of its key, so a resumed run or another rank repeats it.

Philox is counter-based, and only its raw 64-bit words are used: numpy promises those for every version, while it may
change what `permutation` or `integers` make of them.
"""

from typing import TYPE_CHECKING

from swift_cl.io import sha256_json

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
else:
    from swift_cl.lazy import LazyModule

    np = LazyModule("numpy")

Key = str | int


_WORDS_A_COUNT = 4


def _words(first: int, count: int, key: tuple[Key, ...]) -> "NDArray[np.uint64]":
    """Words `first` to `first + count` of the stream that belongs to the key."""
    blocks, skipped = divmod(first, _WORDS_A_COUNT)
    stream = np.random.Philox(key=int(sha256_json(list(key))[:32], 16), counter=blocks)
    words: NDArray[np.uint64] = stream.random_raw(skipped + count)[skipped:]
    return words


def permutation(count: int, *key: Key) -> list[int]:
    """The numbers 0 to `count` - 1 in random order."""
    return [int(i) for i in np.argsort(_words(0, count, key), kind="stable")]


def slots_up_to(first: int, count: int, *key: Key) -> list[int]:
    """For each number i from `first` on, a draw that is uniform over 0 to i and depends on the key and i alone."""
    return [(int(word) * (i + 1)) >> 64 for i, word in enumerate(_words(first, count, key), start=first)]


def seed32(*key: Key) -> int:
    """A seed for libraries that want a 32-bit number."""
    return int(sha256_json(list(key))[:8], 16)
