"""The plug-in interface of cache policies. A policy is two pure halves; the engine owns blocks, tables and counts.

The integer half (`plan`) says when the cache shrinks and to what size, the tensor half which tokens stay. Shape
letters: C evidence channels, L layers, H_kv kv heads, T new tokens, n slots present, K slots kept, D head_dim.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from engine.scheduling.compression import CachePlan

EvidenceKind = Literal["sum", "count", "noisy"]


@dataclass(frozen=True, slots=True)
class CacheShape:
    """Sizes of the model's cache, for the integer half."""

    num_layers: int
    num_kv_heads: int
    head_dim: int
    head_dim_v: int
    block_size: int
    dtype: torch.dtype = torch.float32  # of keys and values


@dataclass(frozen=True, slots=True)
class Evidence:
    """How attention is summed up for a policy, per slot of each layer and kv head.

    kind      sum of probabilities; "count": how often below 1 / (visible keys); "noisy": of softmax((x + g) / tau) with
              Gumbel noise g
    channels  independent accumulators, each with query weights of its own
    decay     what was accumulated is multiplied by this for every token computed after it
    resets    the accumulators start again at 0 after each compaction
    """

    kind: EvidenceKind = "sum"
    channels: int = 1
    decay: float = 1.0
    resets: bool = False


@dataclass(frozen=True)
class CompactionView:
    """One request at a compaction point, all layers at once. Slots are in ascending order of position.

    scores      [C, L, H_kv, n] float32: the accumulated evidence, zeros (C = 1) without
    positions   [L, H_kv, n] int64, logical
    num_present [L, H_kv] int64, slots that a head has; beyond them its positions are -1 and scores and keys are noise.
                Only heads that have been cut to different sizes before differ
    num_kept    [L, H_kv] int64, each at least 1 and at most num_present
    num_tokens  computed so far, which is the point
    seed        of the request; randomness comes from counters keyed by it (`engine.noise`) and from nothing else
    keys, values  of a layer: [H_kv, n, D] float32, gathered when called
    """

    scores: Tensor
    positions: Tensor
    num_present: Tensor
    num_kept: Tensor
    num_prompt_tokens: int
    num_tokens: int
    seed: int
    keys: Callable[[int], Tensor]
    values: Callable[[int], Tensor]


@dataclass(frozen=True)
class Keep:
    """
    index     [L, H_kv, K] int64, ascending, K the largest of num_kept; -1 at the end of heads that keep fewer
    merge_to  [L, H_kv, n] int64: the survivor (0 .. K - 1) that a dropped token is merged into, -1 where it is gone.
              A survivor's key and value become the mean of its own and of those merged into it
    """

    index: Tensor
    merge_to: Tensor | None = None


class Policy(Protocol):
    """A frozen dataclass whose fields are the options that a request may give; it raises ConfigError on bad ones."""

    @property
    def evidence(self) -> Evidence | None:
        """None: scores are not needed."""

    def plan(self, num_prompt_tokens: int, shape: CacheShape) -> CachePlan:
        """The integer half, once per request."""

    def query_weights(self, positions: Tensor, num_prompt_tokens: int, next_point: int) -> Tensor:
        """Weights of new queries in the evidence, for rows that still have a point before them.

        positions   [T] int64, of the chunk's tokens
        next_point  the next compaction, after the last of them at the earliest
        Returns [C, T] float32; all zero means that this chunk needs no pass.
        """

    def keep(self, view: CompactionView) -> Keep:
        """Which tokens stay: a pure function of the view."""


class NoisyPolicy(Policy, Protocol):
    """One whose evidence is "noisy"."""

    def temperatures(self, positions: Tensor, num_prompt_tokens: int) -> Tensor:
        """tau [T] float32 of new queries, with arguments as in `query_weights`."""
