"""The gated activation of an MLP: activation(gate) * up. Shape letters: T tokens, I intermediate size."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels import backend

ACTIVATIONS = ("silu", "gelu_tanh", "gelu")

_FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def act_and_mul(gate_up: Tensor, activation: str, *, out: Tensor | None = None) -> Tensor:
    """activation(gate) * up, computed in float32.

    gate_up     [T, 2I] float: gate in the first I columns, up in the others; rows contiguous, any stride between them
    activation  "silu", "gelu_tanh" (the tanh approximation) or "gelu" (with erf)
    out         [T, I] of the same type, contiguous; made when None
    Raises ValueError when shapes, types or the activation's name are wrong.
    """
    if activation not in ACTIVATIONS:
        raise ValueError(f"unknown activation {activation!r}; known: {', '.join(ACTIVATIONS)}")
    if gate_up.ndim != 2 or gate_up.shape[1] % 2 or gate_up.dtype not in _FLOATS or gate_up.stride(1) != 1:
        raise ValueError(f"gate_up must be [T, 2I] float with contiguous rows, got {list(gate_up.shape)}")
    shape = (gate_up.shape[0], gate_up.shape[1] // 2)
    if out is None:
        out = torch.empty(shape, dtype=gate_up.dtype, device=gate_up.device)
    elif out.shape != shape or out.dtype != gate_up.dtype or not out.is_contiguous():
        raise ValueError(f"out is {list(out.shape)} {out.dtype}, need contiguous {list(shape)} {gate_up.dtype}")
    if out.numel():
        backend.implementation("act_and_mul", gate_up.device).act_and_mul(gate_up, activation, out)
    return out
