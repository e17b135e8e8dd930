"""Systems that rewrite attention, or halt tokens. Small, and only through `engine.compression.base` and the helpers of
policies.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from engine.compression.base import (
    CacheShape,
    CompactionView,
    Evidence,
    HiddenChange,
    HiddenView,
    Keep,
    Part,
    QueryView,
    Rewrite,
    VirtualPart,
)
from engine.compression.options import Budgeted, Options, option
from engine.compression.scoring import KeepsEverything
from engine.scheduling.compression import CachePlan, Realisation
from tests.compression.hook_users.selecting import best, of_groups


@dataclass(frozen=True, kw_only=True)
class ACT(KeepsEverything, Options):
    """Keys that receive much attention from all lose a part of it to the others. Which ones: from the prompt alone."""

    threshold: float = option(0.1, float, "mean attention of a sink", above=0, at_most=9)
    beta: float = option(0.4, float, "what is left of a sink's attention", at_least=0, at_most=1)

    @property
    def evidence(self) -> Evidence:
        return Evidence()

    def plan(self, num_prompt_tokens: int, shape: CacheShape) -> CachePlan:
        return replace(super().plan(num_prompt_tokens, shape), num_queries=num_prompt_tokens)

    def query_weights(self, positions: Tensor, num_prompt_tokens: int, next_point: int) -> Tensor:
        return (positions < num_prompt_tokens).float().unsqueeze(0)

    def rewrite(self, view: QueryView) -> Rewrite | None:
        assert view.scores is not None
        if view.layer < 1 or view.layer == view.num_layers - 1:
            return None
        num_kv_heads, num_scored = view.scores.shape[1:]
        num_seeing = (num_scored - torch.arange(num_scored)) * (view.queries.shape[1] // num_kv_heads)
        is_sink = view.scores[0] / num_seeing > self.threshold  # [H_kv, n of the prompt]
        is_sink[:, 0] = False  # the first key stays as it is
        slots = torch.arange(int(view.num_slots[-1]))
        is_sink = functional.pad(is_sink, (0, max(0, len(slots) - num_scored)))[:, : len(slots)]
        sinks, rest = slots.where(is_sink, -1), slots.where(~is_sink, -1)
        return Rewrite([Part(sinks.unsqueeze(0)), Part(rest.unsqueeze(0))], self.weights)

    def weights(self, lses: Tensor) -> Tensor:
        kept = self.beta * lses.softmax(0)[0]
        return torch.stack([kept, 1 - kept])


@dataclass(frozen=True, kw_only=True)
class PoD(KeepsEverything, Options):
    """Of distant tokens a layer takes its leader's attention, with values of its own; one softmax with the near."""

    acts_on_prompt: ClassVar[bool] = True
    leaders: ClassVar[dict[int, int]] = {1: 0, 3: 2}

    num_first: int = option(2, int, "first tokens, which are near to all", at_least=0, at_most=64)
    num_recent: int = option(12, int, "newest tokens, which are near", at_least=1, at_most=4096)
    leads_itself: bool = option(False, bool, "each layer is its own leader")

    def rewrite(self, view: QueryView) -> Rewrite | None:
        leader = view.layer if self.leads_itself else self.leaders.get(view.layer)
        if leader is None:
            return None
        own, slots = (view.num_slots - 1).unsqueeze(1), torch.arange(int(view.num_slots[-1]))
        is_near = (slots < self.num_first) | (slots > own - self.num_recent)  # [T, n]
        near, distant = slots.where(is_near, -1), slots.where(~is_near, -1)
        return Rewrite([Part(near.unsqueeze(1)), Part(distant.unsqueeze(1), layer=leader)])


@dataclass(frozen=True, kw_only=True)
class Landmark(KeepsEverything, Options):
    """The last token of each block stands for it: what it is given goes to the others of its block."""

    block: int = option(8, int, "tokens from landmark to landmark", at_least=2, at_most=64)
    num_blocks: int = option(2, int, "earlier blocks that are read", at_least=1, at_most=4096)

    def rewrite(self, view: QueryView) -> Rewrite | None:
        own = int(view.num_slots[-1]) - 1
        start, logits = own // self.block * self.block, view.logits()  # [1, H, n]
        if start == 0 or len(view.queries) > 1:
            return None
        marks = logits[..., self.block - 1 : start : self.block]  # [1, H, blocks before]
        num_kv_heads = view.keys(view.layer).shape[0]
        group = logits.shape[1] // num_kv_heads
        chosen = best(of_groups(marks, num_kv_heads), self.num_blocks)  # [1, H_kv, K]
        tokens = chosen.unsqueeze(3) * self.block + torch.arange(self.block - 1)  # [1, H_kv, K, block - 1]
        taken = marks.gather(2, chosen.repeat_interleave(group, 1)).permute(2, 0, 1)  # [K, 1, H]
        own_part = Part(torch.arange(start, own + 1).view(1, 1, -1))
        return Rewrite(
            [own_part, *[Part(one) for one in tokens.unbind(2)]],
            lambda lses: torch.cat([lses[:1], taken]).softmax(0),
        )


