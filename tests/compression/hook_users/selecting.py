"""Systems that select what is read. Small, and only through `engine.compression.base` and the helpers of policies."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from engine.compression.base import CacheShape, HiddenView, QueryView, SameAs, Selection
from engine.compression.options import Budgeted, option
from engine.compression.scoring import KeepsEverything, protect, top_k
from engine.scheduling.compression import CachePlan


def best(scores: Tensor, count: int) -> Tensor:
    """The highest of scores [..., n], where they are more than -inf."""
    index = top_k(scores, min(count, scores.shape[-1]))
    return index.masked_fill(scores.gather(-1, index.clamp_min(0)) == -torch.inf, -1)


def of_groups(logits: Tensor, num_kv_heads: int) -> Tensor:
    """[T, H, n] -> [T, H_kv, n]: the largest over the query heads of a group."""
    return logits.unflatten(1, (num_kv_heads, -1)).amax(2)


@dataclass(frozen=True, kw_only=True)
class QuestByHook(KeepsEverything, Budgeted):
    """Quest: blocks with the largest bounds, by the newest block and `budget`; the first layers are dense."""

    num_dense_layers: int = option(1, int, "first layers, which read everything", at_least=0, at_most=64)

    def select(self, view: QueryView) -> Selection | None:
        count = -(-int(view.num_slots[-1]) // view.block_size)
        num_read = max(3, self.budget_for(view.num_prompt_tokens) // view.block_size)
        if view.layer < self.num_dense_layers or count <= num_read:
            return None
        keys = view.keys(view.layer)  # [H_kv, n, D]
        padding = (0, 0, 0, count * view.block_size - keys.shape[1])
        low, high = (
            functional.pad(keys, padding, value=fill).unflatten(1, (count, -1)) for fill in (torch.inf, -torch.inf)
        )
        q = view.queries.float().unflatten(1, (keys.shape[0], -1))  # [T, H_kv, G, D]
        bounds = torch.einsum("thgd,hbd->thgb", q.clamp(min=0), high.amax(2))
        bounds += torch.einsum("thgd,hbd->thgb", q.clamp(max=0), low.amin(2))
        newest = torch.arange(count) == count - 1
        return Selection(top_k(protect(bounds.amax(2), newest), num_read), of_blocks=True)


@dataclass(frozen=True, kw_only=True)
class TidalDecode(KeepsEverything, Budgeted):
    """One layer reads everything and selects, later ones read what it selected; so again from `correction` on."""

    first: int = option(1, int, "layer that selects", at_least=0, at_most=64)
    correction: int = option(9, int, "layer that selects again", at_least=0, at_most=64)
    by_memory: bool = option(False, bool, "later layers select the same list themselves")

    def select(self, view: QueryView) -> Selection | SameAs | None:
        if view.layer < self.first:
            return None
        if view.layer not in (self.first, self.correction):
            if self.by_memory:
                return Selection(view.memory["list"])
            return SameAs(self.first if view.layer < self.correction else self.correction)
        logits = of_groups(view.logits(), view.keys(view.layer).shape[0])
        index = view.memory["list"] = best(logits, self.budget_for(view.num_prompt_tokens))
        return Selection(index, is_for_later=True)


@dataclass(frozen=True, kw_only=True)
class TokenSelect(KeepsEverything, Budgeted):
    """All heads vote, in the prompt, too; a query like the one before reads what that read."""

    acts_on_prompt: ClassVar[bool] = True

    num_first: int = option(2, int, "first tokens, always read", at_least=0, at_most=64)
    num_recent: int = option(4, int, "newest tokens, always read", at_least=0, at_most=64)
    similarity: float = option(0.9, float, "cosine of queries from which a list is used again", at_most=2)

    def select(self, view: QueryView) -> Selection:
        own, slots = (view.num_slots - 1).unsqueeze(1), torch.arange(int(view.num_slots[-1]))
        query, known = view.queries.flatten(), view.memory.get(view.layer)
        if (
            known is not None
            and len(view.queries) == 1
            and torch.cosine_similarity(query, known[0], 0) >= self.similarity
        ):
            index = known[1]
        else:
            votes = (view.logits() / view.scale).softmax(-1).sum(1)  # [T, n]
            votes = votes.masked_fill(slots > own, -torch.inf)
            index = best(votes, self.budget_for(view.num_prompt_tokens)).unsqueeze(1)
        if len(view.queries) == 1:
            view.memory[view.layer] = query.clone(), index
        always = (slots < self.num_first) | (slots > own - self.num_recent)  # [T, n]
        return Selection(torch.cat([index, slots.where(always, -1).unsqueeze(1)], dim=2))


@dataclass(frozen=True, kw_only=True)
class DoubleSparsity(KeepsEverything, Budgeted):
    """Exact attention to the tokens with the largest logits over a few channels, which were calibrated."""

    channels: ClassVar[Tensor]  # [L, H_kv, D], those that matter most first

    share: int = option(4, int, "one channel of so many is looked at", at_least=1, at_most=64)

    def select(self, view: QueryView) -> Selection | None:
        if view.layer < 1:
            return None
        chosen = self.channels[view.layer, :, : self.channels.shape[2] // self.share]
        logits = of_groups(view.logits(chosen), len(chosen))
        return Selection(best(logits, self.budget_for(view.num_prompt_tokens)))


@dataclass(frozen=True, kw_only=True)
class TokenButler(KeepsEverything, Budgeted):
    """What enters layer 0 tells which tokens matter in all layers; here by a fixed linear predictor."""

    maps: ClassVar[tuple[Tensor, Tensor]]  # [M, L * H_kv * D'], of queries and keys
    num_layers: ClassVar[int]
    num_kv_heads: ClassVar[int]

    def plan(self, num_prompt_tokens: int, shape: CacheShape) -> CachePlan:
        return replace(super().plan(num_prompt_tokens, shape), num_queries=num_prompt_tokens)

    def on_hidden(self, view: HiddenView) -> None:
        if view.layer == 0:
            query, key = (
                (view.hidden @ part).unflatten(1, (self.num_layers, self.num_kv_heads, -1)) for part in self.maps
            )
            view.memory["keys"] = torch.cat([view.memory.get("keys", key[:0]), key])
            view.memory["queries"] = query

    def select(self, view: QueryView) -> Selection | None:
        if view.layer == 0:
            return None
        keys, queries = view.memory["keys"][:, view.layer], view.memory["queries"][:, view.layer]  # [n | T, H_kv, D']
        assert len(keys) == int(view.num_slots[-1]), "one entry for each token, whatever was guessed between"
        return Selection(best(torch.einsum("thd,nhd->thn", queries, keys), self.budget_for(view.num_prompt_tokens)))
