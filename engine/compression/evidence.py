"""What a step is asked to find out for policies: how much weight each new query has in which sums.

Knows rows and chunks. Shape letters: C channels, L layers, H_kv kv heads, T tokens, n slots.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import cast

import torch
from torch import Tensor

from engine import noise
from engine.compression.attend import RowRange, Scored
from engine.compression.base import Evidence, NoisyPolicy
from engine.compression.state import RowState
from engine.models.batch import ForwardBatch
from engine.scheduling.plan import Chunk


def ask(
    evidence: Evidence, chunks: Sequence[Chunk], states: Mapping[int, RowState], first: int, batch: ForwardBatch
) -> Scored | None:
    """What is asked of neighbouring rows of the batch, from row `first`; None where no query has a weight."""
    weights = torch.cat([_weights(states[chunk.row], chunk, evidence) for chunk in chunks], dim=1)
    if not bool(weights.any()):
        return None
    device = batch.slots.device
    rows = RowRange.of(batch, first, len(chunks))
    before = [_before(states[chunk.row], chunk, evidence) for chunk in chunks]
    if evidence.kind != "noisy":
        return Scored(evidence.kind, rows, weights.to(device), before)
    keys = torch.tensor([key for chunk in chunks for key in _noise_keys(states[chunk.row], chunk)], dtype=torch.int64)
    temperatures = torch.cat([_temperatures(states[chunk.row], chunk) for chunk in chunks])
    return Scored(evidence.kind, rows, weights.to(device), before, keys.to(device), temperatures.to(device))


def _positions(chunk: Chunk) -> Tensor:
    return torch.arange(chunk.start, chunk.start + chunk.num_tokens)


def _weights(state: RowState, chunk: Chunk, evidence: Evidence) -> Tensor:
    """[C, T] float32. Queries that were counted before (their token is run again) count nothing."""
    next_point = state.plan.next_point(chunk.start)
    assert next_point is not None
    positions = _positions(chunk)
    weights = state.policy.query_weights(positions, state.num_prompt_tokens, next_point)
    if evidence.decay != 1.0:
        weights = weights * evidence.decay ** (chunk.start + chunk.num_tokens - 1 - positions).float()
    return weights * (positions >= state.num_scored)


def _before(state: RowState, chunk: Chunk, evidence: Evidence) -> Tensor | None:
    """What the row has so far, as it counts after the chunk."""
    if state.scores is None or evidence.decay == 1.0:
        return state.scores
    return state.scores * evidence.decay ** (chunk.start + chunk.num_tokens - max(state.num_scored, chunk.start))


def _noise_keys(state: RowState, chunk: Chunk) -> list[int]:
    end = chunk.start + chunk.num_tokens
    return [noise.row_key(state.seed, 0, position, noise.Purpose.EVIDENCE) for position in range(chunk.start, end)]


def _temperatures(state: RowState, chunk: Chunk) -> Tensor:
    return cast(NoisyPolicy, state.policy).temperatures(_positions(chunk), state.num_prompt_tokens)
