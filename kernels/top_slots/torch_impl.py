"""The choice by one sort of 64-bit keys that are all different: score above slot."""

from __future__ import annotations

import torch
from torch import Tensor


def top_slots(scores: Tensor, num_kept: Tensor, lengths: Tensor, index: Tensor) -> None:
    """See `kernels.top_slots.top_slots`; writes index [N, K]."""
    slots = torch.arange(scores.shape[1], device=scores.device)
    keys = (_ordered(scores) << 32) + slots
    keys = keys.masked_fill(slots >= lengths[:, None], torch.iinfo(torch.int64).min)
    width = index.shape[1]
    best = keys.topk(width, dim=1).indices  # in descending order
    is_kept = torch.arange(width, device=scores.device) < torch.minimum(num_kept, lengths)[:, None]
    ascending = best.masked_fill(~is_kept, scores.shape[1]).sort(dim=1).values
    index.copy_(ascending.masked_fill(ascending == scores.shape[1], -1))


def _ordered(scores: Tensor) -> Tensor:
    """int64 within 32 bits that orders as the floats do, NaN lowest."""
    bits = (scores + 0.0).view(torch.int32).long()  # adding turns -0.0 into 0.0
    ordered = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    return ordered.masked_fill(scores.isnan(), torch.iinfo(torch.int32).min)
