"""What it costs to verify guesses: a forward of rows that bring a tree of 1 to 64 nodes, over that of one token."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

import kernels
from loadtest.gpu.models import LLAMA_8B, build_model, shape_of
from loadtest.gpu.record import Run

if TYPE_CHECKING:
    from engine.models.batch import ForwardBatch, KVCache
    from engine.models.decoder import Decoder

NODES = (0, 1, 2, 4, 8, 16, 32, 64)
ROWS = (1, 4, 16, 64)
CONTEXT = 1024
BLOCK_SIZE = 16


def measure_speculation(run: Run) -> None:
    """Llama-3.1-8B's shape; the table of docs/speculation.md for this device. Launches are replayed."""
    from engine.execution import kv_cache

    model = build_model(run, shape_of(run, LLAMA_8B), run.size(4096, 512))
    context = run.size(CONTEXT, 64)
    dtype = torch.float32 if run.device.type == "cpu" else model.dtype
    blocks = (context + max(NODES)) // BLOCK_SIZE + 1
    cache = kv_cache.allocate(model.spec, max(ROWS) * blocks + 1, BLOCK_SIZE, dtype, run.device)
    for rows in ROWS[: run.size(4, 2)]:
        costs: dict[int, float] = {}
        for nodes in NODES[: run.size(8, 4)]:
            if not run.has_time(f"{rows} rows", 2):
                return
            with run.case(f"{rows} rows, {nodes} nodes"):
                batch = _batch(run, model, rows, context, nodes, blocks)
                costs[nodes] = run.ms(lambda batch=batch: _step(model, batch, cache), in_graph=True)  # type: ignore[misc]
        if 0 in costs:
            ratios = {str(nodes): ms / costs[0] for nodes, ms in costs.items()}
            run.record(f"{rows} rows", one_token_ms=costs[0], cost_by_nodes=ratios)


@torch.inference_mode()
def _step(model: Decoder, batch: ForwardBatch, cache: KVCache) -> Tensor:
    return model.logits(model.forward(batch, cache))


def _batch(run: Run, model: Decoder, rows: int, context: int, nodes: int, blocks: int) -> ForwardBatch:
    """`rows` rows of `context` cached slots, each with one token and a binary tree of guesses behind it."""
    from engine.models.batch import ForwardBatch

    queries = 1 + nodes
    parents = [-1, *((node - 1) // 2 for node in range(1, queries))]
    depths = [0]
    for parent in parents[1:]:
        depths.append(depths[parent] + 1)
    table = torch.arange(1, rows * blocks + 1, dtype=torch.int32).view(rows, blocks)
    places = context + torch.arange(queries)
    slots = table[:, places // BLOCK_SIZE].long() * BLOCK_SIZE + places % BLOCK_SIZE
    starts = [row * queries for row in range(rows + 1)]
    lens = [context + queries] * rows
    device = run.device
    return ForwardBatch(
        token_ids=torch.randint(10, model.vocab_size, (rows * queries,)).to(device),
        positions=(context + torch.tensor(depths)).repeat(rows).to(device),
        slots=slots.flatten().to(device),
        cu_seqlens_q=torch.tensor(starts, dtype=torch.int32).to(device),
        seq_lens=torch.tensor(lens, dtype=torch.int32).to(device),
        block_table=table.to(device),
        max_seqlen_q=queries,
        attention_plan=kernels.plan_attention(
            starts, lens, num_kv_heads=model.spec.num_kv_heads, device=device, parents=parents * rows if nodes else None
        ),
    )
