"""Psyche's shuffles, number for number: for runs that must see what a Psyche run saw.

One permutation, drawn by ChaCha8 and swaps in sequence, of all windows of all files: a list of N entries that no map
can compute piece by piece, which is why it is here for compatibility only. It is the same in every epoch, as Psyche
has no epochs. Facts: PsycheFoundation/psyche, shared/data-provider; rand 0.9 and rand_chacha 0.9.
"""

from array import array
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from sparktrain.plan.shuffle import Ints

_CONSTANTS = (0x61707865, 0x3320646E, 0x79622D32, 0x6B206574)
_QUARTERS = ((0, 4, 8, 12), (1, 5, 9, 13), (2, 6, 10, 14), (3, 7, 11, 15))
_DIAGONALS = ((0, 5, 10, 15), (1, 6, 11, 12), (2, 7, 8, 13), (3, 4, 9, 14))
_BLOCKS = 4096


def seed_bytes(number: int) -> bytes:
    """The 32 bytes that Psyche's ``--seed`` stands for."""
    return bytes(28) + number.to_bytes(4, "big")


def permutation(n: int, seed: bytes) -> Ints:
    """The order of ``n`` windows: element p is the window at place p."""
    order, words = array("q", range(n)), _words(seed)
    product, left = 0, 0
    for i in range(1, n):
        if left:
            left -= 1
        else:
            bound, left = _bound(i + 1)
            product = _below(bound, words)
        # A draw serves several indices while they fit in 32 bits; the last of them is what remains.
        product, index = divmod(product, i + 1) if left else (0, product)
        order[i], order[index] = order[index], order[i]
    return np.frombuffer(order, dtype=np.int64) if n else np.zeros(0, np.int64)


def shuffle_of_mixture(n: int, seed: bytes) -> Ints:
    """The order of a mixture's ``n`` draws: the textbook shuffle, from the last element down."""
    order, words = array("q", range(n)), _words(seed)
    for i in range(n - 1, 0, -1):
        index = _below(i + 1, words)
        order[i], order[index] = order[index], order[i]
    return np.frombuffer(order, dtype=np.int64) if n else np.zeros(0, np.int64)


def _bound(first: int) -> tuple[int, int]:
    """The largest product first*(first+1)*... below 2^32, and how many factors it has after the first."""
    product, factor = first, first + 1
    while product * factor < 2**32:
        product, factor = product * factor, factor + 1
    return product, factor - first - 1


def _below(bound: int, words: Iterator[int]) -> int:
    """A number below ``bound`` <= 2^32, by Canon's method with one correction."""
    high, low = divmod(next(words) * bound, 2**32)
    if low > 2**32 - bound:
        high += low + (next(words) * bound >> 32) >= 2**32
    return high


def _words(seed: bytes) -> Iterator[int]:
    """ChaCha with 8 rounds, 64-bit counter from 0, nonce 0: its 32-bit words."""
    counter = 0
    while True:
        yield from _keystream(seed, counter).tolist()
        counter += _BLOCKS


def _keystream(seed: bytes, counter: int) -> npt.NDArray[np.uint32]:
    counters = np.arange(counter, counter + _BLOCKS, dtype=np.uint64)
    start = np.zeros((16, _BLOCKS), dtype=np.uint32)
    start[:4] = np.array(_CONSTANTS, dtype=np.uint32)[:, None]
    start[4:12] = np.frombuffer(seed, dtype="<u4")[:, None]
    start[12], start[13] = counters.astype(np.uint32), (counters >> np.uint64(32)).astype(np.uint32)
    x = start.copy()
    for _ in range(4):
        for a, b, c, d in _QUARTERS + _DIAGONALS:
            for one, other, into, bits in ((a, b, d, 16), (c, d, b, 12), (a, b, d, 8), (c, d, b, 7)):
                x[one] += x[other]
                mixed = x[into] ^ x[one]
                x[into] = (mixed << np.uint32(bits)) | (mixed >> np.uint32(32 - bits))
    return (x + start).T.reshape(-1)
