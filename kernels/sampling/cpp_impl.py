"""Sampling by kernel.cpp and processors.cpp."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels import native
from kernels.native import INT, PTR
from kernels.sampling.types import LogProbs


def sample(
    logits: Tensor,
    temperature: Tensor | None,
    top_k: Tensor | None,
    top_p: Tensor | None,
    min_p: Tensor | None,
    typical_p: Tensor | None,
    keys: Tensor | None,
) -> Tensor:
    chosen = torch.empty(logits.shape[0], dtype=torch.int64)
    native.function("kvasir_sample", PTR, INT, INT, INT, PTR, PTR, PTR, PTR, PTR, PTR, PTR, INT)(
        logits.data_ptr(),
        *logits.shape,
        logits.stride(0),
        *(
            None if values is None else values.data_ptr()
            for values in (temperature, top_k, top_p, min_p, typical_p, keys)
        ),
        chosen.data_ptr(),
        native.num_threads(),
    )
    return chosen


def random_bits(keys: Tensor, num_tokens: int) -> Tensor:
    words = torch.empty(keys.shape[0], num_tokens, dtype=torch.int64)
    native.function("kvasir_random_bits", PTR, INT, INT, PTR)(
        keys.data_ptr(), keys.shape[0], num_tokens, words.data_ptr()
    )
    return words


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
    native.function("kvasir_apply_penalties", PTR, INT, INT, PTR, PTR, INT, PTR, PTR, PTR, PTR, PTR, INT)(
        logits.data_ptr(),
        logits.shape[1],
        logits.stride(0),
        rows.data_ptr(),
        slots.data_ptr(),
        rows.shape[0],
        output_counts.data_ptr(),
        prompt_mask.data_ptr(),
        repetition.data_ptr(),
        presence.data_ptr(),
        frequency.data_ptr(),
        native.num_threads(),
    )


def apply_token_bitmask(logits: Tensor, mask: Tensor) -> None:
    native.function("kvasir_apply_token_bitmask", PTR, INT, INT, INT, PTR, INT)(
        logits.data_ptr(), *logits.shape, logits.stride(0), mask.data_ptr(), native.num_threads()
    )


def log_probs_of(logits: Tensor, ids: Tensor, top_n: int) -> LogProbs:
    num_rows = logits.shape[0]
    found = LogProbs(
        log_probs=torch.empty(num_rows),
        ranks=torch.empty(num_rows, dtype=torch.int64),
        top_ids=torch.empty(num_rows, top_n, dtype=torch.int64),
        top_log_probs=torch.empty(num_rows, top_n),
    )
    native.function("kvasir_log_probs", PTR, INT, INT, INT, PTR, INT, PTR, PTR, PTR, PTR, INT)(
        logits.data_ptr(),
        *logits.shape,
        logits.stride(0),
        ids.data_ptr(),
        top_n,
        *(part.data_ptr() for part in found),
        native.num_threads(),
    )
    return found
