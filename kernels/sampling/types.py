"""What all implementations of sampling share: constants and the shape of results."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

# Temperatures below this are greedy: dividing by them would overflow long before they could matter. kernel.cpp has it
# too.
GREEDY_BELOW = 1e-5


class LogProbs(NamedTuple):
    """Log-probabilities of M tokens, each under its own row, and the `top_n` best tokens of those rows."""

    log_probs: Tensor  # [M] float32
    ranks: Tensor  # [M] int64; 1 is the most likely token, among equals the one with the lower id
    top_ids: Tensor  # [M, top_n] int64, most likely first
    top_log_probs: Tensor  # [M, top_n] float32
