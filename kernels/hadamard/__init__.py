"""The Walsh-Hadamard transform of short vectors: mixes all their entries, by sums and differences alone.

Its matrix H, of +1 and -1, is symmetric and H H = n I. So q . k = (H q / n) . (H k): both may be transformed, and codes
of few bits then spread a channel's error over all of them. Source of that use: QuaRot, Ashkboos et al. 2024,
arXiv:2404.00456.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels import backend

_FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def hadamard_size(dim: int) -> int:
    """Entries that are mixed with each other in vectors of `dim`: the largest power of two that divides it."""
    return dim & -dim


def hadamard(x: Tensor, *, scale: float = 1.0) -> Tensor:
    """H x * scale for each run of `hadamard_size(D)` entries of the last dimension.

    x [..., D] float, of any strides -> contiguous [..., D] of the same type; sums are made in float32, entries that lie
    1 apart first, then 2, 4, ..., and every implementation gives the same bits. Raises ValueError for another type.
    """
    if x.dtype not in _FLOATS or x.dim() < 1:
        raise ValueError(f"x is {list(x.shape)} {x.dtype}; needed: at least one dimension, of {_FLOATS}")
    x = x.contiguous()
    out = torch.empty_like(x)
    if x.numel():
        size = hadamard_size(x.shape[-1])
        backend.implementation("hadamard", x.device).hadamard(x.view(-1, size), scale, out.view(-1, size))
    return out
