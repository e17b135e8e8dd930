"""Sampling in plain torch operations, on any device: one full sort per call where a filter is on.

The filters (`keep_filtered`) and the log-probabilities also serve the Triton backend.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kernels.sampling.types import GREEDY_BELOW, LogProbs

_M0, _M1 = 0xD2511F53, 0xCD9E8D57
_W0, _W1 = 0x9E3779B9, 0xBB67AE85
_MASK = 0xFFFFFFFF


def sample(
    logits: Tensor,
    temperature: Tensor | None,
    top_k: Tensor | None,
    top_p: Tensor | None,
    min_p: Tensor | None,
    typical_p: Tensor | None,
    keys: Tensor | None,
) -> Tensor:
    if temperature is None or keys is None:
        return _choose(logits, logits)
    noised = keep_filtered(logits, temperature, top_k, top_p, min_p, typical_p)
    is_sampled = temperature >= GREEDY_BELOW
    scale = torch.where(is_sampled, temperature, 1.0).double().reciprocal().unsqueeze(1)
    best = noised.amax(dim=1, keepdim=True).double()
    noise = _gumbel(random_bits(keys, logits.shape[1])) * is_sampled.unsqueeze(1)
    return _choose((noised - best) * scale + noise, logits)


def _choose(values: Tensor, logits: Tensor) -> Tensor:
    """Lowest id among the largest of `values` [N, V]; -1 where the logits are unfit."""
    best = values.amax(dim=1, keepdim=True)
    ids = torch.arange(values.shape[1], device=values.device)
    chosen = torch.where(values == best, ids, values.shape[1]).amin(dim=1)
    return torch.where(_is_fit(logits), chosen, -1)


def _is_fit(logits: Tensor) -> Tensor:
    """[N]: no NaN, no +inf, and something above -inf."""
    return (logits < math.inf).all(dim=1) & (logits > -math.inf).any(dim=1)


def keep_filtered(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor | None,
    top_p: Tensor | None,
    min_p: Tensor | None,
    typical_p: Tensor | None,
) -> Tensor:
    """The logits with -inf in place of what the filters drop; unfit rows and greedy rows as they are."""
    if top_k is None and top_p is None and min_p is None and typical_p is None:
        return logits
    is_sampled = temperature >= GREEDY_BELOW
    order = torch.topk(_sort_keys(logits), logits.shape[1], dim=1).indices  # [N, V], most likely first
    ordered = logits.gather(1, order).double()
    z = (ordered - ordered[:, :1]) / torch.where(is_sampled, temperature, 1.0).double().unsqueeze(1)
    kept = z > -math.inf  # the order's positions, not tokens, as in all that follows
    if top_k is not None:
        k = top_k.unsqueeze(1)
        kept &= (torch.arange(z.shape[1], device=z.device) < k) | (k <= 0)
    if top_p is not None:
        kept &= _reaches_mass(_probabilities(z, kept), top_p)
    if min_p is not None:
        kept &= z >= min_p.double().log().unsqueeze(1)
    if typical_p is not None:
        kept &= _is_typical(_probabilities(z, kept), kept, order, typical_p)
    kept_tokens = torch.zeros_like(kept).scatter_(1, order, kept)
    is_untouched = ~(is_sampled & _is_fit(logits)).unsqueeze(1)
    return torch.where(kept_tokens | is_untouched, logits, -math.inf)


def _sort_keys(x: Tensor) -> Tensor:
    """int64 keys that order as (x descending, position ascending) when sorted descending; no two are equal."""
    bits = (x + 0.0).view(torch.int32)  # adding turns -0.0 into 0.0
    ordered = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).long()
    return (ordered << 32) - torch.arange(x.shape[1], device=x.device)


def _probabilities(z: Tensor, kept: Tensor) -> Tensor:
    weights = torch.where(kept, z.exp(), 0.0)
    return weights / weights.sum(dim=1, keepdim=True)


def _reaches_mass(p: Tensor, target: Tensor) -> Tensor:
    """Positions of the smallest prefix whose mass reaches the target: those before which it has not been reached."""
    target = target.double().unsqueeze(1)
    before = p.cumsum(dim=1) - p
    is_first = torch.arange(p.shape[1], device=p.device) == 0
    return (before < target) | is_first | (target >= 1.0)


def _is_typical(p: Tensor, kept: Tensor, order: Tensor, typical_p: Tensor) -> Tensor:
    surprise = -p.log()
    entropy = torch.where(p > 0, p * surprise, 0.0).sum(dim=1, keepdim=True)
    distance = torch.where(kept & (p > 0), (surprise - entropy).abs(), math.inf)
    by_token = torch.full_like(distance, math.inf).scatter_(1, order, distance)  # so that ties go by token id
    by_distance = by_token.argsort(dim=1, stable=True)
    p_by_token = torch.zeros_like(p).scatter_(1, order, p)
    reached = _reaches_mass(p_by_token.gather(1, by_distance), typical_p)
    kept_tokens = torch.zeros_like(kept).scatter_(1, by_distance, reached)
    return kept_tokens.gather(1, order)


def random_bits(keys: Tensor, num_tokens: int) -> Tensor:
    counters = torch.arange((num_tokens + 3) // 4, dtype=torch.int64, device=keys.device)
    k0, k1 = (keys & _MASK).unsqueeze(1), ((keys >> 32) & _MASK).unsqueeze(1)
    c0 = counters.expand(keys.shape[0], -1)
    c1 = c2 = c3 = torch.zeros_like(c0)
    for _ in range(10):
        high0, low0 = _multiply_wide(c0, _M0)
        high1, low1 = _multiply_wide(c2, _M1)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _W0) & _MASK, (k1 + _W1) & _MASK
    return torch.stack([c0, c1, c2, c3], dim=2).flatten(1)[:, :num_tokens]


def _multiply_wide(a: Tensor, factor: int) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of a product of 32-bit numbers held in int64, without ever leaving 63 bits."""
    upper, lower = (a >> 16) * factor, (a & 0xFFFF) * factor
    high = (upper + (lower >> 16)) >> 16
    low = ((upper << 16) + lower) & _MASK
    return high, low


