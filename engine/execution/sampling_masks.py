"""Which tokens a row may choose: bias, allowed ids, bad words, min_tokens, end of thinking. State of such rows.

Masks add -inf instead of writing it, so that NaN and +inf in the logits stay visible.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence

import torch
from torch import Tensor

from engine.execution.thinking import ThinkingLimit
from engine.sampling_params import MAX_LOGIT_BIAS, allowed_ids
from engine.types import SamplingParams


class RowMask:
    """The restrictions of one row."""

    def __init__(
        self,
        params: SamplingParams,
        token_ids: Sequence[int],
        num_prompt_tokens: int,
        eos_token_ids: Sequence[int],
        logits_size: int,
        device: torch.device,
    ) -> None:
        budget = params.thinking
        self._thinking = None if budget is None else ThinkingLimit(budget, token_ids[num_prompt_tokens:])
        bias = {token: _effective(value) for token, value in params.logit_bias.items() if _effective(value) != 0.0}
        self._bias_ids = torch.tensor(list(bias), dtype=torch.int64, device=device)
        self._bias = torch.tensor(list(bias.values()), dtype=torch.float32, device=device)
        allowed = allowed_ids(params)
        self._allowed = None if allowed is None else torch.tensor(sorted(allowed), dtype=torch.int64, device=device)
        # What would end the output is masked until min_tokens; with ignore_eos an end-of-sequence id ends nothing.
        ends = {*params.stop_token_ids, *(() if params.ignore_eos else eos_token_ids)}
        self._end_ids = [token for token in sorted(ends) if token < logits_size]
        self._min_tokens = params.min_tokens
        self._bad_words = [(sequence[:-1], sequence[-1]) for sequence in params.bad_words_ids]
        longest = max((len(start) for start, _ in self._bad_words), default=0)
        self._tail: deque[int] = deque(token_ids[-longest:] if longest else (), maxlen=longest)

    @staticmethod
    def is_used_by(params: SamplingParams) -> bool:
        return bool(
            params.logit_bias
            or params.allowed_token_ids
            or params.bad_words_ids
            or params.min_tokens
            or params.thinking is not None
        )

    def apply(self, logits: Tensor) -> None:
        """Bias and allowed ids, or the one token that must come, on one row of logits [V] in place."""
        if self._forced_id is not None:
            logit = logits[self._forced_id].clone()
            logits += -math.inf
            # whatever a bias says: it must come
            logits[self._forced_id] = torch.where(logit == -math.inf, 0.0, logit)
            return
        if self._bias_ids.numel():
            logits.index_add_(0, self._bias_ids, self._bias)
        if self._allowed is not None:
            kept = logits[self._allowed]
            logits += -math.inf
            logits[self._allowed] = kept

    def forbidden(self, output_index: int) -> list[int]:
        """Tokens that may not be chosen at this place: they would end the output too soon or complete a bad word."""
        if self._forced_id is not None:
            return []
        is_early = output_index < self._min_tokens or (self._thinking is not None and not self._thinking.may_end)
        found = list(self._end_ids) if is_early else []
        tail = tuple(self._tail)
        found.extend(last for start, last in self._bad_words if not start or tail[-len(start) :] == start)
        return sorted(set(found))

    def append(self, token_id: int) -> None:
        self._tail.append(token_id)
        if self._thinking is not None:
            self._thinking.append(token_id)

    @property
    def _forced_id(self) -> int | None:
        return None if self._thinking is None else self._thinking.forced_id


def _effective(bias: float) -> float:
    """The bias as it is added: -MAX_LOGIT_BIAS bans; MAX_LOGIT_BIAS makes exclusive, which the allowed ids express."""
    if bias <= -MAX_LOGIT_BIAS:
        return -math.inf
    return min(bias, MAX_LOGIT_BIAS)
