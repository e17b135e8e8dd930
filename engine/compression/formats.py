"""Keep every token, the older ones in fewer bits: fp8, int8, and KIVI's 4 and 2 bits, in packed blocks.

Source: KIVI, Liu et al. 2024, arXiv:2402.02750; what the formats are stands in `kernels.packed_blocks`.
Differs: KIVI's keys go through a Hadamard transform first, and queries with them (QuaRot, Ashkboos et al. 2024,
arXiv:2404.00456); on Mimir's needles that takes back what 4 bits lose. `rotate: false` is KIVI itself.
Decided: blocks are packed whole, all but the newest full one at the prompt's end and then one per block of tokens; so
between one and three blocks of the newest tokens stay as they are. Keys per channel over one block; values are packed
with their keys, where KIVI moves them token by token.
With `shared`, also the prompt is packed as it is read, one whole packed block at a time, and what follows reads it so.
Then a packed block follows from the tokens up to its end alone, and other requests start with it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor

from engine.compression.base import CacheShape, CompactionView, Evidence, Keep
from engine.compression.options import OptionError, Options, option
from engine.compression.registry import Hook, register
from engine.errors import ConfigError
from engine.scheduling.compression import CachePlan, Realisation
from kernels.packed_blocks import PackedFormat, packed_places


@dataclass(frozen=True, kw_only=True)
class PackedPolicy(Options):
    """Base of the formats. At a point, what is older than the kept slots is packed and not dropped."""

    shared: bool = option(False, bool, "prompts are packed as they are read, and packed blocks shared with others")

    @property
    def format(self) -> PackedFormat:
        """The name by which the kernels know it."""
        return cast(PackedFormat, self.name)

    @property
    def evidence(self) -> Evidence | None:
        return None

    def places(self, shape: CacheShape) -> int:
        """Blocks of tokens that one packed block holds. Raises ConfigError for a cache of which it saves nothing."""
        try:
            places = packed_places(self.format, shape.head_dim, shape.head_dim_v, shape.block_size, shape.dtype)
        except ValueError as error:
            raise ConfigError(f"{error}; use another policy") from None
        if places < 2:
            dtype = str(shape.dtype).removeprefix("torch.")
            raise ConfigError(
                f"{self.name} saves nothing in blocks of {shape.block_size} tokens of {dtype}: raise block_size or use "
                "another policy"
            )
        return places

    def plan(self, num_prompt_tokens: int, shape: CacheShape) -> CachePlan:
        size = shape.block_size
        first_point = max(num_prompt_tokens, 2 * size)
        kept = size + first_point % size
        plan = CachePlan(
            self.name, Realisation.PACKED, first_point, size, (kept,), places=self.places(shape), format=self.format
        )
        if not self.shared:
            return plan
        period = plan.places * size
        return replace(plan, first_point=period, period=period, kept=(0,), is_sealed=True)

    def query_weights(self, positions: Tensor, num_prompt_tokens: int, next_point: int) -> Tensor:
        return torch.zeros(1, len(positions), device=positions.device)

    def keep(self, view: CompactionView) -> Keep:
        """The newest tokens stay as they are."""
        num_kept, num_slots = int(view.num_kept.max()), view.positions.shape[-1]
        newest = torch.arange(num_slots - num_kept, num_slots, device=view.positions.device)
        return Keep(newest.expand(*view.positions.shape[:2], -1))


@register("fp8", needs=(Hook.FORMAT,))
@dataclass(frozen=True, kw_only=True)
class Fp8(PackedPolicy):
    """Older tokens as 8-bit floats (e4m3), scaled by a power of two per block and kv head."""


@register("int8", needs=(Hook.FORMAT,))
@dataclass(frozen=True, kw_only=True)
class Int8(PackedPolicy):
    """Older tokens as 8-bit integers with a scale per token and kv head."""


@register("kivi", needs=(Hook.FORMAT,))
@dataclass(frozen=True, kw_only=True)
class Kivi(PackedPolicy):
    """Older tokens in 4 or 2 bits: keys per channel, values per token."""

    bits: int = option(4, int, "bits of a code: 4 or 2", at_least=2, at_most=4)
    rotate: bool = option(True, bool, "keys are mixed by a Hadamard transform before they are coded")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.bits == 3:
            raise OptionError("bits", "bits is 3, allowed: 2 and 4")

    @property
    def format(self) -> PackedFormat:
        if self.rotate:
            return "kivi4_rotated" if self.bits == 4 else "kivi2_rotated"
        return "kivi4" if self.bits == 4 else "kivi2"
