"""What a step is asked to find out for policies: how much weight each new query has in which sums.

Knows rows and chunks. What is forgotten with time counts as it will at the next point, so that a sum is the same
however its queries come. Shape letters: C channels, L layers, H_kv kv heads, T tokens, n slots.
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
from engine.scheduling.plan import Chunk


def ask(evidence: Evidence, chunks: Sequence[Chunk], states: Mapping[int, RowState], rows: RowRange) -> Scored | None:
    """What is asked of the chunks of neighbouring rows; None where no query has a weight."""
    weights = torch.cat([_weights(states[chunk.row], chunk, evidence) for chunk in chunks], dim=1)
    if not bool(weights.any()):
        return None
    device = rows.starts.device
    before = [_before(states[chunk.row], chunk, evidence) for chunk in chunks]
    if evidence.kind != "noisy":
        return Scored(evidence.kind, rows, weights.to(device), before)
    keys = torch.tensor([key for chunk in chunks for key in _noise_keys(states[chunk.row], chunk)], dtype=torch.int64)
    temperatures = torch.cat([_temperatures(states[chunk.row], chunk) for chunk in chunks])
    return Scored(evidence.kind, rows, weights.to(device), before, keys.to(device), temperatures.to(device))


def wants(evidence: Evidence, chunk: Chunk, state: RowState) -> bool:
    """Whether a query of the chunk has a weight."""
    return bool(_weights(state, chunk, evidence).any())


def count(state: RowState, chunk: Chunk, staged: Sequence[Tensor], place: int, num_slots: int) -> None:
    """The row has what a step found out for it: of every layer [C, R, H_kv, S], of which row `place` is its.

    num_slots   that the row has after the chunk
    """
    state.scores = torch.stack([scores[:, place, :, :num_slots] for scores in staged], dim=1)
    state.num_scored = chunk.start + chunk.num_tokens
    next_point = state.next_choice(chunk.start)
    assert next_point is not None
    state.scored_for = next_point


def _positions(chunk: Chunk) -> Tensor:
    return torch.arange(chunk.start, chunk.start + chunk.num_tokens)


def _weights(state: RowState, chunk: Chunk, evidence: Evidence) -> Tensor:
    """[C, T] float32. Queries that were counted before (their token is run again) count nothing."""
    next_point = state.next_choice(chunk.start)
    assert next_point is not None
    positions = _positions(chunk)
    weights = state.policy.query_weights(positions, state.num_prompt_tokens, next_point)
    if evidence.decay != 1.0:
        # one by one: a vectorised power rounds in a way that depends on where in the vector a number stands
        weights = weights * torch.tensor([evidence.decay ** (next_point - 1 - at) for at in positions.tolist()])
    return weights * (positions >= state.num_scored)


def _before(state: RowState, chunk: Chunk, evidence: Evidence) -> Tensor | None:
    """What the row has so far, as it counts at the next point.

    So a sum does not depend on the chunks that its queries came in, nor on how many of them a draft had right.
    """
    next_point = state.next_choice(chunk.start)
    assert next_point is not None
    if state.scores is None or evidence.decay == 1.0 or next_point == state.scored_for:
        return state.scores
    return state.scores * evidence.decay ** (next_point - state.scored_for)


def _noise_keys(state: RowState, chunk: Chunk) -> list[int]:
    end = chunk.start + chunk.num_tokens
    return [noise.row_key(state.seed, 0, position, noise.Purpose.EVIDENCE) for position in range(chunk.start, end)]


def _temperatures(state: RowState, chunk: Chunk) -> Tensor:
    return cast(NoisyPolicy, state.policy).temperatures(_positions(chunk), state.num_prompt_tokens)
