"""Random numbers without a state: a draw is a function of its key, so a resumed run or another rank repeats it.

Philox is counter-based, and only its raw 64-bit words are used: numpy promises those for every version, while it may
change what `permutation` or `integers` make of them.
"""

from typing import TYPE_CHECKING

from swift_cl.io import sha256_json

if TYPE_CHECKING:
    import numpy as np
else:
    from swift_cl.lazy import LazyModule

    np = LazyModule("numpy")

Key = str | int


def _philox(key: tuple[Key, ...], counter: int = 0) -> "np.random.Philox":
    number = int(sha256_json(list(key))[:32], 16)
    # The lowest word counts within one draw; putting ours above it keeps draws of neighbouring counters apart.
    return np.random.Philox(key=number, counter=counter << 64)


def permutation(count: int, *key: Key) -> list[int]:
    """The numbers 0 to `count` - 1 in random order."""
    words = _philox(key).random_raw(count)
    return [int(i) for i in np.argsort(words, kind="stable")]


def below(bound: int, counter: int, *key: Key) -> int:
    """Draw number `counter` of a stream: uniform over 0 to `bound` - 1 (up to 2^-64 x bound)."""
    return (int(_philox(key, counter).random_raw()) * bound) >> 64


def seed32(*key: Key) -> int:
    """A seed for libraries that want a 32-bit number."""
    return int(sha256_json(list(key))[:8], 16)
