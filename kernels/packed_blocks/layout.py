"""Where the codes and scales of packed blocks lie. Bytes and integers only; what they mean stands in `__init__.py`.

A pool unit (one block, layer and kv head: block_size * dim elements) holds `places` groups of block_size tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Literal, get_args

import torch

PackedFormat = Literal["fp8", "int8", "kivi4", "kivi2", "kivi4_rotated", "kivi2_rotated"]
Coding = Literal["fp8", "int8", "channel", "token"]

FORMATS: tuple[PackedFormat, ...] = get_args(PackedFormat)
CODINGS: tuple[Coding, ...] = get_args(Coding)

VALUE_GROUP = 32  # channels of a token's values that share scale and zero
SCALE_BITS = 8  # of a scale that lies in the low bits of codes, so many of them
SCALE_BYTES = 4  # of a scale and a zero, fp16 each
GROUP_ALIGNMENT = 4


@dataclass(frozen=True)
class Side:
    """Keys or values. A group is scales, zeros, then codes, token by token; fp8 and int8 have codes alone."""

    coding: Coding
    bits: int
    dim: int
    block_size: int

    @property
    def row_bytes(self) -> int:
        """Codes of one token."""
        return self.dim * self.bits // 8

    @property
    def num_value_groups(self) -> int:
        """Scales of one token under the coding "token"; the last one may serve fewer channels."""
        return -(-self.dim // VALUE_GROUP)

    @property
    def num_scales(self) -> int:
        """Scales of a group that lie before its codes; as many zeros follow them."""
        return {"channel": self.dim, "token": self.block_size * self.num_value_groups}.get(self.coding, 0)

    @property
    def group_bytes(self) -> int:
        size = self.num_scales * SCALE_BYTES + self.block_size * self.row_bytes
        return -(-size // GROUP_ALIGNMENT) * GROUP_ALIGNMENT if self.num_scales else size


@dataclass(frozen=True)
class PackedLayout:
    keys: Side
    values: Side
    is_rotated: bool  # whether keys are transformed before they are coded
    places: int  # groups that a block holds: as many as both its key and its value units have room for


@cache
def packed_layout(format: str, head_dim: int, head_dim_v: int, block_size: int, dtype: torch.dtype) -> PackedLayout:
    """Raises ValueError for an unknown format, and for heads that it cannot code."""
    if format not in FORMATS:
        raise ValueError(f"unknown packed format {format!r}; known: {', '.join(FORMATS)}")
    is_kivi = format.startswith("kivi")
    bits = int(format[4]) if is_kivi else 8
    for dim in (head_dim, head_dim_v):
        if is_kivi and dim % (8 // bits):
            raise ValueError(f"{format} needs a head dim that is a multiple of {8 // bits}, got {dim}")
        if not is_kivi and dim < SCALE_BITS:
            raise ValueError(f"{format} needs a head dim of at least {SCALE_BITS}, got {dim}")
    codings: tuple[Coding, Coding] = ("channel", "token") if is_kivi else (format, format)  # type: ignore[assignment]
    keys, values = (
        Side(coding, bits, dim, block_size) for coding, dim in zip(codings, (head_dim, head_dim_v), strict=True)
    )
    units = (block_size * side.dim * dtype.itemsize // side.group_bytes for side in (keys, values))
    return PackedLayout(keys, values, format.endswith("_rotated"), min(units))


def packed_places(format: str, head_dim: int, head_dim_v: int, block_size: int, dtype: torch.dtype) -> int:
    """How many groups of block_size tokens one block of a pool of that type holds; 1 or 0 saves no memory.

    Raises ValueError for an unknown format, and for heads that it cannot code.
    """
    return packed_layout(format, head_dim, head_dim_v, block_size, dtype).places


def packed_bits_per_value(format: str, head_dim: int, head_dim_v: int, block_size: int, dtype: torch.dtype) -> float:
    """Bits of pool memory that one number of a key or value takes: scales and unused bytes included."""
    return 8 * dtype.itemsize / packed_places(format, head_dim, head_dim_v, block_size, dtype)
