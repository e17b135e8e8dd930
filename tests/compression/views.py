"""What tests of cache policies share: a hand-checked attention matrix, views made from plain lists, and an accumulator.

The accumulator adds up attention as the contract of `Evidence` says, one chunk after the other, in float64.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from engine.compression.base import CacheShape, CompactionView, Policy

SHAPE = CacheShape(num_layers=4, num_kv_heads=2, head_dim=8, head_dim_v=8, block_size=16)

# Causal attention probabilities of six tokens: row q, column k.
F6 = torch.tensor(
    [
        [1.0, 0, 0, 0, 0, 0],
        [0.6, 0.4, 0, 0, 0, 0],
        [0.5, 0.3, 0.2, 0, 0, 0],
        [0.4, 0.1, 0.4, 0.1, 0, 0],
        [0.3, 0.05, 0.4, 0.05, 0.2, 0],
        [0.3, 0.05, 0.1, 0.35, 0.1, 0.1],
    ],
    dtype=torch.float64,
)


def view_of(
    scores: Tensor,
    num_kept: int | Tensor,
    *,
    positions: Tensor | None = None,
    num_present: Tensor | None = None,
    num_prompt_tokens: int | None = None,
    num_tokens: int | None = None,
    seed: int = 0,
    keys: Tensor | None = None,
    values: Tensor | None = None,
) -> CompactionView:
    """scores [n], [C, n] or [C, L, H_kv, n]; keys and values [L, H_kv, n, D], by default zeros; by default a prompt."""
    if scores.ndim < 4:
        scores = scores.reshape(-1, 1, 1, scores.shape[-1])
    _, num_layers, num_heads, num_slots = scores.shape
    if positions is None:
        positions = torch.arange(num_slots)
    num_tokens = int(positions.max()) + 1 if num_tokens is None else num_tokens
    blank = torch.zeros(num_layers, num_heads, num_slots, 4)
    keys = blank if keys is None else keys
    values = blank if values is None else values
    full = torch.full((num_layers, num_heads), num_slots)
    return CompactionView(
        scores=scores.float(),
        positions=positions.expand(num_layers, num_heads, num_slots),
        num_present=full if num_present is None else num_present,
        num_kept=torch.full_like(full, num_kept) if isinstance(num_kept, int) else num_kept,
        num_prompt_tokens=num_tokens if num_prompt_tokens is None else num_prompt_tokens,
        num_tokens=num_tokens,
        seed=seed,
        keys=lambda layer: keys[layer].float(),
        values=lambda layer: values[layer].float(),
    )


def kept(policy: Policy, view: CompactionView) -> list[int]:
    """Positions that the first head of the first layer keeps."""
    index = policy.keep(view).index[0, 0]
    return view.positions[0, 0][index[index >= 0]].tolist()


def accumulated(
    policy: Policy,
    attention: Tensor,
    *,
    num_prompt_tokens: int | None = None,
    point: int | None = None,
    chunks: Sequence[int] | None = None,
) -> Tensor:
    """What the engine has added up when `point` tokens are computed: [C, n] float32.

    attention  [n, n] causal probabilities of one head
    chunks     how many tokens each step computes; None: all in one
    """
    point = len(attention) if point is None else point
    num_prompt_tokens = point if num_prompt_tokens is None else num_prompt_tokens
    evidence = policy.evidence
    assert evidence is not None
    total = torch.zeros(evidence.channels, len(attention), dtype=torch.float64)
    start = 0
    for length in chunks or [point]:
        positions = torch.arange(start, start + length)
        rows = attention[start : start + length]
        if evidence.kind == "count":
            is_visible = torch.ones_like(attention).tril()[positions]
            rows = (rows < 1 / is_visible.sum(1, keepdim=True)).double() * is_visible
        ages = (start + length - 1 - positions).double()
        weights = policy.query_weights(positions, num_prompt_tokens, point).double() * evidence.decay**ages
        total = total * evidence.decay**length + weights @ rows
        start += length
    assert start == point
    return total[:, :point].float()