def _gumbel(words: Tensor) -> Tensor:
    u = (words.double() + 0.5) * 2.0**-32  # exact: in single precision the values next to 1 would fall together
    return -(-u.log()).log()


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
    x, counts = logits[rows], output_counts[slots]
    factor = repetition.unsqueeze(1)
    is_generated = counts > 0
    x = torch.where(is_generated | prompt_mask[slots].bool(), torch.where(x > 0, x / factor, x * factor), x)
    penalty = frequency.unsqueeze(1) * counts + presence.unsqueeze(1)
    logits[rows] = torch.where(is_generated, x - penalty, x)


def apply_token_bitmask(logits: Tensor, mask: Tensor) -> None:
    shifts = torch.arange(32, dtype=torch.int32, device=mask.device)
    is_allowed = ((mask.unsqueeze(2) >> shifts) & 1).flatten(1)[:, : logits.shape[1]].bool()
    logits += torch.where(is_allowed, 0.0, -math.inf)  # adding keeps NaN visible


def log_probs_of(logits: Tensor, ids: Tensor, top_n: int) -> LogProbs:
    num_tokens = logits.shape[1]
    is_fit = _is_fit(logits) & (ids >= 0) & (ids < num_tokens)
    column = ids.clamp(0, num_tokens - 1).unsqueeze(1)
    log_probs = logits.double().log_softmax(dim=1)
    keys = _sort_keys(logits)
    ranks = (keys > keys.gather(1, column)).sum(dim=1) + 1
    top_ids = torch.topk(keys, top_n, dim=1).indices
    fit = is_fit.unsqueeze(1)
    return LogProbs(
        log_probs=torch.where(is_fit, log_probs.gather(1, column).squeeze(1), math.nan).float(),
        ranks=torch.where(is_fit, ranks, 0),
        top_ids=torch.where(fit, top_ids, -1),
        top_log_probs=torch.where(fit, log_probs.gather(1, top_ids), math.nan).float(),
    )
