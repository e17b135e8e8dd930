"""From a decoder's layers to one native call for all of them, where their kind allows it. Decided once, at load."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from torch import Tensor

from engine.models.config import DecoderConfig
from engine.models.layers import DecoderLayer, GatedMlp
from kernels.decoder_step import DecoderStep, DecoderWeights, LayerWeights, obstacle
from kernels.linear import PackedLinear

logger = logging.getLogger(__name__)


def native_step(
    config: DecoderConfig, embedding: Tensor | PackedLinear, first_norm: Tensor | None, layers: Sequence[DecoderLayer]
) -> DecoderStep | None:
    """The call, or None (with a line in the log that says why) where the layers must run operation by operation."""
    if (embedding.device.type != "cpu") if isinstance(embedding, Tensor) else (embedding.panels is None):
        return None  # another device, or no native library, which has been told
    weights = [_layer_weights(layer) for layer in layers]
    dense = [layer for layer in weights if layer is not None]
    if len(dense) < len(weights):
        logger.info("layers run operation by operation: some are mixtures of experts")
        return None
    decoder = DecoderWeights(
        embedding=embedding,
        first_norm=first_norm,
        layers=dense,
        num_heads=config.num_heads,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        activation=config.activation,
        norm_eps=config.norm_eps,
        norms_whole_projection=config.qk_norm == "full",
        qkv_clip=config.qkv_clip,
        attention_scale=config.attention_scale,
        attention_soft_cap=config.attention_soft_cap,
        residual_multiplier=config.residual_multiplier,
        embedding_multiplier=config.embedding_multiplier,
    )
    problem = obstacle(decoder)
    if problem is not None:
        logger.info("layers run operation by operation: %s", problem)
        return None
    logger.info("a step of all %d layers is one native call", len(layers))
    return DecoderStep(decoder)


def _layer_weights(layer: DecoderLayer) -> LayerWeights | None:
    """None for a layer whose feed-forward is not one gated MLP, or whose products are not plain packed weights."""
    attention, mlp = layer.attention, layer.feed_forward
    if not isinstance(mlp, GatedMlp):
        return None
    linears = (attention.qkv, attention.o, mlp.gate_up, mlp.down)
    qkv, o, gate_up, down = (linear if isinstance(linear, PackedLinear) else None for linear in linears)
    if qkv is None or o is None or gate_up is None or down is None:
        return None
    q_norm, k_norm = attention.norms or (None, None)
    return LayerWeights(
        qkv=qkv,
        o=o,
        gate_up=gate_up,
        down=down,
        q_norm=q_norm,
        k_norm=k_norm,
        attention_out_norm=layer.attention_out_norm,
        mlp_norm=layer.mlp_norm,
        mlp_out_norm=layer.mlp_out_norm,
        next_norm=layer.next_norm,
        cos_sin=attention.cos_sin,
        window=attention.window,
    )
