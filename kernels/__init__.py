"""Kvasir's kernels: re-exports of the public operations, nothing else. See README.md."""

from __future__ import annotations

from kernels.act_and_mul import act_and_mul
from kernels.block_copy import copy_blocks
from kernels.embedding import embedding, gather_rows
from kernels.kv_write import kv_write, rope_kv_write
from kernels.linear import PackedLinear, pack_linear
from kernels.lora import LoraPart, LoraPlan, LoraTable, add_lora, plan_lora
from kernels.paged_attention import paged_attention, plan_attention
from kernels.paged_attention.plan import AttentionPlan
from kernels.rms_norm import add_rms_norm, rms_norm
from kernels.rope import apply_rope
from kernels.sampling import apply_penalties, apply_token_bitmask, greedy, log_probs_of, sample

__all__ = [
    "AttentionPlan",
    "LoraPart",
    "LoraPlan",
    "LoraTable",
    "PackedLinear",
    "act_and_mul",
    "add_lora",
    "add_rms_norm",
    "apply_penalties",
    "apply_rope",
    "apply_token_bitmask",
    "copy_blocks",
    "embedding",
    "gather_rows",
    "greedy",
    "kv_write",
    "log_probs_of",
    "pack_linear",
    "paged_attention",
    "plan_attention",
    "plan_lora",
    "rms_norm",
    "rope_kv_write",
    "sample",
]
