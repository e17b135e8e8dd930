"""What attention works out once per step: the rows' extents on the host, and the chosen implementation's work list.

Both are made when they are first looked at: a step that divides its attention itself pays for neither.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

Extents = Tensor | np.ndarray | Sequence[int]


class Row(NamedTuple):
    """One request's part of the step."""

    num_queries: int  # new tokens; may be 0
    seq_len: int  # cached slots that its last query sees; the longest of its kv heads


@dataclass(frozen=True)
class AttentionPlan:
    """Made by `plan_attention`; valid for every layer of one step and for the implementation that made it."""

    cu_seqlens_q: Extents
    seq_lens: Extents
    num_kv_heads: int
    device: torch.device
    module: ModuleType  # the implementation
    checked: set[Hashable] = field(default_factory=set)  # layouts of tensors found to fit, one per kind of layer

    @cached_property
    def rows(self) -> tuple[Row, ...]:
        return rows_of(self.cu_seqlens_q, self.seq_lens)

    @cached_property
    def num_tokens(self) -> int:
        return sum(row.num_queries for row in self.rows)

    @cached_property
    def work(self) -> Any:
        """The implementation's own work list."""
        return self.module.plan(self.rows, self.num_kv_heads, self.device)


def rows_of(cu_seqlens_q: Extents, seq_lens: Extents) -> tuple[Row, ...]:
    """Host copy of the batch's extents."""
    starts = _to_list(cu_seqlens_q)
    lengths = [max(entry) if isinstance(entry, list) else entry for entry in _to_list(seq_lens)]
    return tuple(Row(end - start, length) for (start, end), length in zip(pairwise(starts), lengths, strict=True))


def _to_list(values: Extents) -> list[Any]:
    return values.tolist() if isinstance(values, (Tensor, np.ndarray)) else list(values)
