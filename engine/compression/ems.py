"""Evict then merge: keep the tokens of the highest global or local score, merge look-alikes into them, evict the rest.

Source: Li et al. 2024, arXiv:2412.08521. The paper's exact formulas were not available to us. Decided:
  global  g_k = attention received from all queries, divided by how many queries saw k
  local   l_k = the same over the last `window` queries
  score   max(g_k / mean(g), l_k / mean(l)), per kv head: a token stays that is important in either sense
  classes the best `budget` tokens, the last `window` among them, are the centres. The best `merge_share` of the others
          each join the centre with the most similar key (cosine), if that is at least `similarity`; what does not, and
          the rest, goes to the class that is dropped (the paper's zero class)
  merge   keys and values of a class become their means
Keys are compared and averaged as they are stored, with RoPE: only neighbours or true repetitions are similar enough.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from engine.compression.base import CompactionView, Evidence, Keep
from engine.compression.options import Once, option
from engine.compression.registry import Hook, register
from engine.compression.scoring import ScoringPolicy, indices, newest, window_weights

MOST_SIMILARITIES = 1 << 24  # held at a time: 64 MiB of float32


@register("ems", needs=(Hook.MERGE,))
@dataclass(frozen=True, kw_only=True)
class EMS(ScoringPolicy, Once):
    """Keeps what is important to all or to the last queries, and merges look-alikes into it; once, after the prompt."""

    default_budget: ClassVar[int | None] = 256

    window: int = option(32, int, "last prompt tokens: the local queries, and they stay", at_least=1, at_most=4096)
    merge_share: float = option(0.5, float, "share of the other tokens that may be merged", at_least=0, at_most=1)
    similarity: float = option(
        0.9, float, "cosine of keys from which tokens merge; above 1: never", at_least=-1, at_most=2
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.more_than("window", self.window)

    @property
    def evidence(self) -> Evidence:
        return Evidence(channels=2)

    def num_queries(self, num_prompt_tokens: int, first_point: int) -> int:
        return num_prompt_tokens

    def query_weights(self, positions: Tensor, num_prompt_tokens: int, next_point: int) -> Tensor:
        local = window_weights(positions, num_prompt_tokens - self.window, num_prompt_tokens)
        return torch.cat([torch.ones_like(local), local])

    def importance(self, view: CompactionView) -> Tensor:
        num_seeing = (view.num_tokens - view.positions).clamp(min=1)
        overall = view.scores[0] / num_seeing
        local = view.scores[1] / num_seeing.clamp(max=self.window)
        return torch.maximum(_relative(overall), _relative(local))

    def protected(self, view: CompactionView) -> Tensor:
        return newest(view, (view.num_kept - 1).clamp(1, self.window))

    def keep(self, view: CompactionView) -> Keep:
        places = self.places(view)
        num_kept, num_slots = int(view.num_kept.max()), places.shape[-1]
        first_dropped = view.num_kept.unsqueeze(-1)
        index = indices(places < first_dropped, num_kept)
        num_candidates = int(self.merge_share * (num_slots - num_kept))
        if self.similarity > 1 or num_candidates == 0:
            return Keep(index)
        is_candidate = (places >= first_dropped) & (places < first_dropped + num_candidates)
        candidates = indices(is_candidate, num_candidates)
        merge_to = torch.stack(
            [
                closest(view.keys(layer), index[layer], candidates[layer], self.similarity)
                for layer in range(index.shape[0])
            ]
        )
        return Keep(index, merge_to)


def closest(keys: Tensor, centres: Tensor, candidates: Tensor, similarity: float) -> Tensor:
    """Which centre each candidate joins: [H_kv, n] int64, a place in `centres`, or -1 for none and for all others.

    keys                 [H_kv, n, D] float32
    centres, candidates  [H_kv, K] and [H_kv, M] int64 of slots, -1 at the end
    similarity           the least cosine of keys; of two equally similar centres the earlier is joined
    """
    unit = functional.normalize(keys, dim=-1)
    depth = unit.shape[-1]
    targets = unit.gather(1, centres.clamp(min=0).unsqueeze(-1).expand(-1, -1, depth)).transpose(1, 2)  # [H_kv, D, K]
    joined = torch.full(keys.shape[:2], -1, dtype=torch.int64, device=keys.device)
    at_once = max(1, MOST_SIMILARITIES // max(1, centres.numel()))
    for part in candidates.split(at_once, dim=1):
        # a padded candidate is given the answer of a real one's slot, and writes none
        sources = unit.gather(1, part.clamp(min=0).unsqueeze(-1).expand(-1, -1, depth))
        cosines = (sources @ targets).masked_fill((centres < 0).unsqueeze(1), -torch.inf)
        best, place = cosines.max(dim=-1)
        found = (best >= similarity) & (part >= 0)
        heads = torch.arange(keys.shape[0], device=keys.device).unsqueeze(1).expand_as(part)
        joined[heads[found], part[found]] = place[found]
    return joined


def _relative(scores: Tensor) -> Tensor:
    """Divided by the mean of the row; a row of zeros stays zero."""
    return scores / scores.mean(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
