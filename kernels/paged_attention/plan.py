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

MAX_TREE_NODES = 64  # of one row, behind its first token, where ancestors are kept as bits

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
    parents: Sequence[int] | None = None  # of each token, in its row; None: all rows are simple sequences
    checked: set[Hashable] = field(default_factory=set)  # layouts of tensors found to fit, one per kind of layer

    @cached_property
    def rows(self) -> tuple[Row, ...]:
        return rows_of(self.cu_seqlens_q, self.seq_lens)

    @cached_property
    def num_tokens(self) -> int:
        return sum(row.num_queries for row in self.rows)

    @cached_property
    def paths(self) -> Tensor | None:
        """[T, W] int32 on the host: how many tokens of its row a token sees, then which ones, itself the last. The
        number is 0 in rows that are simple sequences. None where all are.
        """
        if self.parents is None:
            return None
        trees = self._trees()
        longest = max((len(path) for paths in trees.values() for path in paths), default=0)
        if not longest:
            return None
        table = np.zeros((self.num_tokens, 1 + longest), dtype=np.int32)
        for first, paths in trees.items():
            for token, path in enumerate(paths, start=first):
                table[token, : 1 + len(path)] = len(path), *path
        return torch.from_numpy(table)

    @cached_property
    def tree_bits(self) -> tuple[Tensor, Tensor] | None:
        """depths [T] int32, 0 for the first of a row and -1 in rows that are simple sequences; and bits [T] int64: bit
        i says whether a token sees token i + 1 of its row. On the device; None where all rows are sequences.

        Raises ValueError for a tree of more than MAX_TREE_NODES tokens behind its first.
        """
        paths = self.paths
        if paths is None:
            return None
        depths = paths[:, 0].int() - 1
        bits = np.zeros(self.num_tokens, dtype=np.uint64)
        for token, (count, *path) in enumerate(paths.tolist()):
            if count > 0 and path[count - 1] > MAX_TREE_NODES:
                raise ValueError(f"a tree has more than {MAX_TREE_NODES} tokens behind its first")
            for node in path[1:count]:
                bits[token] |= np.uint64(1 << (node - 1))
        return depths.to(self.device), torch.from_numpy(bits.view(np.int64)).to(self.device)

    def _trees(self) -> dict[int, list[list[int]]]:
        """Paths of the tokens of each row that is no simple sequence, by the row's first token."""
        assert self.parents is not None, "only such plans have trees"
        found = {}
        first = 0
        for row in self.rows:
            own = self.parents[first : first + row.num_queries]
            if any(parent != index - 1 for index, parent in enumerate(own)):
                paths: list[list[int]] = []
                for index, parent in enumerate(own):
                    paths.append([*(paths[parent] if parent >= 0 else []), index])
                found[first] = paths
            first += row.num_queries
        return found

    @cached_property
    def work(self) -> Any:
        """The implementation's own work list."""
        return self.module.plan(self.rows, self.num_kv_heads, self.device)


@dataclass(frozen=True)
class FixedPlan(AttentionPlan):
    """Made by `fixed_decode_plan`: decoding rows whose lengths change while the tensors stay where they are."""

    def fill(self, seq_lens: Sequence[int] | np.ndarray) -> None:
        """Take these lengths [R], for all that is launched from now on. Raises ValueError when they do not fit."""
        if len(seq_lens) != len(self.seq_lens):
            raise ValueError(f"{len(seq_lens)} lengths for a plan of {len(self.seq_lens)} rows")
        if hasattr(self.work, "fill"):
            self.work.fill(np.asarray(seq_lens))
            return
        object.__setattr__(self, "seq_lens", list(seq_lens))
        for name in ("rows", "work"):
            self.__dict__.pop(name, None)


def check_parents(parents: Sequence[int], rows: Sequence[Row]) -> None:
    """Raises ValueError unless every row is one tree, its first token the root and no token before its parent."""
    num_tokens = sum(row.num_queries for row in rows)
    if len(parents) != num_tokens:
        raise ValueError(f"parents has {len(parents)} entries, need one for each of {num_tokens} tokens")
    first = 0
    for row in rows:
        for index, parent in enumerate(parents[first : first + row.num_queries]):
            if not (parent == -1 if index == 0 else 0 <= parent < index):
                raise ValueError(
                    f"token {index} of a row continues token {parent}; need an earlier one, -1 for the first"
                )
        first += row.num_queries


def rows_of(cu_seqlens_q: Extents, seq_lens: Extents) -> tuple[Row, ...]:
    """Host copy of the batch's extents."""
    starts = _to_list(cu_seqlens_q)
    lengths = [max(entry) if isinstance(entry, list) else entry for entry in _to_list(seq_lens)]
    return tuple(Row(end - start, length) for (start, end), length in zip(pairwise(starts), lengths, strict=True))


def _to_list(values: Extents) -> list[Any]:
    return values.tolist() if isinstance(values, (Tensor, np.ndarray)) else list(values)
