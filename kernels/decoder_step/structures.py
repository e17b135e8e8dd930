"""The structures of step.h and chain.cpp, as Python fills them in. Addresses are good as long as what they point to."""

from __future__ import annotations

import ctypes
from typing import Any

from kernels.linear.packed import PackedLinear
from kernels.native import FLOAT, INT, PTR
from kernels.packed_blocks.cpp_impl import Packed


class Structure(ctypes.Structure):
    """Field by field a structure of the native code."""

    def __init__(self, **fields: Any) -> None:
        super().__init__(**fields)


class Linear(Structure):
    _fields_ = (("weights", PTR), ("bias", PTR), *((name, INT) for name in ("dtype", "depth", "columns")))


class Layer(Structure):
    _fields_ = (
        *((name, Linear) for name in ("qkv", "o", "gate_up", "down")),
        *((name, PTR) for name in ("q_norm", "k_norm", "attention_out_norm", "mlp_norm", "mlp_out_norm", "next_norm")),
        ("cos_sin", PTR),
        ("rot_dim", INT),
        ("window", INT),
    )


class Embedding(Structure):
    _fields_ = (("rows", PTR), *((name, INT) for name in ("dtype", "stride", "is_packed", "vocab_size")))


class Program(Structure):
    _fields_ = (
        ("layers", PTR),
        ("first_norm", PTR),
        ("embedding", Embedding),
        *((name, INT) for name in ("num_layers", "hidden_size", "intermediate_size", "num_heads", "num_kv_heads")),
        *((name, INT) for name in ("head_dim", "activation", "norms_projection")),
        *((name, FLOAT) for name in ("norm_eps", "attention_scale", "attention_soft_cap", "qkv_clip")),
        *((name, FLOAT) for name in ("residual_multiplier", "embedding_multiplier")),
    )


class Pool(Structure):
    _fields_ = (
        ("k", PTR),
        ("v", PTR),
        *((name, INT) for name in ("dtype", "block_size", "stride_block", "stride_layer", "stride_head")),
    )


class PackedPart(Structure):
    _fields_ = (
        ("tokens", Packed),
        *((name, PTR) for name in ("table", "lens", "cu_seqlens_q", "items", "merges")),
        *((name, INT) for name in ("first_token", "num_tokens", "table_stride", "num_items", "num_merges")),
        *((name, INT) for name in ("num_partials", "rotated")),
    )


class Batch(Structure):
    _fields_ = (
        *((name, PTR) for name in ("token_ids", "positions", "slots", "cu_seqlens_q", "seq_lens", "block_table")),
        ("paths", PTR),
        *((name, INT) for name in ("table_stride", "paths_stride", "num_tokens", "num_rows", "num_threads")),
        ("parts", PTR),
        ("num_parts", INT),
        ("hidden", PTR),
    )


class Head(Structure):
    _fields_ = (("linear", Linear), ("num_logits", INT), *((name, FLOAT) for name in ("divisor", "soft_cap")))


class Chains(Structure):
    _fields_ = (
        *((name, PTR) for name in ("token_ids", "lengths", "starts", "block_table", "depths", "keys")),
        *((name, PTR) for name in ("temperatures", "min_log_probs", "tokens", "log_probs", "counts")),
        *((name, INT) for name in ("table_stride", "depth_stride", "num_rows", "num_threads")),
    )


def linear_of(linear: PackedLinear) -> Linear:
    panels = linear.panels
    assert panels is not None, "the caller has looked"
    return Linear(
        weights=panels.weights,
        bias=panels.bias,
        dtype=panels.dtype_code,
        depth=linear.in_features,
        columns=linear.out_features,
    )
