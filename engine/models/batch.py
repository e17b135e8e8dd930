"""The wall of the models: what they see of a step, and what they can be asked. No requests, no policies.

Shape letters: T tokens, R rows (requests in the step), NB blocks, L layers, H_kv key/value heads, BS block size,
D head_dim, MB blocks per row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from kernels import AttentionPlan, LoraPlan


class AttentionHook(Protocol):
    """Attention of a batch whose rows differ in how their caches are kept."""

    def attend(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, *, scale: float, window: int, soft_cap: float,
        sinks: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """q [T, H, D], k [T, H_kv, D], v [T, H_kv, Dv], rotated. Writes keys and values to the cache, then attends:
        [T, H, Dv].
        """


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

    def forward(self, batch: ForwardBatch, cache: KVCache) -> Tensor:
        """Hidden states [T, C] of the batch; its keys and values are in `cache` afterwards."""

    def forward_layers(self, batch: ForwardBatch, cache: KVCache, num_layers: int) -> None:
        """The first layers of `forward` alone: their keys and values are in `cache` afterwards. More may run."""

    def logits(self, hidden: Tensor) -> Tensor:
        """[n, C] -> [n, logits_size] fp32, scaled and soft-capped as the model does."""

    def description(self) -> dict[str, str]:
        """What was loaded, for the start-up report."""
