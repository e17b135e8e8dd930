"""Keys of the noise of `attention_scores`: one for each query and head, out of one for each query.

The same mixing as the keys of sampling: the finaliser and increment of SplitMix64 (Steele et al. 2014).
"""

from __future__ import annotations

import torch
from torch import Tensor

_GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)  # as signed 64-bit integers, whose products wrap
_MIX_1 = 0xBF58476D1CE4E5B9 - (1 << 64)
_MIX_2 = 0x94D049BB133111EB - (1 << 64)


def head_keys(keys: Tensor, layer: int, num_heads: int) -> Tensor:
    """keys [T] int64 of queries -> [T, H] int64: subkey(subkey(key, layer), head)."""
    heads = torch.arange(num_heads, dtype=torch.int64, device=keys.device)
    of_layer = subkey(keys, torch.tensor(layer, dtype=torch.int64, device=keys.device))
    return subkey(of_layer.unsqueeze(1), heads)


def subkey(key: Tensor, index: Tensor) -> Tensor:
    """Key number `index` under a key, both int64."""
    return _mix(key + (index + 1) * _GOLDEN)


def _mix(x: Tensor) -> Tensor:
    x = (x ^ _shift_right(x, 30)) * _MIX_1
    x = (x ^ _shift_right(x, 27)) * _MIX_2
    return x ^ _shift_right(x, 31)


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Zeros come in from the left, unlike in a shift of a signed number."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)
