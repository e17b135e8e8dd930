"""What attention works out once per step: the rows' extents on the host, and the chosen implementation's work list."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from types import ModuleType
from typing import Any, NamedTuple

from torch import Tensor


class Row(NamedTuple):
    """One request's part of the step."""

    num_queries: int  # new tokens; may be 0
    seq_len: int  # cached slots that its last query sees; the longest of its kv heads


@dataclass(frozen=True)
class AttentionPlan:
    """Made by `plan_attention`; valid for every layer of one step and for the implementation that made it."""

    rows: tuple[Row, ...]
    num_tokens: int
    module: ModuleType  # the implementation
    work: Any  # its own work list
    checked: set[Hashable] = field(default_factory=set)  # layouts of tensors found to fit, one per kind of layer


def rows_of(cu_seqlens_q: Tensor | Sequence[int], seq_lens: Tensor | Sequence[int]) -> tuple[Row, ...]:
    """Host copy of the batch's extents. Raises ValueError when the two disagree in length."""
    starts = _to_list(cu_seqlens_q)
    lengths = [max(entry) if isinstance(entry, list) else entry for entry in _to_list(seq_lens)]
    if len(starts) != len(lengths) + 1:
        raise ValueError(f"cu_seqlens_q has {len(starts)} entries, need one more than the {len(lengths)} of seq_lens")
    return tuple(Row(end - start, length) for (start, end), length in zip(pairwise(starts), lengths, strict=True))


def _to_list(values: Tensor | Sequence[int]) -> list[Any]:
    return values.tolist() if isinstance(values, Tensor) else list(values)
