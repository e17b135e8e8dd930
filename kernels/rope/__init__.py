"""Rotary position embedding of queries and keys, in place.

Shape letters: T tokens, H query heads, H_kv kv heads, D head dim, P positions in the table.
Source: Su et al. 2021, arXiv:2104.09864. The table decides everything about scaling; this operation only rotates.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels import backend

_FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def apply_rope(q: Tensor, k: Tensor, positions: Tensor, cos_sin: Tensor, *, interleaved: bool = False) -> None:
    """Rotate the first rot_dim dims of every head of q and k by its token's position, in place, in float32.

    q            [T, H, D] float; any strides between tokens and heads, last dim contiguous
    k            [T, H_kv, D] of the same type
    positions    [T] int64, 0 <= position < P: not checked
    cos_sin      [P, rot_dim] float32 contiguous: a row is rot_dim/2 cosines, then as many sines; rot_dim <= D, even
    interleaved  False: dim i pairs with dim i + rot_dim/2 (NeoX); True: dim 2i pairs with dim 2i + 1 (GPT-J)
    Raises ValueError when shapes or types disagree.
    """
    check_rope(q, k, positions, cos_sin)
    if q.shape[0]:
        implementation = backend.implementation("rope", q.device)
        implementation.apply_rope(q, positions, cos_sin, interleaved)
        implementation.apply_rope(k, positions, cos_sin, interleaved)


def check_rope(q: Tensor, k: Tensor, positions: Tensor, cos_sin: Tensor) -> None:
    """Raises ValueError unless the arguments are as `apply_rope` documents them."""
    for name, x in (("q", q), ("k", k)):
        if x.ndim != 3 or x.dtype not in _FLOATS or x.stride(2) != 1:
            raise ValueError(f"{name} must be [T, heads, D] float with a contiguous last dim, got {list(x.shape)}")
    if q.shape[0] != k.shape[0] or q.shape[2] != k.shape[2] or q.dtype != k.dtype:
        raise ValueError(f"q and k disagree: {list(q.shape)} {q.dtype} and {list(k.shape)} {k.dtype}")
    if positions.shape != q.shape[:1] or positions.dtype != torch.int64:
        raise ValueError(f"positions must be [{q.shape[0]}] int64, got {list(positions.shape)} {positions.dtype}")
    if cos_sin.ndim != 2 or cos_sin.dtype != torch.float32 or not cos_sin.is_contiguous():
        raise ValueError(f"cos_sin must be [P, rot_dim] float32 contiguous, got {list(cos_sin.shape)} {cos_sin.dtype}")
    if cos_sin.shape[1] % 2 or cos_sin.shape[1] > q.shape[2]:
        raise ValueError(f"rot_dim is {cos_sin.shape[1]}; it must be even and at most the head dim {q.shape[2]}")