@dataclass(frozen=True, kw_only=True)
class CoreContext(KeepsEverything, Options):
    """CCA: groups that have left the window are read as one token each, pooled as the last of the group attends."""

    acts_on_prompt: ClassVar[bool] = True

    group: int = option(4, int, "tokens of a group", at_least=1, at_most=64)
    window: int = option(16, int, "newest tokens, read as they are", at_least=1, at_most=4096)
    drops: bool = option(False, bool, "blocks that have left the window are given back, in the prompt, too")

    def plan(self, num_prompt_tokens: int, shape: CacheShape) -> CachePlan:
        size = shape.block_size
        kept = -(-(self.window + self.group) // size) * size
        if not self.drops:
            return super().plan(num_prompt_tokens, shape)
        return CachePlan(self.name, Realisation.BLOCKS, kept + size, size, (kept,))

    def keep(self, view: CompactionView) -> Keep:
        slots = torch.arange(view.positions.shape[2])[-int(view.num_kept.max()) :]
        return Keep(slots.expand(*view.positions.shape[:2], -1))

    def rewrite(self, view: QueryView) -> Rewrite:
        keys, values = view.keys(view.layer), view.values(view.layer)  # [H_kv, n, D]
        cores = view.memory.get(view.layer, (keys[:, :0], values[:, :0]))
        own = view.num_slots - 1
        for query, slot, position in zip(view.queries.float(), own.tolist(), view.positions.tolist(), strict=True):
            if (position + 1) % self.group == 0:
                members = slice(slot + 1 - self.group, slot + 1)
                pair = pooled(query, keys[:, members], values[:, members], view.scale)
                cores = tuple(torch.cat([old, new], 1) for old, new in zip(cores, pair, strict=True))
        view.memory[view.layer] = cores
        num_cores = (view.positions + 1 - self.window).clamp_min(0) // self.group  # that each query reads
        slots = torch.arange(int(view.num_slots[-1]))
        first = num_cores * self.group - (view.positions - own)  # slot of the first token that is read as it is
        exact = slots.where(slots >= first.unsqueeze(1), -1)
        size = len(view.queries), -1, -1, -1
        is_read = torch.arange(cores[0].shape[1]) < num_cores.view(-1, 1, 1)  # [T, 1, m]
        bias = torch.zeros(is_read.shape).masked_fill(~is_read, -torch.inf).expand(-1, keys.shape[0], -1)
        return Rewrite([Part(exact.unsqueeze(1)), VirtualPart(*[core.expand(size) for core in cores], bias)])


def pooled(query: Tensor, keys: Tensor, values: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """query [H, D], keys and values [H_kv, g, D] -> [H_kv, 1, D] each, by the mean attention of a kv head's queries."""
    weights = (query.unflatten(0, (len(keys), -1)) @ keys.transpose(1, 2) * scale).softmax(-1).mean(1, keepdim=True)
    return weights @ keys, weights @ values


@dataclass(frozen=True, kw_only=True)
class QuickSilver(KeepsEverything, Options):
    """A token whose state hardly changes from layer to layer stops: no keys, no values, nothing added from there on."""

    acts_on_prompt: ClassVar[bool] = True

    threshold: float = option(0.0, float, "change of a state, as a share of it, below which it stops", at_least=0)
    first: int = option(1, int, "layer before which nothing stops", at_least=0, at_most=64)

    def on_hidden(self, view: HiddenView) -> HiddenChange | None:
        before = view.memory.get("before")
        view.memory["before"] = view.hidden.clone()
        if before is None or view.layer < max(1, self.first):
            return None
        change = (view.hidden - before).norm(dim=1) / before.norm(dim=1)
        return HiddenChange(active=change >= self.threshold)


@dataclass(frozen=True, kw_only=True)
class Steering(KeepsEverything, Budgeted):
    """Replaces hidden states: what fusing tokens takes, and steering."""

    factor: float = option(1.0, float, "what the state before layer 2 is multiplied by", above=0)

    def on_hidden(self, view: HiddenView) -> HiddenChange | None:
        is_prompt = bool((view.positions < view.num_prompt_tokens).any())
        return None if is_prompt or view.layer != 2 else HiddenChange(hidden=view.hidden * self.factor)
