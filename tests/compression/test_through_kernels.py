"""The hand-checked matrix through real attention: what kernels sum up with a policy's weights is what it scores by."""

from __future__ import annotations

import torch
from torch import Tensor

import kernels
from engine.compression import registry
from tests.compression.views import F6, accumulated, kept, view_of

HEAD_DIM, BLOCK_SIZE = 16, 16
SCALE = HEAD_DIM**-0.5


def summed(policy, chunk_sizes: list[int]) -> Tensor:
    """[C, 6]: keys are one-hot vectors, so that a query's logits can be the logarithms of F6."""
    evidence = policy.evidence
    cache = torch.zeros(1, 1, BLOCK_SIZE, HEAD_DIM)
    queries = torch.zeros(6, 1, HEAD_DIM)
    queries[:, 0, :6] = F6.clamp(min=1e-30).log().float() / SCALE
    table = torch.zeros(1, 1, dtype=torch.int32)
    total, start = torch.zeros(evidence.channels, 6), 0
    for length in chunk_sizes:
        end = start + length
        cache[0, 0, start:end, start:end] = torch.eye(length)
        seq_lens = torch.tensor([end], dtype=torch.int32)
        starts = torch.tensor([0, length], dtype=torch.int32)
        q = queries[start:end].contiguous()
        _, lse = kernels.paged_attention(q, cache, cache, table, seq_lens, starts, scale=SCALE, return_lse=True)
        positions = torch.arange(start, end)
        weights = policy.query_weights(positions, 6, 6) * evidence.decay ** (end - 1 - positions).float()
        scores = kernels.attention_scores(
            q, cache, table, seq_lens, starts, lse, weights.contiguous(), scale=SCALE, kind=evidence.kind
        )
        total *= evidence.decay**length
        total[:, :end] += scores[:, 0, 0]
        start = end
    return total


def test_scores_of_real_attention_are_those_of_the_matrix():
    choices = {
        "h2o": ({"budget": 3, "recent_share": 1 / 3}, [0, 2, 5]),
        "a2sf": ({"budget": 3, "num_recent": 1, "alpha": 0.25}, [0, 3, 5]),
        "tova": ({"budget": 3}, [0, 3, 5]),
        "snapkv": ({"budget": 3, "window": 2, "kernel": 3}, [1, 4, 5]),
        "scissorhands": ({"budget": 3, "window": 6, "num_recent": 1}, [0, 4, 5]),
        "ems": ({"budget": 3, "window": 2}, [0, 4, 5]),
    }
    for name, (options, expected) in choices.items():
        policy = registry.create(name, options)
        for chunks in ([6], [4, 1, 1]):
            found = summed(policy, chunks)
            torch.testing.assert_close(found, accumulated(policy, F6, chunks=chunks), atol=1e-5, rtol=0)
            assert kept(policy, view_of(found, 3)) == expected, name
