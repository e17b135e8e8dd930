"""Root-mean-square normalisation, alone or after adding to the residual stream.

Zhang and Sennrich 2019, arXiv:1910.07467. Weights that mean 1 + w are folded when a model is loaded.
Shape letters: T tokens, H hidden size or head dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels import backend

_FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def rms_norm(x: Tensor, weight: Tensor, eps: float, *, out: Tensor | None = None) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dim, computed in float32 and rounded once.

    x       [T, H] or [T, num_heads, H] float (the form of q and k norms); last dim contiguous
    weight  [H] float
    out     like x, last dim contiguous; may be x itself; made (contiguous) when None
    Raises ValueError when shapes, types or layouts disagree.
    """
    _check("x", x, weight, (2, 3))
    if out is None:
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
    elif out is not x:
        _check_alike("out", out, x)
    if x.numel():
        backend.implementation("rms_norm", x.device).rms_norm(x, weight, eps, out)
    return out


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
    """residual += x in place, then rms_norm(residual), in one pass.

    x, residual  [T, H] float of one type, rows contiguous; the sum is rounded to that type before it is normalised
    weight       [H] float
    Returns a new [T, H]. Raises ValueError when shapes, types or layouts disagree.
    """
    _check("x", x, weight, (2,))
    _check_alike("residual", residual, x)
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    if x.numel():
        backend.implementation("rms_norm", x.device).add_rms_norm(x, residual, weight, eps, out)
    return out


def _check(name: str, x: Tensor, weight: Tensor, dims: tuple[int, ...]) -> None:
    if x.dim() not in dims or x.dtype not in _FLOATS or x.stride(-1) != 1:
        forms = " or ".join(("[T, H]", "[T, num_heads, H]")[: len(dims)])
        raise ValueError(f"{name} must be {forms} float, last dim contiguous, got {list(x.shape)} {x.dtype}")
    if weight.shape != x.shape[-1:] or weight.dtype not in _FLOATS:
        raise ValueError(f"weight is {list(weight.shape)} {weight.dtype}, need [{x.shape[-1]}] float")


def _check_alike(name: str, other: Tensor, x: Tensor) -> None:
    if other.shape != x.shape or other.dtype != x.dtype or other.stride(-1) != 1:
        raise ValueError(
            f"{name} is {list(other.shape)} {other.dtype} with strides {other.stride()}, "
            f"need {list(x.shape)} {x.dtype}, last dim contiguous"
        )
