"""Definition of the choice: sort by (score, slot), both descending."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def top_slots(scores: Tensor, num_kept: Tensor, lengths: Tensor, index: Tensor) -> None:
    """See `kernels.top_slots.top_slots`; writes index [N, K]."""
    index.fill_(-1)
    for row, (count, length) in enumerate(zip(num_kept.tolist(), lengths.tolist(), strict=True)):
        # a number is above every NaN, whatever the number
        order = [(not math.isnan(score), 0.0 if math.isnan(score) else score) for score in scores[row].tolist()]
        chosen = sorted(range(length), key=lambda slot: (order[slot], slot), reverse=True)[:count]
        index[row, : len(chosen)] = torch.tensor(sorted(chosen), dtype=torch.int64)
