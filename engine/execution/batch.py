"""StepPlan -> ForwardBatch: the one place where integers of the scheduler become tensors of the model."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

import kernels
from engine.execution.rows import RowTable
from engine.models.batch import ForwardBatch
from engine.scheduling.plan import Chunk


def build_batch(chunks: Sequence[Chunk], rows: RowTable, num_kv_heads: int, device: torch.device) -> ForwardBatch:
    """One ragged batch of all chunks: T = sum of their tokens, R = their number."""
    token_ids, positions, slots, lengths = rows.gather(chunks)
    cu_seqlens_q = np.zeros(len(chunks) + 1, dtype=np.int32)
    np.cumsum(lengths, out=cu_seqlens_q[1:])
    seq_lens = np.fromiter((chunk.start + chunk.num_tokens for chunk in chunks), np.int32, len(chunks))
    table = rows.block_table([chunk.row for chunk in chunks], int(seq_lens.max()))
    return ForwardBatch(
        token_ids=torch.from_numpy(token_ids).to(device, non_blocking=True),
        positions=torch.from_numpy(positions).to(device, non_blocking=True),
        slots=torch.from_numpy(slots).to(device, non_blocking=True),
        cu_seqlens_q=torch.from_numpy(cu_seqlens_q).to(device, non_blocking=True),
        seq_lens=torch.from_numpy(seq_lens).to(device, non_blocking=True),
        block_table=table.to(device, non_blocking=True),
        max_seqlen_q=int(lengths.max()),
        attention_plan=kernels.plan_attention(
            cu_seqlens_q.tolist(), seq_lens.tolist(), num_kv_heads=num_kv_heads, device=device
        ),
    )
