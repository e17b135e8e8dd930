"""The plug-in interface of cache policies. A policy is two pure halves; the engine owns blocks, tables and counts.

The integer half (`plan`) says when the cache shrinks and to what size, the tensor half which tokens stay. What a policy
does while layers attend, beside or instead of that, are hooks of their own, at the end; one has those that it needs.
Shape letters: C evidence channels, L layers, H query heads, H_kv kv heads, T new tokens, n slots present, K slots kept
or read, D head_dim, M hidden size, P parts.
"""

from __future__ import annotations

from collections.abc import Callable, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

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
    num_packed  per class of the plan, how many slots are to be packed in that way, of every head
    side        of a layer: [H_kv, n, W], what the policy's `on_kv` has returned for the slots; None without
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
    num_packed: tuple[int, ...] = ()
    side: Callable[[int], Tensor] | None = None


@dataclass(frozen=True)
class Keep:
    """
    index     [L, H_kv, K] int64, ascending, K the largest of num_kept; -1 at the end of heads that keep fewer
    merge_to  [L, H_kv, n] int64: the survivor (0 .. K - 1) that a dropped token is merged into, -1 where it is gone.
              A survivor's key and value become the mean of its own and of those merged into it
    cls       [L, H_kv, n] uint8: how a token that `index` lacks is packed, by number of the plan's classes from 1; 0
              where it is not
    """

    index: Tensor
    merge_to: Tensor | None = None
    cls: Tensor | None = None


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


class LogitsOf(Protocol):
    """Scaled logits [T, H, n] float32 of a view's queries, -inf at slots that a query does not see."""

    def __call__(self, channels: Tensor | None = None) -> Tensor:
        """channels [H_kv, c] int64: over these channels of each kv head's keys only; None: over all."""


@dataclass(frozen=True)
class QueryView:
    """One request as it attends in a layer: a part of its prompt, or one generated token. Slots ascend in position.

    An answer for a query must not depend on the queries beside it: how a prompt is divided changes nothing.

    queries      [T, H, D], rotated
    positions    [T] int64, logical
    num_slots    [T] int64, that each query sees: the last is its own, and its key and value are there
    block_size   slots of a block: block i has slots i * block_size and so on
    scale        of the layer's logits
    scores       [C, H_kv, n'] float32: the evidence summed up so far in this layer; None without
    memory       what the policy notes for itself. What is set while a token is computed is there for its later layers
                 and for later tokens, and is gone when the token turns out to be a wrong guess. Set values, never
                 change one in place
    keys, values  of a layer: [H_kv, n, D] float32, gathered when called, for the slots that the last query sees
    logits       see there
    side         of a layer: [H_kv, n, W], what the policy's `on_kv` has returned for these slots; None without
    """

    layer: int
    num_layers: int
    queries: Tensor
    positions: Tensor
    num_slots: Tensor
    num_prompt_tokens: int
    block_size: int
    seed: int
    scale: float
    scores: Tensor | None
    memory: MutableMapping[Any, Any]
    keys: Callable[[int], Tensor]
    values: Callable[[int], Tensor]
    logits: LogitsOf
    side: Callable[[int], Tensor] | None = None


@dataclass(frozen=True)
class Selection:
    """What queries read: index [T, 1 | H_kv, K] int64 in any order, -1 for nothing; 1: alike for all kv heads.

    Slots, or with `of_blocks` numbers of blocks. The newest block as a query sees it is always read, and never what it
    does not see.

    is_for_later   this layer reads everything; the list is for layers that answer `SameAs`
    """

    index: Tensor
    of_blocks: bool = False
    is_for_later: bool = False


@dataclass(frozen=True)
class SameAs:
    """What was selected in that earlier layer for the same tokens."""

    layer: int


@dataclass(frozen=True)
class Part:
    """Softmax attention over these slots alone, index as in `Selection`; nothing is added to them.

    layer   whose queries and keys make the weights, an earlier one; None: this one. Values are of this layer
    """

    index: Tensor
    layer: int | None = None


@dataclass(frozen=True)
class VirtualPart:
    """Softmax attention over keys and values [T, H_kv, m, D] that are in no slot.

    bias   [T, H_kv, m] float32, added to their logits: log N for one that stands for N, -inf for one that is not there
    """

    keys: Tensor
    values: Tensor
    bias: Tensor


@dataclass(frozen=True)
class Rewrite:
    """Attention as a weighted sum of parts, which say all that is read.

    weights   of the parts' results: [P, T, H] float32 from the logs of their softmax denominators [P, T, H]. None: the
              softmax over these, so that all parts are one softmax
    """

    parts: Sequence[Part | VirtualPart]
    weights: Callable[[Tensor], Tensor] | None = None


class SelectingPolicy(Policy, Protocol):
    """One that chooses what is read in a layer. `acts_on_prompt` (False where it is missing): in the prompt, too, whose
    keys are then shared with nobody; otherwise generated tokens alone.
    """

    def select(self, view: QueryView) -> Selection | SameAs | None:
        """None: everything."""


class RewritingPolicy(Policy, Protocol):
    """One that changes how a layer attends; `acts_on_prompt` as above. Its evidence is summed up over the prompt."""

    def rewrite(self, view: QueryView) -> Rewrite | None:
        """None: attention is as usual, or as `select` says."""


@dataclass(frozen=True)
class HiddenView:
    """One request before a layer: tokens as in `QueryView`.

    hidden   [T, M]: the residual stream, to be read only
    active   [T] bool: not halted before
    memory   see `QueryView`
    """

    layer: int
    num_layers: int
    hidden: Tensor
    active: Tensor
    positions: Tensor
    num_prompt_tokens: int
    seed: int
    memory: MutableMapping[Any, Any]


@dataclass(frozen=True)
class HiddenChange:
    """
    active   [T] bool: the others halt. Their hidden state stays as it is up to the end, and from this layer on they
             have neither keys nor values: nobody sees them there. None: all go on
    hidden   [T, M]: goes on instead; None: as it was
    """

    active: Tensor | None = None
    hidden: Tensor | None = None


class HiddenPolicy(Policy, Protocol):
    """One that looks at hidden states between layers, always of prompts too. Only with `acts_on_prompt` may it change
    something in a prompt.
    """

    def on_hidden(self, view: HiddenView) -> HiddenChange | None:
        """Called before each layer."""
