"""Kvasir's kernels: re-exports of the public operations, nothing else. See README.md."""

from __future__ import annotations

from kernels.act_and_mul import act_and_mul
from kernels.attention_logits import attention_logits
from kernels.attention_scores import attention_scores
from kernels.block_bounds import bound_scores, update_bounds
from kernels.block_copy import copy_blocks
from kernels.embedding import embedding, gather_last, gather_rows
from kernels.kv_write import kv_write, rope_kv_write
from kernels.linear import PackedLinear, pack_linear
from kernels.lora import LoraPart, LoraPlan, LoraTable, add_lora, plan_lora
from kernels.merge_attention import merge_attention, virtual_key
from kernels.moe import moe
from kernels.move_slots import move_slots
from kernels.packed_blocks import packed_attention, plan_packed_attention, seal_blocks, seal_groups, unpack_blocks
from kernels.paged_attention import fixed_decode_plan, num_decode_items, paged_attention, plan_attention
from kernels.paged_attention.plan import AttentionPlan
from kernels.rms_norm import add_rms_norm, rms_norm
from kernels.rope import apply_rope
from kernels.sampling import apply_penalties, apply_token_bitmask, greedy, log_probs_of, sample
from kernels.top_slots import top_slots

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
    "attention_logits",
    "attention_scores",
    "bound_scores",
    "copy_blocks",
    "embedding",
    "fixed_decode_plan",
    "gather_last",
    "gather_rows",
    "greedy",
    "kv_write",
    "log_probs_of",
    "merge_attention",
    "moe",
    "move_slots",
    "num_decode_items",
    "pack_linear",
    "packed_attention",
    "paged_attention",
    "plan_attention",
    "plan_lora",
    "plan_packed_attention",
    "rms_norm",
    "rope_kv_write",
    "sample",
    "seal_blocks",
    "seal_groups",
    "top_slots",
    "unpack_blocks",
    "update_bounds",
    "virtual_key",
]
