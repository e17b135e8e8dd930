"""The wall of the models: what they see of a step, and what they can be asked. No requests, no policies.

Shape letters: T tokens, R rows (requests in the step), NB blocks, L layers, H_kv key/value heads, BS block size,
D head_dim, MB blocks per row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from kernels import AttentionPlan, LoraPlan
from kernels.decoder_step import PackedTokens


class SeenHidden(NamedTuple):
    """What became of hidden states between two layers.

    changed   [n] int64, tokens whose states have been overwritten
    halted    [T] bool: their states stay as they are from here on; None: as after the layer before
    """

    changed: Tensor | None = None
    halted: Tensor | None = None


class AttentionHook(Protocol):
    """Attention of a batch whose rows differ in how their caches are kept."""

    def attend(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, *, scale: float, window: int, soft_cap: float,
        sinks: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """q [T, H, D], k [T, H_kv, D], v [T, H_kv, Dv], rotated. Writes keys and values to the cache, then attends:
        [T, H, Dv].
        """

    def packed(self) -> Sequence[PackedTokens] | None:
        """What `attend` does with the batch's own tables, if that is all but for these packed tokens; None if not."""


class WriteHook(Protocol):
    """Sees keys and values of a batch as they are made."""

    def on_kv(self, layer: int, q: Tensor, unrotated: Tensor, k: Tensor, v: Tensor) -> None:
        """q [T, H, D] and k [T, H_kv, D], rotated; the keys before that; v [T, H_kv, Dv]. All to be read only, and k, v
        and q may be overwritten afterwards.
        """


class HiddenHook(Protocol):
    """Looks at the hidden states of a batch between layers, and may change or halt some of them."""

    def on_hidden(self, layer: int, hidden: Tensor) -> SeenHidden:
        """hidden [T, C]: the residual stream before the layer, which may be written to."""


@dataclass(frozen=True)
class ForwardBatch:
    """One step on the device. Row r's tokens are [cu_seqlens_q[r], cu_seqlens_q[r + 1])."""

    token_ids: Tensor  # [T] int64
    positions: Tensor  # [T] int64 logical positions, for RoPE
    slots: Tensor  # [T] int64 cache slots to write; -1 writes nothing
    cu_seqlens_q: Tensor  # [R + 1] int32
    seq_lens: Tensor  # [R] int32 slots that the row's last query sees
    block_table: Tensor  # [R, MB] int32
    max_seqlen_q: int
    attention_plan: AttentionPlan  # of the same rows and this model's number of kv heads
    adapters: LoraPlan | None = None  # low-rank adapters of the tokens; None where no token has one
    attention: AttentionHook | None = None  # who attends, where some rows do it in their own way; None: all alike
    writes: WriteHook | None = None  # who sees keys and values as they are made; only with `attention`
    watcher: HiddenHook | None = None  # who looks at hidden states between layers, where somebody does


@dataclass(frozen=True)
class KVSpec:
    """What one token costs in the cache: per layer, `num_kv_heads` keys and as many values."""

    num_layers: int
    num_kv_heads: int
    head_dim: int
    head_dim_v: int
    windows: tuple[int, ...] = ()  # of the layers' attention, 0 for none; empty: no layer has one


class KVCache:
    """The two pools. Layer l is a strided view of each, so that a block is one contiguous run over all layers."""

    def __init__(self, k: Tensor, v: Tensor) -> None:
        """k, v: [NB, L, H_kv, BS, D] contiguous."""
        self.k = k
        self.v = v
        self._layers = [(k[:, layer], v[:, layer]) for layer in range(k.shape[1])]

    def layer(self, layer: int) -> tuple[Tensor, Tensor]:
        """Views [NB, H_kv, BS, D] of the keys and values of one layer."""
        return self._layers[layer]


class Model(Protocol):
    """A causal language model over a paged cache, native or adapted. Called from one thread."""

    spec: KVSpec
    architecture: str
    vocab_size: int  # token ids must be below
    logits_size: int  # columns of the logits
    max_model_len: int  # positions must be below
    device: torch.device
    dtype: torch.dtype  # of hidden states
    dtype_name: str  # of the weights, for people
    weight_bytes: int
    eos_token_ids: tuple[int, ...]
    generation_defaults: dict[str, Any]  # from generation_config.json, in the names of SamplingParams
    shows_hidden: bool  # a batch may have a watcher and show what it writes, and it is a `KeyWriter`

    def forward(self, batch: ForwardBatch, cache: KVCache) -> Tensor:
        """Hidden states [T, C] of the batch; its keys and values are in `cache` afterwards."""

    def forward_layers(self, batch: ForwardBatch, cache: KVCache, num_layers: int) -> None:
        """The first layers of `forward` alone: their keys and values are in `cache` afterwards. More may run."""

    def logits(self, hidden: Tensor) -> Tensor:
        """[n, C] -> [n, logits_size] fp32, scaled and soft-capped as the model does."""

    def description(self) -> dict[str, str]:
        """What was loaded, for the start-up report."""


class KeyWriter(Protocol):
    """A model that takes keys and values of tokens that it has not computed."""

    def write_kv(self, layer: int, k: Tensor, v: Tensor, positions: Tensor, slots: Tensor, cache: KVCache) -> None:
        """Keys [T, H_kv, D], which it rotates, and values [T, H_kv, Dv], into their slots."""
