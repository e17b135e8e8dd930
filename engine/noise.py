"""Keys of the counter-based noise: every random draw is a pure function of (seed, choice, output index, purpose).

Torch-free, so that the scheduler, drafters and the sampler derive the same key. The draw itself, which adds the token
id to the key, is `kernels.sampling`. Mixing: the finaliser and increment of SplitMix64 (Steele et al. 2014).
"""

from __future__ import annotations

from enum import IntEnum

GOLDEN = 0x9E3779B97F4A7C15  # 2^64 divided by the golden ratio, odd
MIX_1 = 0xBF58476D1CE4E5B9
MIX_2 = 0x94D049BB133111EB
_MASK = (1 << 64) - 1


class Purpose(IntEnum):
    """What a draw is for. Draws of different purposes are independent."""

    TOKEN = 0  # choosing the token at an output index, by the target model or by a drafter that mimics it
    DRAFT = 1  # what a drafter draws in the step whose first token has the output index
    VERIFY = 2  # accepting and rejecting the drafts of that step
    EVICTION = 3  # which tokens a cache policy keeps; here the choice is the layer and the output index the kv head
    ANCHOR = 4  # what such a policy compares tokens with, likewise
    EVIDENCE = 5  # noise in the attention that such a policy sums up; the output index is the query's position


def stream_key(seed: int, choice: int, purpose: int = Purpose.TOKEN) -> int:
    """The part of a row key that stays the same for all tokens of one choice: unsigned 64 bits."""
    key = _mix(seed & _MASK)
    key = _mix((key + GOLDEN * (choice + 1)) & _MASK)
    return _mix((key + GOLDEN * (purpose + 1)) & _MASK)


def row_key(seed: int, choice: int, output_index: int, purpose: int = Purpose.TOKEN) -> int:
    """Key of one row of noise, as a signed 64-bit integer (what an int64 tensor holds).

    seed          any integer; equal modulo 2^64 means equal noise
    output_index  index of the token to choose, from 0 at the first output

    Within one choice, different output indices always have different keys.
    """
    return _signed(_mix((stream_key(seed, choice, purpose) + GOLDEN * (output_index + 1)) & _MASK))


def row_keys(seed: int, choice: int, output_index: int, count: int) -> list[int]:
    """`row_key` of so many tokens from an output index on."""
    first = stream_key(seed, choice) + GOLDEN * (output_index + 1)
    return [_signed(_mix((first + GOLDEN * i) & _MASK)) for i in range(count)]


def subkey(key: int, index: int) -> int:
    """Key number `index` under a row key, signed as that: for rows of noise within one step. Indices from 0."""
    return _signed(_mix((key + GOLDEN * (index + 1)) & _MASK))


def uniform(key: int, index: int) -> float:
    """Uniform variable number `index` under a key, in [0, 1) with 53 bits. Not for keys that `subkey` divides."""
    return (_mix((key + GOLDEN * (index + 1)) & _MASK) >> 11) * 2.0**-53


def _signed(x: int) -> int:
    return x - (1 << 64) if x >> 63 else x


def _mix(x: int) -> int:
    """A bijection on 64 bits in which each input bit changes each output bit about half the time."""
    x = ((x ^ (x >> 30)) * MIX_1) & _MASK
    x = ((x ^ (x >> 27)) * MIX_2) & _MASK
    return x ^ (x >> 31)
