"""Modifier: of the blocks that the base would evict, rescue some that differ among themselves.

Source: Jha et al. 2025, arXiv:2503.00022, in the block form that OpenVINO GenAI ships. Of the tokens that the base does
not protect, the better half is marked; the marks of a block's tokens are its bits. Blocks that are to be evicted are
sorted by the Hamming distance of their bits to an anchor, and of E of them b are rescued: those at the places 0, step,
2 * step, ... with step = E // b.
Decided: per layer and kv head; a block's score is the mean of its tokens'; equal distances: the earlier block first;
"mean" sets a bit where more than half of all blocks do. The rescued blocks are part of the budget, not added to it, so
that policies of equal budget are comparable. What is too small for a block is filled with the best single tokens.
With rescue = 0 the choice is the base's.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from engine.compression.base import CompactionView
from engine.compression.modifier import Modifier
from engine.compression.options import option
from engine.compression.registry import register
from engine.compression.scoring import random_words, ranks
from engine.noise import Purpose

BASES = ("snapkv", "a2sf", "h2o", "keyformer", "pyramidkv", "random", "scissorhands", "tova", "vatp")


@register("kvcrush", bases=BASES)
@dataclass(frozen=True, kw_only=True)
class KVCrush(Modifier):
    """Modifier: spends part of the budget of `base` on blocks that differ from those it prefers."""

    rescue: int = option(2, int, "blocks of the budget that are rescued ones", at_least=0, at_most=4096)
    block: int = option(16, int, "tokens in a block", at_least=1, at_most=1024)
    anchor: str = option(
        "random", str, "bits that blocks are compared with", choices=("random", "zeros", "ones", "mean", "alternating")
    )

    def protected(self, view: CompactionView) -> Tensor:
        """What the base protects, its best blocks, and the rescued."""
        protected = self.base.protected(view)
        if self.rescue == 0:
            return protected
        area = Area.of(protected | (view.positions < 0), self.block)
        scores = area.to_blocks(self.base.importance(view))  # [L, H_kv, NB, P]
        places = ranks(area.fill(scores, -torch.inf).flatten(-2)).unflatten(-1, scores.shape[-2:])
        bits = area.is_token & (places < (area.num_tokens // 2)[..., None, None])
        room = (view.num_kept - protected.sum(-1)).clamp(min=0) // self.block
        num_rescued = room.clamp(max=self.rescue)
        mean = area.fill(scores, 0.0).sum(-1) / area.is_token.sum(-1).clamp(min=1)
        is_block = area.is_token.any(-1)
        kept = is_block & (ranks(mean.masked_fill(~is_block, -torch.inf)) < (room - num_rescued).unsqueeze(-1))
        distances = ((bits != self._anchor(view, bits, is_block)) & area.is_token).sum(-1)
        return protected | area.to_slots(kept | rescued(distances, is_block & ~kept, num_rescued))

    def _anchor(self, view: CompactionView, bits: Tensor, is_block: Tensor) -> Tensor:
        """[L, H_kv, 1, P] bool, or what broadcasts to it."""
        if self.anchor == "random":
            shape = bits.shape[0], bits.shape[1]
            words = random_words(view.seed, shape, self.block, Purpose.ANCHOR, bits.device)
            return (words & 1).bool().unsqueeze(-2)
        if self.anchor == "mean":
            return (2 * bits.sum(-2) > is_block.sum(-1, keepdim=True)).unsqueeze(-2)
        if self.anchor == "alternating":
            return torch.arange(self.block, device=bits.device) % 2 == 1
        return torch.tensor([self.anchor == "ones"], device=bits.device)


@dataclass(frozen=True)
class Area:
    """The tokens of each row that may go, in blocks of P from the first on; the last may be short.

    slots       [L, H_kv, NB * P] int64: which slot stands at each place; those that may not go come after the others
    is_token    [L, H_kv, NB, P] bool: false at places beyond the row's tokens
    num_tokens  [L, H_kv] int64
    num_slots   n: the places from there on are padding
    """

    slots: Tensor
    is_token: Tensor
    num_tokens: Tensor
    num_slots: int

    @classmethod
    def of(cls, outside: Tensor, block: int) -> Area:
        """outside: [L, H_kv, n] bool, slots that are no such tokens"""
        num_slots = outside.shape[-1]
        slots = outside.to(torch.uint8).sort(dim=-1, stable=True).indices
        missing = -num_slots % block
        slots = torch.cat([slots, slots.new_zeros(*slots.shape[:-1], missing)], dim=-1)
        num_tokens = (~outside).sum(-1)
        is_token = torch.arange(slots.shape[-1], device=slots.device) < num_tokens.unsqueeze(-1)
        return cls(slots, is_token.unflatten(-1, (-1, block)), num_tokens, num_slots)

    def to_blocks(self, scores: Tensor) -> Tensor:
        """scores [L, H_kv, n] -> [L, H_kv, NB, P]; meaningless beyond the row's tokens."""
        return scores.gather(-1, self.slots).unflatten(-1, self.is_token.shape[-2:])

    def fill(self, values: Tensor, fill: float) -> Tensor:
        return values.masked_fill(~self.is_token, fill)

    def to_slots(self, blocks: Tensor) -> Tensor:
        """Chosen blocks [L, H_kv, NB] bool -> their tokens [L, H_kv, n] bool."""
        chosen = (blocks.unsqueeze(-1) & self.is_token).flatten(-2)
        num_slots = self.num_slots
        found = torch.zeros(*chosen.shape[:-1], num_slots, dtype=torch.bool, device=chosen.device)
        return found.scatter_(-1, self.slots[..., :num_slots], chosen[..., :num_slots])


def rescued(distances: Tensor, evicted: Tensor, num_rescued: Tensor) -> Tensor:
    """Which blocks to rescue: [..., NB] bool.

    distances    [..., NB] integers, of the block's bits to the anchor
    evicted      [..., NB] bool: blocks that are to be evicted
    num_rescued  [...] int64; more than there are means all
    """
    furthest = distances.new_full((), torch.iinfo(distances.dtype).max)
    order = torch.where(evicted, distances, furthest).sort(dim=-1, stable=True).indices
    place = torch.empty_like(order)
    place.scatter_(-1, order, torch.arange(order.shape[-1], device=order.device).expand_as(order).contiguous())
    step = (evicted.sum(-1) // num_rescued.clamp(min=1)).clamp(min=1).unsqueeze(-1)
    return evicted & (place % step == 0) & (place // step < num_rescued.unsqueeze(-1))
