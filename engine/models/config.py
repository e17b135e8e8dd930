"""Everything in which the supported decoder families differ, as frozen values. Knows no files and no tensors.

`engine.models.hf_config` fills it from a Hugging Face config.json; `engine.models.decoder` runs it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Activation = Literal["silu", "gelu", "gelu_tanh"]
NormStyle = Literal["pre", "post", "sandwich"]
QKNorm = Literal["none", "head", "full"]
RopeKind = Literal["default", "linear", "dynamic", "llama3", "yarn", "longrope"]


@dataclass(frozen=True, kw_only=True)
class RopeConfig:
    """One rotary position embedding; fields below `factor` belong to the kinds named beside them."""

    kind: RopeKind = "default"
    theta: float
    rot_dim: int  # leading dimensions of a head that rotate; the rest pass through
    max_positions: int  # max_position_embeddings of the checkpoint
    factor: float | None = None
    original_max_positions: int = 0  # length of pre-training: llama3, yarn, longrope
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0  # llama3
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0  # yarn
    mscale: float = 0.0  # yarn
    mscale_all_dim: float = 0.0  # yarn
    truncate: bool = True  # yarn: round the bounds of the ramp outward
    attention_factor: float | None = None  # yarn, longrope: scale of cos and sin; None is the kind's own formula
    short_factor: tuple[float, ...] = ()  # longrope
    long_factor: tuple[float, ...] = ()  # longrope


@dataclass(frozen=True, kw_only=True)
class MoEConfig:
    """A mixture-of-experts feed-forward."""

    num_experts: int
    top_k: int
    intermediate_size: int
    normalize_weights: bool  # scale the chosen experts' probabilities to sum to one
    shared_intermediate_size: int = 0  # 0: no shared expert; else one with a sigmoid gate
    # Names in the checkpoint.
    block_name: str = "mlp"
    projection_names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True, kw_only=True)
class LayerConfig:
    """What may differ from layer to layer."""

    window: int = 0  # tokens that a query sees, itself included; 0 is all
    rope: int | None = 0  # index into DecoderConfig.ropes; None: no position embedding
    is_moe: bool = False


@dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """A decoder-only transformer: embedding, layers of attention and feed-forward, final norm, head."""

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_positions: int  # context that the checkpoint declares
    layers: tuple[LayerConfig, ...]
    ropes: tuple[RopeConfig, ...]
    moe: MoEConfig | None = None
    activation: Activation = "silu"
    norm_eps: float = 1e-6
    # pre: norm before each block; post: norm on each block's output; sandwich: both.
    norm_style: NormStyle = "pre"
    norm_offset: float = 0.0  # added to every norm weight at load (Gemma stores w - 1)
    qk_norm: QKNorm = "none"  # RMSNorm on q and k: per head, or over the whole projection
    qkv_clip: float = 0.0  # clamp q, k and v to +- this; 0 is off
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    tied_embeddings: bool = False
    attention_scale: float
    attention_soft_cap: float = 0.0
    logits_soft_cap: float = 0.0
    logits_divisor: float = 1.0
    embedding_multiplier: float = 1.0
    residual_multiplier: float = 1.0
    # Checkpoints that store q, k, v (and gate, up) as one matrix.
    fused_qkv: bool = False
    fused_gate_up: bool = False
    dtype: str | None = None  # what the checkpoint declares: float32, bfloat16, float16
    eos_token_ids: tuple[int, ...] = ()

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    @property
    def position_limit(self) -> int:
        """Longest context that the position embedding is made for; linear and dynamic scaling stretch it."""
        stretch = max(r.factor or 1.0 if r.kind in ("linear", "dynamic") else 1.0 for r in self.ropes)
        return int(self.max_positions * stretch)
