"""Which tokens have which adapter: worked out once per step, valid for every linear of the model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

BLOCK_ROWS = 16  # tokens that one piece of work takes together: a tile of the GPU's matrix units


@dataclass(frozen=True)
class LoraPlan:
    """Made by `plan_lora`. Tokens are sorted by adapter, so that its matrices are read once for all of them."""

    num_tokens: int  # T
    num_rows: int  # n, tokens that have an adapter
    max_adapter: int  # largest index, 0 when no token has one
    rows: Tensor  # [n] int64: those tokens, by adapter and then in order
    blocks: Tensor  # [blocks, 3] int64: adapter, first entry of `rows`, number of rows (at most BLOCK_ROWS)
    segments: tuple[tuple[int, int, int], ...]  # on the host: adapter, its first and end entry of `rows`


def plan_lora(adapters: Sequence[int] | np.ndarray, device: torch.device | str = "cpu") -> LoraPlan:
    """Sort the tokens of a step by adapter.

    adapters  [T] adapter index of each token, 0 for none
    device    where the products run
    Raises ValueError for a negative index.
    """
    indices = np.asarray(adapters, dtype=np.int64)
    if indices.ndim != 1 or (indices.size and int(indices.min()) < 0):
        raise ValueError("adapter indices must be a list of numbers from 0 on")
    tokens = np.flatnonzero(indices)
    rows = tokens[np.argsort(indices[tokens], kind="stable")]
    present, starts = np.unique(indices[rows], return_index=True)
    bounds = pairwise([*starts.tolist(), len(rows)])
    segments = tuple((adapter, start, end) for adapter, (start, end) in zip(present.tolist(), bounds, strict=True))
    blocks = [
        (adapter, first, min(BLOCK_ROWS, end - first))
        for adapter, start, end in segments
        for first in range(start, end, BLOCK_ROWS)
    ]
    return LoraPlan(
        num_tokens=len(indices),
        num_rows=len(rows),
        max_adapter=segments[-1][0] if segments else 0,
        rows=torch.from_numpy(rows).to(device, non_blocking=True),
        blocks=torch.tensor(blocks, dtype=torch.int64).view(-1, 3).to(device, non_blocking=True),
        segments=segments,
    )
