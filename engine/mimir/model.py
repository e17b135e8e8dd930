"""Mimir's decoder for training: Llama-shaped, small, and exactly convertible to `LlamaForCausalLM`.

Knows tensors only; tokenizer, corpus and checkpoints live elsewhere. Shape letters: B rows, T tokens, C width,
H query heads, H_kv key/value heads, D head_dim, V vocabulary.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Rope = tuple[Tensor, Tensor]  # cosines and sines, each [T, D]


@dataclass(frozen=True)
class ModelShape:
    """Sizes of one model; `max_positions` is what the exported config promises."""

    num_layers: int
    width: int
    num_heads: int
    num_kv_heads: int
    mlp_width: int
    head_dim: int = 32
    vocab_size: int = 4096
    rope_theta: float = 1_000_000.0
    norm_eps: float = 1e-5
    max_positions: int = 4096


class Attention(nn.Module):
    """Grouped-query causal attention with rotary positions (half-split form, as in Llama checkpoints)."""

    def __init__(self, shape: ModelShape) -> None:
        super().__init__()
        self.shape = shape
        self.q_proj = nn.Linear(shape.width, shape.num_heads * shape.head_dim, bias=False)
        self.k_proj = nn.Linear(shape.width, shape.num_kv_heads * shape.head_dim, bias=False)
        self.v_proj = nn.Linear(shape.width, shape.num_kv_heads * shape.head_dim, bias=False)
        self.o_proj = nn.Linear(shape.num_heads * shape.head_dim, shape.width, bias=False)

    def forward(self, x: Tensor, rope: Rope, asked: Tensor | None = None) -> Tensor:
        """`x` [B, T, C] to [B, T, C], or to [B, S, C] for the query positions `asked` [B, S] only."""
        k, v = self._heads(self.k_proj(x)), self._heads(self.v_proj(x))
        k = rotate(k, *rope)
        if asked is None:
            q = rotate(self._heads(self.q_proj(x)), *rope)
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        else:
            q = rotate(self._heads(self.q_proj(rows_at(x, asked))), *(table[asked][:, None] for table in rope))
            seen = torch.arange(x.shape[1], device=x.device) <= asked[:, None, :, None]  # [B, 1, S, T]
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, enable_gqa=True)
        return self.o_proj(out.transpose(1, 2).flatten(2))

    def _heads(self, x: Tensor) -> Tensor:  # [B, T, H * D] -> [B, H, T, D]
        return x.unflatten(-1, (-1, self.shape.head_dim)).transpose(1, 2)


class Mlp(nn.Module):
    """SwiGLU feed-forward; with `in_bf16` its matrix products round to bf16, which training on CPU profits from.

    Queries and keys are left out: the previous-token heads have logits so large that rounding them changes gradients.
    """

    def __init__(self, shape: ModelShape) -> None:
        super().__init__()
        self.in_bf16 = False
        self.gate_proj = nn.Linear(shape.width, shape.mlp_width, bias=False)
        self.up_proj = nn.Linear(shape.width, shape.mlp_width, bias=False)
        self.down_proj = nn.Linear(shape.mlp_width, shape.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:  # [B, T, C] -> [B, T, C]
        if not self.in_bf16:
            return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        with torch.autocast(x.device.type, torch.bfloat16):
            return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    """Pre-norm attention and feed-forward, each added to the residual stream."""

    def __init__(self, shape: ModelShape) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(shape.width, eps=shape.norm_eps)
        self.self_attn = Attention(shape)
        self.post_attention_layernorm = nn.RMSNorm(shape.width, eps=shape.norm_eps)
        self.mlp = Mlp(shape)

    def forward(self, x: Tensor, rope: Rope, asked: Tensor | None = None) -> Tensor:
        """`x` [B, T, C] to [B, T, C], or to [B, S, C] for the positions `asked` [B, S] only."""
        found = self.self_attn(self.input_layernorm(x), rope, asked)
        x = (x if asked is None else rows_at(x, asked)) + found
        return x + self.mlp(self.post_attention_layernorm(x))


class Mimir(nn.Module):
    """Token ids to hidden states; `logits` applies the tied output embedding where the caller needs it.

    Parameter names equal those of `transformers`' `LlamaModel`, so a state dict needs only the prefix `model.`.
    """

    def __init__(self, shape: ModelShape) -> None:
        super().__init__()
        self.shape = shape
        self.embed_tokens = nn.Embedding(shape.vocab_size, shape.width)
        self.layers = nn.ModuleList(Layer(shape) for _ in range(shape.num_layers))
        self.norm = nn.RMSNorm(shape.width, eps=shape.norm_eps)
        self._rope: Rope | None = None
        self._init_weights()

    def _init_weights(self) -> None:
        nn.init.normal_(self.embed_tokens.weight, std=0.05)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=module.in_features**-0.5)
        for layer in self.blocks():
            for proj in (layer.self_attn.o_proj, layer.mlp.down_proj):
                proj.weight.data.mul_((2 * self.shape.num_layers) ** -0.5)

    def blocks(self) -> list[Layer]:
        """The layers, by their own type."""
        return [layer for layer in self.layers if isinstance(layer, Layer)]

    def forward(self, ids: Tensor, asked: Tensor | None = None) -> Tensor:
        """`ids` [B, T] int64 to hidden states [B, T, C], or [B, S, C] at the positions `asked` [B, S] only.

        The last layer then skips everything but keys and values elsewhere, a quarter of the work of four layers.
        """
        x = self.embed_tokens(ids)
        rope = self._rope_tables(ids.shape[1], x.device)
        for layer in self.layers[:-1]:
            x = layer(x, rope)
        return self.norm(self.layers[-1](x, rope, asked))

    def logits(self, hidden: Tensor) -> Tensor:  # [..., C] -> [..., V]
        return F.linear(hidden, self.embed_tokens.weight)

    def _rope_tables(self, length: int, device: torch.device) -> Rope:
        if self._rope is None or self._rope[0].shape[0] < length or self._rope[0].device != device:
            half = torch.arange(0, self.shape.head_dim, 2, dtype=torch.float32, device=device) / self.shape.head_dim
            angles = torch.outer(torch.arange(length, device=device).float(), self.shape.rope_theta**-half)
            angles = torch.cat((angles, angles), dim=-1)  # [T, D]
            self._rope = angles.cos(), angles.sin()
        return self._rope[0][:length], self._rope[1][:length]


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions (RoFormer, eq. 34) for `x` [B, H, T, D], tables [T, D] or [B, 1, T, D]; keeps the dtype of x."""
    first, second = x.chunk(2, dim=-1)
    return (x * cos + torch.cat((-second, first), dim=-1) * sin).to(x.dtype)


def rows_at(x: Tensor, positions: Tensor) -> Tensor:
    """`x` [B, T, C] at `positions` [B, S], as [B, S, C]."""
    return x.gather(1, positions[..., None].expand(-1, -1, x.shape[-1]))
