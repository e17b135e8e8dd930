"""The definition of sampling: slow, obvious, in Python integers and double precision, one row at a time.

Noise: Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"), counter-based, so a draw
depends on the row's key and the token id alone. The choice is the Gumbel-max rule: argmax(z + g) with g standard
Gumbel is distributed as softmax(z).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kernels.sampling.types import GREEDY_BELOW, LogProbs

_M0, _M1 = 0xD2511F53, 0xCD9E8D57
_W0, _W1 = 0x9E3779B9, 0xBB67AE85
_MASK = 0xFFFFFFFF


def philox4x32(key: int, counter: int) -> tuple[int, int, int, int]:
    """Four 32-bit words for a 64-bit key and the counter (counter, 0, 0, 0)."""
    k0, k1 = key & _MASK, (key >> 32) & _MASK
    c0, c1, c2, c3 = counter, 0, 0, 0
    for _ in range(10):
        p0, p1 = _M0 * c0, _M1 * c2
        c0, c1, c2, c3 = (p1 >> 32) ^ c1 ^ k0, p1 & _MASK, (p0 >> 32) ^ c3 ^ k1, p0 & _MASK
        k0, k1 = (k0 + _W0) & _MASK, (k1 + _W1) & _MASK
    return c0, c1, c2, c3


def token_word(key: int, token: int) -> int:
    """The 32 random bits of one token."""
    return philox4x32(key, token // 4)[token % 4]


def gumbel(word: int) -> float:
    """Standard Gumbel variable of 32 random bits; u in (0, 1) is exact in double precision."""
    u = (word + 0.5) * 2.0**-32
    return -math.log(-math.log(u))


def random_bits(keys: Tensor, num_tokens: int) -> Tensor:
    words = [[token_word(key, token) for token in range(num_tokens)] for key in keys.tolist()]
    return torch.tensor(words, dtype=torch.int64).reshape(len(words), num_tokens)


def sample(
    logits: Tensor,
    temperature: Tensor | None,
    top_k: Tensor | None,
    top_p: Tensor | None,
    min_p: Tensor | None,
    typical_p: Tensor | None,
    keys: Tensor | None,
) -> Tensor:
    columns = [
        [neutral] * logits.shape[0] if values is None else values.tolist()
        for values, neutral in (
            (temperature, 0.0),
            (top_k, 0),
            (top_p, 1.0),
            (min_p, 0.0),
            (typical_p, 1.0),
            (keys, 0),
        )
    ]
    chosen = [_sample_row(*row) for row in zip(logits.tolist(), *columns, strict=True)]
    return torch.tensor(chosen, dtype=torch.int64)


def _sample_row(
    logits: list[float], temperature: float, top_k: int, top_p: float, min_p: float, typical_p: float, key: int
) -> int:
    best = max(logits)
    if any(math.isnan(x) or x == math.inf for x in logits) or best == -math.inf:
        return -1
    if temperature < GREEDY_BELOW:
        return logits.index(best)
    z = {token: (x - best) / temperature for token, x in enumerate(logits) if x > -math.inf}
    kept = sorted(z, key=lambda token: (-z[token], token))
    if top_k > 0:
        kept = kept[:top_k]
    if top_p < 1:
        kept = _reach_mass(kept, _probabilities(z, kept), top_p)
    if min_p > 0:
        kept = [token for token in kept if z[token] >= math.log(min_p)]
    if typical_p < 1:
        p = _probabilities(z, kept)
        surprise = {token: -math.log(p[token]) for token in kept if p[token] > 0}
        entropy = sum(p[token] * surprise[token] for token in surprise)
        by_distance = sorted(surprise, key=lambda token: (abs(surprise[token] - entropy), token))
        kept = _reach_mass(by_distance, p, typical_p)
    noised = {token: z[token] + gumbel(token_word(key, token)) for token in kept}
    return min(kept, key=lambda token: (-noised[token], token))


def _probabilities(z: dict[int, float], kept: list[int]) -> dict[int, float]:
    total = math.fsum(math.exp(z[token]) for token in kept)
    return {token: math.exp(z[token]) / total for token in kept}


def _reach_mass(ordered: list[int], p: dict[int, float], target: float) -> list[int]:
    """The smallest prefix whose mass reaches `target`, at least one token."""
    mass = 0.0
    for count, token in enumerate(ordered, start=1):
        mass += p[token]
        if mass >= target:
            return ordered[:count]
    return ordered


def apply_penalties(
    logits: Tensor,
    rows: Tensor,
    slots: Tensor,
    output_counts: Tensor,
    prompt_mask: Tensor,
    repetition: Tensor,
    presence: Tensor,
    frequency: Tensor,
) -> None:
    for j, (row, slot) in enumerate(zip(rows.tolist(), slots.tolist(), strict=True)):
        for token in range(logits.shape[1]):
            count, x = output_counts[slot, token].item(), logits[row, token].item()
            if count > 0 or prompt_mask[slot, token]:
                r = repetition[j].item()
                x = x / r if x > 0 else x * r
            if count > 0:
                x -= frequency[j].item() * count + presence[j].item()
            logits[row, token] = x


def apply_token_bitmask(logits: Tensor, mask: Tensor) -> None:
    for row in range(logits.shape[0]):
        for token in range(logits.shape[1]):
            if not (int(mask[row, token // 32]) >> (token % 32)) & 1:
                logits[row, token] += -math.inf  # not =: NaN stays visible


def log_probs_of(logits: Tensor, ids: Tensor, top_n: int) -> LogProbs:
    rows = [_log_prob_row(logits[row].tolist(), token, top_n) for row, token in enumerate(ids.tolist())]
    return LogProbs(
        log_probs=torch.tensor([row[0] for row in rows], dtype=torch.float32),
        ranks=torch.tensor([row[1] for row in rows], dtype=torch.int64),
        top_ids=torch.tensor([row[2] for row in rows], dtype=torch.int64).reshape(len(rows), top_n),
        top_log_probs=torch.tensor([row[3] for row in rows], dtype=torch.float32).reshape(len(rows), top_n),
    )


def _log_prob_row(logits: list[float], token: int, top_n: int) -> tuple[float, int, list[int], list[float]]:
    best = max(logits)
    if not 0 <= token < len(logits) or any(math.isnan(x) or x == math.inf for x in logits) or best == -math.inf:
        return math.nan, 0, [-1] * top_n, [math.nan] * top_n
    log_total = math.log(math.fsum(math.exp(x - best) for x in logits))
    ordered = sorted(range(len(logits)), key=lambda i: (-logits[i], i))
    top = ordered[:top_n]
    return (
        logits[token] - best - log_total,
        ordered.index(token) + 1,
        top,
        [logits[i] - best - log_total for i in top],
    )
