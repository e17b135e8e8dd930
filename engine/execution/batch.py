"""StepPlan -> ForwardBatch: the one place where integers of the scheduler become tensors of the model."""

from __future__ import annotations

from collections.abc import Sequence

import torch

import kernels
from engine.execution.rows import RowTable, StepTensors
from engine.execution.speculation import lay_out_trees, write_drafts
from engine.execution.transfers import to_device
from engine.models.batch import ForwardBatch
from engine.scheduling.plan import Chunk


def build_batch(chunks: Sequence[Chunk], rows: RowTable, num_kv_heads: int, device: torch.device) -> ForwardBatch:
    """One ragged batch of all chunks: T = sum of their tokens, R = their number."""
    write_drafts(chunks, rows)
    found = rows.gather(chunks)
    host = tensors = found.tensors
    parents = lay_out_trees(chunks, host)
    if device.type != "cpu":
        tensors = StepTensors(*(to_device(tensor, device) for tensor in host))
    return ForwardBatch(
        token_ids=tensors.token_ids,
        positions=tensors.positions,
        slots=tensors.slots,
        cu_seqlens_q=tensors.cu_seqlens_q,
        seq_lens=tensors.seq_lens,
        block_table=rows.block_table([chunk.row for chunk in chunks], found.max_seq_len),
        max_seqlen_q=found.max_seqlen_q,
        attention_plan=kernels.plan_attention(
            host.cu_seqlens_q, host.seq_lens, num_kv_heads=num_kv_heads, device=device, parents=parents
        ),
    )
