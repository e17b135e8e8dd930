"""Mixture-of-experts architectures: config.json -> DecoderConfig. Torch-free.

Defaults for absent keys are those of the architecture's configuration class in transformers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from engine.models.config import DecoderConfig, LayerConfig, MoEConfig
from engine.models.family import Family, base, layer_count, sliding_layers, window_of
from engine.models.fields import Fields

MAX_EXPERTS = 4096


def _mixtral(fields: Fields) -> DecoderConfig:
    window = window_of(fields)
    return base(
        fields,
        eps=1e-5,
        theta=1_000_000.0,
        layers=(LayerConfig(window=window, is_moe=True),) * layer_count(fields),
        moe=_moe(
            fields,
            num_experts=8,
            top_k=2,
            intermediate_size=fields.integer("intermediate_size"),
            normalize_weights=True,
            block_name="block_sparse_moe",
            projection_names=("w1", "w3", "w2"),
        ),
    )


def _qwen2_moe(fields: Fields) -> DecoderConfig:
    """A gated shared expert beside the routed ones. With windows, even layers below max_window_layers slide."""
    window = window_of(fields, 4096) if fields.flag("use_sliding_window", False) else 0
    last = fields.integer("max_window_layers", 28, low=0)
    slides = sliding_layers(fields, lambda layer: layer % 2 == 0 and layer < last)
    return base(
        fields,
        qkv_bias=fields.flag("qkv_bias", True),
        layers=_sparse_layers(fields, [window if s else 0 for s in slides]),
        moe=_moe(
            fields,
            num_experts=60,
            top_k=4,
            intermediate_size=fields.integer("moe_intermediate_size", 1408),
            normalize_weights=fields.flag("norm_topk_prob", False),
            shared_intermediate_size=fields.integer("shared_expert_intermediate_size", 5632),
        ),
    )


def _qwen3_moe(fields: Fields) -> DecoderConfig:
    window = window_of(fields, 4096) if fields.flag("use_sliding_window", False) else 0
    bias = fields.flag("attention_bias", False)
    return base(
        fields,
        qkv_bias=bias,
        o_bias=bias,
        qk_norm="head",
        layers=_sparse_layers(fields, [window] * layer_count(fields)),
        moe=_moe(
            fields,
            num_experts=128,
            top_k=8,
            intermediate_size=fields.integer("moe_intermediate_size", 768),
            normalize_weights=fields.flag("norm_topk_prob", False),
        ),
    )


def _olmoe(fields: Fields) -> DecoderConfig:
    bias = fields.flag("attention_bias", False)
    return base(
        fields,
        eps=1e-5,
        qkv_bias=bias,
        o_bias=bias,
        qk_norm="full",
        qkv_clip=fields.number("clip_qkv", 0.0),
        layers=(LayerConfig(is_moe=True),) * layer_count(fields),
        moe=_moe(
            fields,
            num_experts=64,
            top_k=8,
            intermediate_size=fields.integer("intermediate_size"),
            normalize_weights=fields.flag("norm_topk_prob", False),
        ),
    )


def _moe(fields: Fields, *, num_experts: int, top_k: int, **values: Any) -> MoEConfig:
    count = fields.integer("num_experts", fields.integer("num_local_experts", num_experts), high=MAX_EXPERTS)
    return MoEConfig(
        num_experts=count, top_k=fields.integer("num_experts_per_tok", min(top_k, count), high=count), **values
    )


def _sparse_layers(fields: Fields, windows: Sequence[int]) -> tuple[LayerConfig, ...]:
    """Every decoder_sparse_step-th layer is a mixture of experts, except those in mlp_only_layers."""
    step = fields.integer("decoder_sparse_step", 1)
    dense = set(fields.integers("mlp_only_layers"))
    return tuple(
        LayerConfig(window=window, is_moe=layer not in dense and (layer + 1) % step == 0)
        for layer, window in enumerate(windows)
    )


FAMILIES: dict[str, Family] = {
    "MixtralForCausalLM": _mixtral,
    "Qwen2MoeForCausalLM": _qwen2_moe,
    "Qwen3MoeForCausalLM": _qwen3_moe,
    "OlmoeForCausalLM": _olmoe,
}
