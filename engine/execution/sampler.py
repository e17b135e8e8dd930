"""From logits to token ids, for rows that each sample in their own way. Knows rows, never requests.

Order: bias and allowed ids, penalties, grammar mask, bad words and min_tokens, then temperature and filters
(`kernels.sampling`). A choice depends on the row's logits, parameters and tokens, its seed, choice and output index,
and on nothing else: not on the batch, the step or the time.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

import kernels
from engine import noise
from engine.errors import InvalidParameter, NumericalError
from engine.execution.logprobs import token_logprobs
from engine.execution.penalties import PenaltyCounts
from engine.execution.sampling_masks import RowMask
from engine.execution.transfers import to_device
from engine.speculation.verifiers import KeyedChance
from engine.types import SamplingParams, TokenLogprob
from kernels.sampling import GREEDY_BELOW

# What a row needs beyond the argmax, as bits, so that one reduction tells what a batch needs.
_NOISE, _TOP_K, _TOP_P, _MIN_P, _TYPICAL_P, _PENALTIES, _MASK, _LOGPROBS = (1 << bit for bit in range(8))
_COUNTING = _PENALTIES | _MASK  # look at the tokens generated so far
_FLOATS = ("temperature", "top_p", "min_p", "typical_p")


@dataclass(frozen=True, slots=True)
class SampleOutput:
    """What was chosen for each row of logits, in their order."""

    token_ids: list[int]  # -1 where there is an error
    logprobs: list[TokenLogprob | None] | None  # None where not asked for, or nowhere asked for
    errors: list[str | None]  # a code of engine.errors: the logits are not finite, or the masks leave nothing


class _Parameters(NamedTuple):
    """Of rows that draw in one call, in their order."""

    rows: list[int]
    stream_keys: np.ndarray
    top_k: Tensor
    temperature: Tensor  # and so on as in _FLOATS
    top_p: Tensor
    min_p: Tensor
    typical_p: Tensor


class Sampler:
    """Sampling parameters and state of up to `max_rows` rows.

    logits_size    V, columns of the logits
    eos_token_ids  what min_tokens masks, beside a row's own stop ids
    """

    def __init__(
        self, logits_size: int, max_rows: int, device: torch.device | str, eos_token_ids: Sequence[int]
    ) -> None:
        self._logits_size = logits_size
        self._device = torch.device(device)
        self._eos_token_ids = tuple(eos_token_ids)
        self._features = [0] * max_rows
        self._floats = np.zeros((len(_FLOATS), max_rows), dtype=np.float32)
        self._top_k = np.zeros(max_rows, dtype=np.int64)
        self._stream_keys = np.zeros(max_rows, dtype=np.uint64)
        self._parameters: _Parameters | None = None  # of the rows that drew last
        self._identities: dict[int, tuple[int, int]] = {}  # seed and choice
        self._num_logprobs: dict[int, int] = {}
        self._masks: dict[int, RowMask] = {}
        self._penalties = PenaltyCounts(logits_size, max_rows, self._device)

    @torch.inference_mode()
    def add_row(
        self, row: int, params: SamplingParams, choice: int, token_ids: Sequence[int], num_prompt_tokens: int
    ) -> None:
        """A choice of a request takes the row; token_ids are its prompt and what it has generated before.

        When it raises, the row is as if removed.
        """
        self.remove_row(row)
        self._parameters = None
        self._floats[:, row] = [getattr(params, name) for name in _FLOATS]
        self._top_k[row] = params.top_k
        self._stream_keys[row] = noise.stream_key(params.seed, choice)
        self._identities[row] = params.seed, choice
        if params.logprobs is not None:
            self._num_logprobs[row] = params.logprobs
        if RowMask.is_used_by(params):
            self._masks[row] = RowMask(
                params, token_ids, num_prompt_tokens, self._eos_token_ids, self._logits_size, self._device
            )
        if PenaltyCounts.are_used_by(params):
            self._penalties.add(row, params, token_ids, num_prompt_tokens)
        self._features[row] = _features(params)  # last: what `remove_row` trusts to be there

    def remove_row(self, row: int) -> None:
        if self._features[row] & _PENALTIES:
            self._penalties.remove(row)
        self._masks.pop(row, None)
        self._num_logprobs.pop(row, None)
        self._features[row] = 0

    def counts_outputs(self, row: int) -> bool:
        """Whether a choice of the row needs the tokens before it to be committed: see `choose`."""
        return bool(self._features[row] & _COUNTING)

    def sample(
        self,
        logits: Tensor,
        rows: Sequence[int],
        output_indices: Sequence[int],
        bitmask: Tensor | None = None,
    ) -> SampleOutput:
        """Choose the next token of distinct rows and count it as generated. Arguments as in `choose`."""
        output = self.choose(logits, rows, output_indices, bitmask)
        if any(self._features[row] & _COUNTING for row in rows):
            self.commit(rows, output.token_ids)
        return output

    @torch.inference_mode()
    def choose(
        self,
        logits: Tensor,
        rows: Sequence[int],
        output_indices: Sequence[int],
        bitmask: Tensor | None = None,
    ) -> SampleOutput:
        """Choose without counting: the same call gives the same tokens again, and a row may come several times.

        logits          [N, V] float32; overwritten where rows have penalties or masks
        rows            N rows that were added
        output_indices  N indices of the tokens to choose, counted from each row's first output
        bitmask         [N, ceil(V / 32)] int32 on the sampler's device, see kernels.apply_token_bitmask

        Penalties and bad words see the tokens committed so far: for those rows, walk a path of several positions one
        by one, `choose` and `commit`. The others may be chosen at all positions in one call.
        """
        if not rows:
            return SampleOutput([], None, [])
        features = 0
        for row in rows:
            features |= self._features[row]
        is_processed = bool(features & _COUNTING) or bitmask is not None
        asking = [i for i, row in enumerate(rows) if self._features[row] & _LOGPROBS] if features & _LOGPROBS else []
        raw = self._rows_of(logits, asking, must_copy=is_processed) if asking else None
        withheld = self._process(logits, rows, output_indices, features, bitmask) if is_processed else {}
        token_ids = self._draw(logits, rows, output_indices, features).tolist()
        errors: list[str | None] = [None] * len(rows)
        if min(token_ids) < 0:
            self._retry(token_ids, logits, withheld, rows, output_indices, features)
            for i, token_id in enumerate(token_ids):
                if token_id < 0:
                    errors[i] = _reason(logits[i], is_restricted=is_processed)
        if raw is None:
            return SampleOutput(token_ids, None, errors)
        return SampleOutput(token_ids, self._logprobs(raw, asking, rows, token_ids), errors)

    @torch.inference_mode()
    def commit(self, rows: Sequence[int], token_ids: Sequence[int]) -> None:
        """Token token_ids[j] (negative: none) was generated in row rows[j]; rows are distinct."""
        pairs = [pair for pair in zip(rows, token_ids, strict=True) if pair[1] >= 0]
        penalised = [pair for pair in pairs if self._features[pair[0]] & _PENALTIES]
        if penalised:
            self._penalties.count(*zip(*penalised, strict=True))
        for row, token_id in pairs:
            if self._features[row] & _MASK:
                self._masks[row].append(token_id)

    @torch.inference_mode()
    def probabilities(self, logits: Tensor, row: int) -> Tensor:
        """[n, V] float64: what the row draws from at each of logits [n, V]. For a row that is neither greedy nor
        `counts_outputs`. NaN where `choose` would report an error.
        """
        parameters = self._gather([row] * logits.shape[0])
        return kernels.sampling.probabilities(
            logits,
            temperature=parameters.temperature,
            top_k=parameters.top_k,
            top_p=parameters.top_p,
            min_p=parameters.min_p,
            typical_p=parameters.typical_p,
        )

    def may_be_verified(self, row: int) -> bool:
        """Whether the row draws at random, each time from what the model says alone, and nobody asks how likely it was:
        then its tokens may be found by another rule than `choose`.
        """
        return self._features[row] & (_NOISE | _COUNTING | _LOGPROBS) == _NOISE

    def chance(self, row: int, output_index: int) -> KeyedChance:
        """The row's randomness for such a rule, in the step whose first token has that index."""
        return KeyedChance(*self._identities[row], output_index)

    def _process(
        self,
        logits: Tensor,
        rows: Sequence[int],
        output_indices: Sequence[int],
        features: int,
        bitmask: Tensor | None,
    ) -> dict[int, tuple[Tensor, Tensor]]:
        """Everything before temperature, in place. Returns what was withheld by position: ids and their logits."""
        masked = [(i, self._masks[row]) for i, row in enumerate(rows) if row in self._masks] if features & _MASK else []
        for i, mask in masked:
            mask.apply(logits[i])
        if features & _PENALTIES:
            penalised = [i for i, row in enumerate(rows) if self._features[row] & _PENALTIES]
            self._penalties.apply(logits, penalised, [rows[i] for i in penalised])
        if bitmask is not None:
            kernels.apply_token_bitmask(logits, bitmask)
        withheld = {}
        for i, mask in masked:
            if forbidden := mask.forbidden(output_indices[i]):
                ids = torch.tensor(forbidden, device=self._device)
                withheld[i] = (ids, logits[i, ids])
                logits[i, ids] += -math.inf
        return withheld

    def draw(self, logits: Tensor, rows: Sequence[int], output_indices: Sequence[int]) -> Tensor:
        """`choose` without waiting, for rows that are `is_drawn_alone`: [N] int64 on the device.

        logits [N, V] float32, N > 0. -1 where they are not finite.
        """
        features = 0
        for row in rows:
            features |= self._features[row]
        return self._draw(logits, rows, output_indices, features)

    def _draw(self, logits: Tensor, rows: Sequence[int], output_indices: Sequence[int], features: int) -> Tensor:
        if not features & _NOISE:
            return kernels.greedy(logits)
        parameters = self._parameters
        if parameters is None or parameters.rows != rows:
            parameters = self._parameters = self._gather(list(rows))
        keys = _row_keys(parameters.stream_keys, output_indices)
        return kernels.sample(
            logits,
            temperature=parameters.temperature,
            keys=to_device(torch.from_numpy(keys), self._device),
            top_k=parameters.top_k if features & _TOP_K else None,
            top_p=parameters.top_p if features & _TOP_P else None,
            min_p=parameters.min_p if features & _MIN_P else None,
            typical_p=parameters.typical_p if features & _TYPICAL_P else None,
        )

    def _gather(self, rows: list[int]) -> _Parameters:
        """The rows' parameters side by side, on the device. They stay the same as long as the rows do."""
        floats = to_device(torch.from_numpy(self._floats.take(rows, axis=1)), self._device).unbind()
        top_k = to_device(torch.from_numpy(self._top_k[rows]), self._device)
        return _Parameters(rows, self._stream_keys[rows], top_k, *floats)

    def _retry(
        self,
        token_ids: list[int],
        logits: Tensor,
        withheld: dict[int, tuple[Tensor, Tensor]],
        rows: Sequence[int],
        output_indices: Sequence[int],
        features: int,
    ) -> None:
        """Bad words and min_tokens give way where they leave nothing to choose."""
        for i, (ids, values) in withheld.items():
            if token_ids[i] < 0:
                logits[i, ids] = values
                again = self._draw(logits[i : i + 1], rows[i : i + 1], output_indices[i : i + 1], features)
                token_ids[i] = int(again.item())

    def _logprobs(
        self, raw: Tensor, asking: Sequence[int], rows: Sequence[int], token_ids: Sequence[int]
    ) -> list[TokenLogprob | None]:
        chosen = [token_ids[i] for i in asking]
        entries = token_logprobs(
            raw, torch.tensor(chosen, device=self._device), [self._num_logprobs[rows[i]] for i in asking]
        )
        found: list[TokenLogprob | None] = [None] * len(rows)
        for i, entry in zip(asking, entries, strict=True):
            found[i] = entry if entry.token_id >= 0 else None
        return found

    def _rows_of(self, logits: Tensor, positions: Sequence[int], *, must_copy: bool) -> Tensor:
        if len(positions) == logits.shape[0]:
            return logits.clone() if must_copy else logits
        return logits[torch.tensor(positions, device=logits.device)]


