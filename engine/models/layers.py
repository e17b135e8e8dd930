"""The parts of a decoder layer. They call kernels and know no requests; everything constant is computed at load.

Shape letters: T tokens, C hidden size, H query heads, H_kv key/value heads, D head_dim, I intermediate size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

import kernels
from engine.models.batch import ForwardBatch, KVCache
from engine.models.config import DecoderConfig

Linear = Callable[[Tensor], Tensor]  # kernels.linear.PackedLinear: [T, K] -> [T, N]
FeedForward = Callable[[Tensor], Tensor]  # [T, C] -> [T, C]


class Attention:
    """Fused q/k/v projection, norms and rotation, cache write, paged attention, output projection."""

    def __init__(
        self, config: DecoderConfig, layer: int, *, qkv: Linear, o: Linear, norms: tuple[Tensor, Tensor] | None,
        cos_sin: Tensor | None,
    ) -> None:  # fmt: skip
        """norms: weights for q and k, [D] each, or [H * D] and [H_kv * D] when config.qk_norm is "full"."""
        self.layer = layer
        self.qkv = qkv
        self.o = o
        self.cos_sin = cos_sin
        self.head_dim = config.head_dim
        self.heads = (config.num_heads, config.num_kv_heads, config.num_kv_heads)
        self.scale = config.attention_scale
        self.window = config.layers[layer].window
        self.soft_cap = config.attention_soft_cap
        self.norms = norms
        self.norm_eps = config.norm_eps
        self.norms_whole_projection = config.qk_norm == "full"
        self.clip = config.qkv_clip

    def __call__(self, x: Tensor, batch: ForwardBatch, cache: KVCache) -> Tensor:  # [T, C] -> [T, C]
        num_tokens = x.shape[0]
        qkv = self.qkv(x).view(num_tokens, -1, self.head_dim)
        q, k, v = qkv.split(self.heads, dim=1)  # [T, H | H_kv | H_kv, D], views: what follows works in place
        if self.norms is not None:
            self._normalize(q, self.norms[0])
            self._normalize(k, self.norms[1])
        if self.clip:
            qkv.clamp_(-self.clip, self.clip)
        if batch.attention is not None:
            unrotated = k if batch.writes is None else k.clone()
            if self.cos_sin is not None:
                kernels.apply_rope(q, k, batch.positions, self.cos_sin)
            if batch.writes is not None:
                batch.writes.on_kv(self.layer, q, unrotated, k, v)
            options: dict[str, Any] = {"scale": self.scale, "window": self.window, "soft_cap": self.soft_cap}
            return self.o(batch.attention.attend(self.layer, q, k, v, **options).view(num_tokens, -1))
        k_cache, v_cache = cache.layer(self.layer)
        if self.cos_sin is None:
            kernels.kv_write(k, v, k_cache, v_cache, batch.slots)
        else:
            kernels.rope_kv_write(q, k, v, batch.positions, self.cos_sin, k_cache, v_cache, batch.slots)
        out = kernels.paged_attention(
            q,
            k_cache,
            v_cache,
            batch.block_table,
            batch.seq_lens,
            batch.cu_seqlens_q,
            scale=self.scale,
            window=self.window,
            soft_cap=self.soft_cap,
            plan=batch.attention_plan,
        )
        return self.o(out.view(num_tokens, -1))

    def write(self, k: Tensor, v: Tensor, positions: Tensor, slots: Tensor, cache: KVCache) -> None:
        """See `engine.models.batch.KeyWriter`."""
        k = k.contiguous()
        if self.cos_sin is not None:
            k = k.clone()
            kernels.apply_rope(k.clone(), k, positions, self.cos_sin)
        kernels.kv_write(k, v.contiguous(), *cache.layer(self.layer), slots)

    def _normalize(self, heads: Tensor, weight: Tensor) -> None:  # [T, H, D], in place
        rows = heads.flatten(1) if self.norms_whole_projection else heads
        kernels.rms_norm(rows, weight, self.norm_eps, out=rows)


class GatedMlp:
    """down(activation(gate(x)) * up(x)), gate and up in one matrix."""

    def __init__(self, activation: str, *, gate_up: Linear, down: Linear) -> None:
        self.activation = activation
        self.gate_up = gate_up
        self.down = down

    def __call__(self, x: Tensor) -> Tensor:  # [T, C] -> [T, C]
        return self.down(kernels.act_and_mul(self.gate_up(x), self.activation))


class DecoderLayer:
    """Attention and feed-forward around the residual stream, whichever norms the family has.

    A norm that follows an addition is fused with it, so each layer also applies the norm that opens the next one.
    """

    def __init__(
        self, config: DecoderConfig, *, attention: Attention, feed_forward: FeedForward, norms: dict[str, Tensor],
        next_norm: Tensor | None,
    ) -> None:  # fmt: skip
        """norms: by the names of engine.models.layout; next_norm: of the next layer's attention, or the final one."""
        self.attention = attention
        self.feed_forward = feed_forward
        self.attention_out_norm = norms.get("attention_out_norm")
        self.mlp_norm = norms.get("mlp_norm")
        self.mlp_out_norm = norms.get("mlp_out_norm")
        self.next_norm = next_norm
        self.norm_eps = config.norm_eps
        self.residual_multiplier = config.residual_multiplier

    def __call__(self, x: Tensor, residual: Tensor, batch: ForwardBatch, cache: KVCache) -> Tensor:
        """x [T, C] is the normed input; residual [T, C] is updated in place. Returns the next layer's x."""
        out = self.attention(x, batch, cache)
        x = self._add(out, residual, self.attention_out_norm, self.mlp_norm)
        out = self.feed_forward(x)
        return self._add(out, residual, self.mlp_out_norm, self.next_norm)

    def _add(self, out: Tensor, residual: Tensor, out_norm: Tensor | None, next_norm: Tensor | None) -> Tensor:
        if out_norm is not None:
            kernels.rms_norm(out, out_norm, self.norm_eps, out=out)
        if self.residual_multiplier != 1.0:
            out.mul_(self.residual_multiplier)
        if next_norm is None:
            return residual.add_(out)
        return kernels.add_rms_norm(out, residual, next_norm, self.norm_eps)
