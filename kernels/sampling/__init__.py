"""Choosing tokens from logits: noise, filters, penalties, masks and log-probabilities.

**Noise.** Each row brings a 64-bit key. Token i of that row gets the 32 bits x = word i % 4 of Philox4x32-10 at the
counter (i // 4, 0, 0, 0), u = (x + 0.5) / 2^32 and the Gumbel variable -ln(-ln u). All implementations have the same
bits; the rest of a choice agrees up to rounding. Hence a choice is a function of its row and its key alone.

**Order.** z = logits / temperature; then each filter works on the distribution that the one before it has left:
  top_k      the k largest z
  top_p      the smallest set of the most likely tokens whose mass reaches top_p, at least one (0: the best only)
  min_p      tokens at least min_p times as likely as the best
  typical_p  the smallest set of the tokens whose surprise -ln p is closest to the entropy whose mass reaches typical_p,
             at least one (Meister et al. 2023, arXiv:2202.00666)
Then argmax of z + gumbel over what is left. Ties, everywhere: the lower id comes first.
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from kernels import backend
from kernels.sampling import torch_impl
from kernels.sampling.types import GREEDY_BELOW, LogProbs

__all__ = [
    "GREEDY_BELOW",
    "LogProbs",
    "apply_penalties",
    "apply_token_bitmask",
    "greedy",
    "log_probs_of",
    "probabilities",
    "random_bits",
    "sample",
]


def sample(
    logits: Tensor,
    *,
    temperature: Tensor,
    keys: Tensor,
    top_k: Tensor | None = None,
    top_p: Tensor | None = None,
    min_p: Tensor | None = None,
    typical_p: Tensor | None = None,
) -> Tensor:
    """Choose one token per row: [N] int64, or -1 where a row holds NaN or +inf, or nothing but -inf.

    logits       [N, V] float32, last dim contiguous; not changed
    temperature  [N] float32; below GREEDY_BELOW the row is greedy and its filters and key do nothing
    keys         [N] int64
    top_k        [N] int64; 0 or less is off. None: off in all rows (also for the others)
    top_p        [N] float32; 1 is off
    min_p        [N] float32; 0 is off
    typical_p    [N] float32; 1 is off
    Raises ValueError when shapes or dtypes disagree.
    """
    _check_logits(logits)
    num_rows = logits.shape[0]
    _check("temperature", temperature, torch.float32, num_rows)
    _check("keys", keys, torch.int64, num_rows)
    _check("top_k", top_k, torch.int64, num_rows)
    _check("top_p", top_p, torch.float32, num_rows)
    _check("min_p", min_p, torch.float32, num_rows)
    _check("typical_p", typical_p, torch.float32, num_rows)
    return _implementation(logits).sample(logits, temperature, top_k, top_p, min_p, typical_p, keys)


def probabilities(
    logits: Tensor,
    *,
    temperature: Tensor,
    top_k: Tensor | None = None,
    top_p: Tensor | None = None,
    min_p: Tensor | None = None,
    typical_p: Tensor | None = None,
) -> Tensor:
    """What `sample` draws from: [N, V] float64, NaN in rows that it refuses. Arguments as there; no row is greedy."""
    _check_logits(logits)
    kept = torch_impl.keep_filtered(logits, temperature, top_k, top_p, min_p, typical_p)
    return (kept.double() / temperature.double().unsqueeze(1)).softmax(dim=1)


def greedy(logits: Tensor) -> Tensor:
    """The most likely token of each row of logits [N, V]: [N] int64, -1 as in `sample`."""
    _check_logits(logits)
    return _implementation(logits).sample(logits, None, None, None, None, None, None)


def random_bits(keys: Tensor, num_tokens: int) -> Tensor:
    """The 32 random bits of tokens 0 .. num_tokens - 1 under each key: keys [N] int64 -> [N, num_tokens] int64."""
    _check("keys", keys, torch.int64, keys.shape[0])
    return backend.implementation("sampling", keys.device).random_bits(keys, num_tokens)


def apply_penalties(
    logits: Tensor,
    rows: Tensor,
    slots: Tensor,
    output_counts: Tensor,
    prompt_mask: Tensor,
    *,
    repetition: Tensor,
    presence: Tensor,
    frequency: Tensor,
) -> None:
    """Penalise some rows of logits in place.

    logits         [N, V] float32, last dim contiguous
    rows, slots    [M] int64: row rows[j] of logits is penalised by counts slots[j]; rows are distinct
    output_counts  [P, V] int32, how often each token was generated
    prompt_mask    [P, V] uint8, whether the prompt contains it
    repetition     [M] float32: tokens of prompt or output: logits above 0 are divided by it, others multiplied (1: off)
    frequency      [M] float32: then subtracted from generated tokens, once per occurrence (0: off)
    presence       [M] float32: and once more if there was any (0: off)
    """
    _check_logits(logits)
    num_penalised = rows.shape[0]
    for name, values, dtype in (
        ("rows", rows, torch.int64),
        ("slots", slots, torch.int64),
        ("repetition", repetition, torch.float32),
        ("presence", presence, torch.float32),
        ("frequency", frequency, torch.float32),
    ):
        _check(name, values, dtype, num_penalised)
    for name, counts, dtype in (
        ("output_counts", output_counts, torch.int32),
        ("prompt_mask", prompt_mask, torch.uint8),
    ):
        if (
            counts.ndim != 2
            or counts.shape[1] != logits.shape[1]
            or counts.dtype != dtype
            or not counts.is_contiguous()
        ):
            raise ValueError(
                f"{name} must be contiguous {dtype} with {logits.shape[1]} columns, "
                f"got {counts.dtype} {tuple(counts.shape)}"
            )
    _implementation(logits).apply_penalties(
        logits, rows, slots, output_counts, prompt_mask, repetition, presence, frequency
    )


def apply_token_bitmask(logits: Tensor, mask: Tensor) -> None:
    """Set logits [N, V] float32 of forbidden tokens to -inf in place; NaN and +inf become NaN and stay visible.

    mask  [N, ceil(V / 32)] int32: bit i % 32 of word i // 32 allows token i (the layout of grammar libraries)
    """
    _check_logits(logits)
    shape = (logits.shape[0], (logits.shape[1] + 31) // 32)
    if mask.dtype != torch.int32 or tuple(mask.shape) != shape or not mask.is_contiguous():
        raise ValueError(f"mask must be contiguous int32 {shape}, got {mask.dtype} {tuple(mask.shape)}")
    _implementation(logits).apply_token_bitmask(logits, mask)


def log_probs_of(logits: Tensor, ids: Tensor, top_n: int) -> LogProbs:
    """Log-softmax of row m of logits [M, V] float32 at ids[m] ([M] int64), its rank, and the row's `top_n` best tokens.

    A row with NaN or +inf, with nothing but -inf, or whose id lies outside of [0, V), gets NaN, rank 0 and ids -1.
    Raises ValueError unless 0 <= top_n <= V.
    """
    _check_logits(logits)
    _check("ids", ids, torch.int64, logits.shape[0])
    if not 0 <= top_n <= logits.shape[1]:
        raise ValueError(f"top_n is {top_n}, allowed are 0 to {logits.shape[1]} (the columns of the logits)")
    return _implementation(logits).log_probs_of(logits, ids, top_n)


def _implementation(logits: Tensor) -> ModuleType:
    return backend.implementation("sampling", logits.device)


def _check_logits(logits: Tensor) -> None:
    if logits.ndim != 2 or logits.dtype != torch.float32 or logits.shape[1] == 0 or logits.stride(1) != 1:
        raise ValueError(
            f"logits must be [N, V] float32 with V > 0 and contiguous rows, got {logits.dtype} {tuple(logits.shape)} "
            f"with strides {logits.stride()}"
        )


def _check(name: str, values: Tensor | None, dtype: torch.dtype, length: int) -> None:
    if values is not None and (values.dtype != dtype or values.shape != (length,) or not values.is_contiguous()):
        raise ValueError(f"{name} must be contiguous {dtype} [{length}], got {values.dtype} {tuple(values.shape)}")
