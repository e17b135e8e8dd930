"""Log-probabilities as the values that leave the runner. Always of the raw distribution: before bias, penalties, masks
and temperature, and under the target model, however a token was guessed.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

import kernels
from engine.types import TokenLogprob


def token_logprobs(logits: Tensor, ids: Tensor, top_n: Sequence[int]) -> list[TokenLogprob]:
    """One entry per row of raw logits [M, V] float32, of token ids[m] ([M] int64) with the top_n[m] best tokens.

    A row that is not finite gets NaN and rank 0.
    """
    found = kernels.log_probs_of(logits, ids, max(top_n, default=0))
    columns = zip(ids.tolist(), *(part.tolist() for part in found), top_n, strict=True)
    return [
        TokenLogprob(token_id, log_prob, rank, top_ids[:n], top_log_probs[:n])
        for token_id, log_prob, rank, top_ids, top_log_probs, n in columns
    ]


def prompt_logprobs(logits: Tensor, next_ids: Tensor, top_n: int) -> list[TokenLogprob]:
    """Entries for prompt tokens: logits [n, V] float32 of n positions, next_ids [n] int64 the tokens after them."""
    return token_logprobs(logits, next_ids, [top_n] * logits.shape[0])
