"""The experts of a mixture in one call: each token through those that were chosen for it, and the weighted sum.

Knows which experts were chosen; not how. Scheme of grouping tokens by expert: Gale et al. 2022, arXiv:2211.15841
(MegaBlocks); differs: no padding is stored, blocks only say which tokens of the sorted order they hold.
Shape letters: T tokens, C hidden size, E experts, k experts of a token, I intermediate size of an expert.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels import backend
from kernels.act_and_mul import ACTIVATIONS

_FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def moe(
    x: Tensor, gate_up: Tensor, down: Tensor, weights: Tensor, experts: Tensor, *, activation: str = "silu"
) -> Tensor:
    """out[t] = sum over j of weights[t, j] * down[e] (activation(gate[e] x[t]) * up[e] x[t]) with e = experts[t, j].

    x        [T, C] float, rows contiguous
    gate_up  [E, 2I, C] of the same type, contiguous: gate in the first I rows of an expert, up in the others
    down     [E, C, I] likewise
    weights  [T, k] of the same type or float32, contiguous
    experts  [T, k] int64, contiguous, each below E (not checked); an expert may come once or more for a token
    activation  of `act_and_mul`

    Products are summed in float32 and rounded to x's type after the activation and after `down`; the sum over j runs in
    order in float32. On CUDA nothing waits for the device, and launches depend on shapes alone: a CUDA graph may hold
    them. There the tiles, and with them the last bits of a token's result, depend on T.
    Returns [T, C] of x's type. Raises ValueError when shapes, types or the activation's name are wrong.
    """
    _check(x, gate_up, down, weights, experts, activation)
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    if out.numel():
        implementation = backend.implementation("moe", x.device)
        implementation.moe(x, gate_up, down, weights, experts, activation, out)
    return out


def _check(x: Tensor, gate_up: Tensor, down: Tensor, weights: Tensor, experts: Tensor, activation: str) -> None:
    if activation not in ACTIVATIONS:
        raise ValueError(f"unknown activation {activation!r}; known: {', '.join(ACTIVATIONS)}")
    if x.dim() != 2 or x.dtype not in _FLOATS or x.stride(1) != 1:
        raise ValueError(f"x must be [T, C] float with contiguous rows, got {list(x.shape)} {x.dtype}")
    if (
        down.dim() != 3
        or gate_up.shape != (down.shape[0], 2 * down.shape[2], x.shape[1])
        or down.shape[1] != x.shape[1]
    ):
        raise ValueError(
            f"gate_up {list(gate_up.shape)} and down {list(down.shape)} do not fit x {list(x.shape)}; "
            "need [E, 2I, C] and [E, C, I]"
        )
    for name, matrices in (("gate_up", gate_up), ("down", down)):
        if matrices.dtype != x.dtype or not matrices.is_contiguous():
            raise ValueError(f"{name} must be contiguous {x.dtype}, got {matrices.dtype}")
    if experts.dim() != 2 or experts.shape[0] != x.shape[0] or experts.dtype != torch.int64 or not experts.shape[1]:
        raise ValueError(f"experts must be [{x.shape[0]}, k] int64, got {list(experts.shape)} {experts.dtype}")
    if weights.shape != experts.shape or weights.dtype not in (x.dtype, torch.float32):
        raise ValueError(
            f"weights must be {list(experts.shape)} {x.dtype} or float32, got {list(weights.shape)} {weights.dtype}"
        )
    if not (experts.is_contiguous() and weights.is_contiguous()):
        raise ValueError("experts and weights must be contiguous")
