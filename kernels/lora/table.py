"""The adapters of one linear, by index: their matrices and where each part adds. Changed between steps only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from kernels.native import DTYPE_CODES

# Columns of LoraTable.entries; kernel.cpp: Entry, triton_impl.py: ENTRY_*.
ENTRY_FIELDS = ("a", "b", "dtype", "rank", "first_column", "num_columns")


@dataclass(frozen=True)
class LoraPart:
    """One low-rank pair. A fused linear (q, k and v in one) has one part per projection that is adapted.

    a             [R, K]
    b             [columns, R]
    scale         lora_alpha / R, or what the adapter says
    first_column  of the base product's N columns
    """

    a: Tensor
    b: Tensor
    scale: float
    first_column: int = 0


@dataclass(frozen=True)
class StoredPart:
    """A part as the products read it: A [R, K] and B transposed, [R, columns], both contiguous."""

    a: Tensor
    b: Tensor
    scale: float
    first_column: int

    @property
    def nbytes(self) -> int:
        return self.a.nbytes + self.b.nbytes


class LoraTable:
    """Room for adapters 1 .. num_adapters - 1 of one linear [N, K]; index 0 is "none" and stays empty.

    entries   [num_adapters, num_parts, 6] int64 on the device: addresses of A and B, code of their type, rank (0 where
              there is no part), first column, number of columns
    scales    [num_adapters, num_parts] float32 on the device
    max_rank  largest rank of any part, 0 while the table is empty
    """

    def __init__(
        self,
        out_features: int,
        in_features: int,
        *,
        num_adapters: int,
        num_parts: int = 1,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
    ) -> None:
        """num_parts: most parts of one adapter. dtype: what all matrices become; None keeps each in its own (CPU)."""
        device = torch.device(device)
        if dtype is None and device.type != "cpu":
            raise ValueError(f"on {device} all adapters of a table have one type; give dtype")
        self.out_features = out_features
        self.in_features = in_features
        self.num_adapters = num_adapters
        self.num_parts = num_parts
        self.device = device
        self.dtype = dtype
        self.entries = torch.zeros(num_adapters, num_parts, len(ENTRY_FIELDS), dtype=torch.int64, device=device)
        self.scales = torch.zeros(num_adapters, num_parts, device=device)
        self.max_rank = 0
        self.max_columns = 0  # of any part
        self._parts: dict[int, tuple[StoredPart, ...]] = {}

    @property
    def nbytes(self) -> int:
        """Bytes of the matrices held."""
        return sum(part.nbytes for parts in self._parts.values() for part in parts)

    def parts(self, index: int) -> tuple[StoredPart, ...]:
        """Those of one adapter; empty when it has none here."""
        return self._parts.get(index, ())

    def set(self, index: int, parts: Sequence[LoraPart]) -> None:
        """Puts an adapter at a free index. Raises ValueError when the index, a shape or a type does not fit."""
        if not 1 <= index < self.num_adapters or index in self._parts:
            raise ValueError(f"adapter index {index} is taken or not in 1 .. {self.num_adapters - 1}")
        if not parts or len(parts) > self.num_parts:
            raise ValueError(f"{len(parts)} parts, the table takes 1 to {self.num_parts}")
        for part in parts:
            self._check(part)
        spans = sorted((part.first_column, part.first_column + part.b.shape[0]) for part in parts)
        if any(end > start for (_, end), (start, _) in pairwise(spans)):
            raise ValueError(f"parts overlap: columns {spans}")
        stored = tuple(
            StoredPart(self._held(part.a), self._held(part.b.t()), part.scale, part.first_column) for part in parts
        )
        entries = torch.zeros(self.num_parts, len(ENTRY_FIELDS), dtype=torch.int64)
        scales = torch.zeros(self.num_parts)
        for number, held in enumerate(stored):
            rank, num_columns = held.b.shape
            code = DTYPE_CODES[held.a.dtype]
            addresses = (held.a.data_ptr(), held.b.data_ptr())
            entries[number] = torch.tensor([*addresses, code, rank, held.first_column, num_columns])
            scales[number] = held.scale
        self._parts[index] = stored
        self.entries[index] = entries.to(self.device)
        self.scales[index] = scales.to(self.device)
        self._measure()

    def clear(self, index: int) -> None:
        """Lets go of an adapter; harmless where there is none."""
        if self._parts.pop(index, None) is not None:
            self.entries[index] = 0
            self._measure()

    def _measure(self) -> None:
        held = [part for parts in self._parts.values() for part in parts]
        self.max_rank = max((part.b.shape[0] for part in held), default=0)
        self.max_columns = max((part.b.shape[1] for part in held), default=0)

    def _check(self, part: LoraPart) -> None:
        a, b = part.a, part.b
        if a.dim() != 2 or b.dim() != 2 or a.dtype != b.dtype or a.dtype not in DTYPE_CODES:
            raise ValueError(f"A is {list(a.shape)} {a.dtype}, B {list(b.shape)} {b.dtype}; need two float matrices")
        end = part.first_column + b.shape[0]
        fits = a.shape[1] == self.in_features and 0 <= part.first_column < end <= self.out_features
        if not fits or a.shape[0] != b.shape[1] or not a.shape[0]:
            raise ValueError(
                f"A {list(a.shape)} and B {list(b.shape)} at column {part.first_column} do not fit a linear "
                f"[{self.out_features}, {self.in_features}]"
            )

    def _held(self, matrix: Tensor) -> Tensor:
        """A contiguous copy of its own, so that no larger tensor is kept alive."""
        held = torch.empty(matrix.shape, dtype=self.dtype or matrix.dtype, device=self.device)
        return held.copy_(matrix)