def is_drawn_alone(params: SamplingParams) -> bool:
    """Whether a row with these parameters needs nothing but its logits to choose, and gives nothing but tokens."""
    return not _features(params) & (_COUNTING | _LOGPROBS) and params.prompt_logprobs is None


def _features(params: SamplingParams) -> int:
    """The bits of one row. A greedy row needs no filters: they always keep the best token."""
    found = _LOGPROBS if params.logprobs is not None else 0
    found |= _MASK if RowMask.is_used_by(params) else 0
    found |= _PENALTIES if PenaltyCounts.are_used_by(params) else 0
    if params.temperature < GREEDY_BELOW:
        return found
    found |= _NOISE
    found |= _TOP_K if params.top_k > 0 else 0
    found |= _TOP_P if params.top_p < 1.0 else 0
    found |= _MIN_P if params.min_p > 0.0 else 0
    found |= _TYPICAL_P if params.typical_p < 1.0 else 0
    return found


def _row_keys(stream_keys: np.ndarray, output_indices: Sequence[int]) -> np.ndarray:
    """`noise.row_key` over arrays: stream keys [N] uint64 -> int64."""
    x = stream_keys + np.uint64(noise.GOLDEN) * (np.asarray(output_indices, dtype=np.uint64) + np.uint64(1))
    x = (x ^ (x >> np.uint64(30))) * np.uint64(noise.MIX_1)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(noise.MIX_2)
    return (x ^ (x >> np.uint64(31))).view(np.int64)


def _reason(row: Tensor, *, is_restricted: bool) -> str:
    """Why nothing could be chosen from a row of processed logits [V]."""
    if is_restricted and bool(torch.isneginf(row).all()):
        return InvalidParameter.code
    return NumericalError.code
