"""Dense architectures: config.json -> DecoderConfig. Torch-free.

Defaults for absent keys are those of the architecture's configuration class in transformers.
"""

from __future__ import annotations

from typing import Any

from engine.errors import ConfigError
from engine.models.config import DecoderConfig, LayerConfig
from engine.models.family import Family, base, layer_count, sliding_layers, window_of, windowed_layers
from engine.models.fields import Fields
from engine.models.rope_config import parse_rope_section


def _llama(fields: Fields) -> DecoderConfig:
    """Llama 2 and 3, SmolLM 1 and 2."""
    bias = fields.flag("attention_bias", False)
    return base(fields, qkv_bias=bias, o_bias=bias, mlp_bias=fields.flag("mlp_bias", False))


def _mistral(fields: Fields) -> DecoderConfig:
    return base(fields, window=window_of(fields, 4096))


def _qwen2(fields: Fields) -> DecoderConfig:
    """Qwen 2 and 2.5: the layers from max_window_layers on slide, where windows are used at all."""
    return base(fields, qkv_bias=True, layers=_qwen_layers(fields))


def _qwen3(fields: Fields) -> DecoderConfig:
    bias = fields.flag("attention_bias", False)
    return base(fields, head_dim=128, qkv_bias=bias, o_bias=bias, qk_norm="head", layers=_qwen_layers(fields))


def _qwen_layers(fields: Fields) -> tuple[LayerConfig, ...]:
    window = window_of(fields, 4096) if fields.flag("use_sliding_window", False) else 0
    first = fields.integer("max_window_layers", 28, low=0)
    return windowed_layers(fields, window, lambda layer: layer >= first)


def _phi3(fields: Fields) -> DecoderConfig:
    """Phi-3, 3.5 and Phi-4 mini. The first checkpoints call their longrope scaling "su" or "yarn"."""
    return base(
        fields,
        eps=1e-5,
        window=window_of(fields),
        rope_names={"yarn": "longrope"},
        fused_qkv=True,
        fused_gate_up=True,
    )


def _gemma2(fields: Fields) -> DecoderConfig:
    """Even layers slide; scores and logits are soft-capped."""
    return base(
        fields,
        layers=windowed_layers(fields, window_of(fields, 4096), lambda layer: layer % 2 == 0),
        attention_soft_cap=_soft_cap(fields, "attn_logit_softcapping", 50.0),
        logits_soft_cap=_soft_cap(fields, "final_logit_softcapping", 30.0),
        **_gemma_common(fields),
    )


def _gemma3(fields: Fields) -> DecoderConfig:
    """Five sliding layers, then a full one; the two kinds have their own RoPE. Text only."""
    head_dim = fields.integer("head_dim", 256, high=65536)
    period = fields.integer("sliding_window_pattern", 6)
    slides = sliding_layers(fields, lambda layer: (layer + 1) % period != 0)
    window = window_of(fields, 4096)
    if "rope_parameters" in fields:
        per_type = fields.section("rope_parameters")
        full, local = per_type.section("full_attention"), per_type.section("sliding_attention")
    else:
        full, local = fields.section("rope_scaling"), Fields({}, "sliding_attention")
    local_theta = fields.number("rope_local_base_freq", 10_000.0, low=1.0)
    local_fields = Fields({**fields.raw, "rope_theta": local_theta}, fields.where)
    return base(
        fields,
        layers=tuple(LayerConfig(window=window if s else 0, rope=int(s)) for s in slides),
        ropes=(
            parse_rope_section(full, fields, head_dim, theta=1_000_000.0),
            parse_rope_section(local, local_fields, head_dim, theta=local_theta),
        ),
        qk_norm="head",
        logits_soft_cap=_soft_cap(fields, "final_logit_softcapping", 0.0),
        **_gemma_common(fields),
    )


def _gemma_common(fields: Fields) -> dict[str, Any]:
    _refuse_bidirectional(fields)
    bias = fields.flag("attention_bias", False)
    return {
        "head_dim": 256,
        "tied": True,
        "activation": fields.text("hidden_activation", "gelu_pytorch_tanh"),
        "norm_style": "sandwich",
        "norm_offset": 1.0,
        "embedding_multiplier": fields.integer("hidden_size") ** 0.5,
        "attention_scale": fields.number("query_pre_attn_scalar", 256.0, low=1e-6) ** -0.5,
        "qkv_bias": bias,
        "o_bias": bias,
    }


def _soft_cap(fields: Fields, name: str, default: float) -> float:
    """An explicit null is off."""
    return 0.0 if name in fields.raw and fields.raw[name] is None else fields.number(name, default)


def _smollm3(fields: Fields) -> DecoderConfig:
    """Every fourth layer has no position embedding; `no_rope_layers` holds 1 where a layer does rotate."""
    num_layers = layer_count(fields)
    interval = fields.integer("no_rope_layer_interval", 4)
    rotates = fields.integers("no_rope_layers") or tuple(int((i + 1) % interval != 0) for i in range(num_layers))
    window = window_of(fields) if fields.flag("use_sliding_window", False) else 0
    slides = sliding_layers(fields, lambda layer: layer < len(rotates) and not rotates[layer])
    bias = fields.flag("attention_bias", False)
    return base(
        fields,
        theta=2_000_000.0,
        tied=True,
        layers=tuple(
            LayerConfig(window=window if s else 0, rope=0 if r else None) for s, r in zip(slides, rotates, strict=False)
        ),
        qkv_bias=bias,
        o_bias=bias,
        mlp_bias=fields.flag("mlp_bias", False),
    )


def _olmo2(fields: Fields) -> DecoderConfig:
    bias = fields.flag("attention_bias", False)
    return base(fields, eps=1e-5, norm_style="post", qk_norm="full", qkv_bias=bias, o_bias=bias)


def _granite(fields: Fields) -> DecoderConfig:
    bias = fields.flag("attention_bias", False)
    return base(
        fields,
        qkv_bias=bias,
        o_bias=bias,
        mlp_bias=fields.flag("mlp_bias", False),
        attention_scale=fields.number("attention_multiplier", 1.0),
        embedding_multiplier=fields.number("embedding_multiplier", 1.0),
        residual_multiplier=fields.number("residual_multiplier", 1.0),
        logits_divisor=fields.number("logits_scaling", 1.0, low=1e-6),
    )


def _refuse_bidirectional(fields: Fields) -> None:
    if fields.flag("use_bidirectional_attention", False):
        raise ConfigError("use_bidirectional_attention is set: this is an encoder, it cannot generate text")


FAMILIES: dict[str, Family] = {
    "LlamaForCausalLM": _llama,
    "MistralForCausalLM": _mistral,
    "Qwen2ForCausalLM": _qwen2,
    "Qwen3ForCausalLM": _qwen3,
    "Phi3ForCausalLM": _phi3,
    "Gemma2ForCausalLM": _gemma2,
    "Gemma3ForCausalLM": _gemma3,
    "SmolLM3ForCausalLM": _smollm3,
    "Olmo2ForCausalLM": _olmo2,
    "GraniteForCausalLM": _granite,
}
