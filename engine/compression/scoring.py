"""What policies that rank tokens share: their order, protection, pooling, weights of queries, counter-based noise.

Order everywhere: score descending, then position descending, so that the choice is unique and the newer of two equals
stays. Shape letters: C channels, L layers, H_kv kv heads, T queries, n slots present, K slots kept.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional

from engine import noise
from engine.compression.base import CacheShape, CompactionView, Evidence, Keep
from engine.scheduling.compression import CachePlan, Realisation
from kernels import sampling

Pooling = Literal["avg", "max"]


class ScoringPolicy(ABC):
    """A policy that keeps the tokens of the highest importance, and before them those it protects."""

    by_position: ClassVar[bool] = False  # chooses by positions alone: looks neither at attention nor at keys and values

    @property
    def evidence(self) -> Evidence | None:
        return None

    def query_weights(self, positions: Tensor, num_prompt_tokens: int, next_point: int) -> Tensor:
        return torch.zeros(1, len(positions), device=positions.device)

    def temperatures(self, positions: Tensor, num_prompt_tokens: int) -> Tensor:
        """[T] float32 of queries at positions [T], for evidence of kind "noisy"."""
        return torch.ones(len(positions), device=positions.device)

    @abstractmethod
    def importance(self, view: CompactionView) -> Tensor:
        """[L, H_kv, n] float32; what is higher stays."""

    def protected(self, view: CompactionView) -> Tensor:
        """[L, H_kv, n] bool: stays whatever its score; where there are more than may stay, the newest."""
        return torch.zeros_like(view.positions, dtype=torch.bool)

    def places(self, view: CompactionView) -> Tensor:
        """[L, H_kv, n] int64: place of every slot in the order, from 0; slots that are absent are last."""
        scores = protect(self.importance(view), self.protected(view))
        return ranks(scores.masked_fill(view.positions < 0, -torch.inf))

    def keep(self, view: CompactionView) -> Keep:
        return Keep(indices(self.places(view) < view.num_kept.unsqueeze(-1), int(view.num_kept.max())))


def ranks(scores: Tensor) -> Tensor:
    """Place of each of scores [..., n] in the order: [..., n] int64, 0 for the first. Later slots are later tokens."""
    backwards = scores.flip(-1)
    order = backwards.sort(dim=-1, descending=True, stable=True).indices
    places = torch.empty_like(order)
    places.scatter_(-1, order, torch.arange(scores.shape[-1], device=scores.device).expand_as(order).contiguous())
    return places.flip(-1)


def top_k(scores: Tensor, num_kept: Tensor | int) -> Tensor:
    """The first num_kept in the order of scores [..., n]: [..., K] int64 ascending, K the largest num_kept.

    num_kept  an integer or [...] int64; a row that keeps fewer than K ends with -1
    """
    chosen = ranks(scores) < (num_kept if isinstance(num_kept, int) else num_kept.unsqueeze(-1))
    return indices(chosen, num_kept if isinstance(num_kept, int) else int(num_kept.max()))


def indices(chosen: Tensor, width: int) -> Tensor:
    """Where chosen [..., n] bool is true: [..., width] int64 ascending, -1 at the end."""
    width = min(width, chosen.shape[-1])
    first = (~chosen).to(torch.uint8).sort(dim=-1, stable=True).indices[..., :width]
    return first.masked_fill(~chosen.gather(-1, first), -1)


def protect(scores: Tensor, mask: Tensor) -> Tensor:
    """Lift scores above all others where mask holds. Infinity, because max + 1 is max for large float32 scores."""
    return scores.masked_fill(mask, torch.inf)


def newest(view: CompactionView, count: Tensor | int) -> Tensor:
    """[L, H_kv, n] bool: the last slots. count: an integer or [L, H_kv] int64."""
    slots = torch.arange(view.positions.shape[-1], device=view.positions.device)
    present = view.num_present.unsqueeze(-1)
    first = present - (count if isinstance(count, int) else count.unsqueeze(-1))
    return (slots >= first) & (slots < present)


def first_tokens(view: CompactionView, count: Tensor) -> Tensor:
    """[L, H_kv, n] bool: the first tokens of the prompt. count: [L, H_kv] int64"""
    return (view.positions >= 0) & (view.positions < count.unsqueeze(-1))


def share(num_kept: Tensor, part: float) -> Tensor:
    """That part of num_kept, any int64, rounded to the nearest integer; at least 1 unless the part is 0."""
    return (num_kept * part + 0.5).long().clamp(min=1 if part else 0)


def pool(scores: Tensor, kernel: int, kind: Pooling) -> Tensor:
    """Smooth scores [..., n] over `kernel` (odd) neighbours; beyond the ends are zeros ("avg") or nothing ("max")."""
    if kernel == 1:
        return scores
    rows = scores.reshape(-1, 1, scores.shape[-1])
    if kind == "avg":
        pooled = functional.avg_pool1d(rows, kernel, stride=1, padding=kernel // 2, count_include_pad=True)
    else:
        pooled = functional.max_pool1d(rows, kernel, stride=1, padding=kernel // 2)
    return pooled.reshape(scores.shape)


def window_weights(positions: Tensor, start: int, end: int) -> Tensor:
    """Weights [1, T] float32: 1 for queries at start <= position < end."""
    return ((positions >= start) & (positions < end)).float().unsqueeze(0)


def random_words(seed: int, shape: tuple[int, int], count: int, purpose: noise.Purpose, device: torch.device) -> Tensor:
    """[L, H_kv, count] int64 of 32 random bits, a function of (seed, layer, head, place) alone. shape: (L, H_kv)"""
    keys = [noise.row_key(seed, layer, head, purpose) for layer in range(shape[0]) for head in range(shape[1])]
    words = sampling.random_bits(torch.tensor(keys, dtype=torch.int64, device=device), count)
    return words.reshape(*shape, count)


class KeepsEverything:
    """The halves of a policy that never drops a token: it selects what is read, or changes the prompt."""

    name: ClassVar[str]

    @property
    def evidence(self) -> Evidence | None:
        return None

    def plan(self, num_prompt_tokens: int, shape: CacheShape) -> CachePlan:
        return CachePlan(self.name, Realisation.DENSE, None, 0, ())

    def query_weights(self, positions: Tensor, num_prompt_tokens: int, next_point: int) -> Tensor:
        return torch.zeros(1, len(positions), device=positions.device)

    def keep(self, view: CompactionView) -> Keep:
        return Keep(torch.arange(view.positions.shape[-1], device=view.positions.device).expand(view.positions.shape))
