"""Presence, frequency and repetition penalties: token counts of the rows that use them, and of no others.

A row's counts take V * 5 bytes and are kept up to date token by token; nothing is counted again per step.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

import kernels
from engine.types import SamplingParams

_FIRST_SLOTS = 4


class PenaltyCounts:
    """Output counts and prompt masks [slots, V]; a penalised row holds one slot from `add` to `remove`."""

    def __init__(self, logits_size: int, max_rows: int, device: torch.device) -> None:
        self._logits_size = logits_size
        self._device = device
        self._strengths = np.zeros((3, max_rows), dtype=np.float32)  # repetition, presence, frequency of each row
        self._slots: dict[int, int] = {}
        self._free: list[int] = []
        self._output_counts = torch.zeros(0, logits_size, dtype=torch.int32, device=device)
        self._prompt_mask = torch.zeros(0, logits_size, dtype=torch.uint8, device=device)

    @staticmethod
    def are_used_by(params: SamplingParams) -> bool:
        return (params.repetition_penalty, params.presence_penalty, params.frequency_penalty) != (1.0, 0.0, 0.0)

    def add(self, row: int, params: SamplingParams, token_ids: Sequence[int], num_prompt_tokens: int) -> None:
        """token_ids: prompt, then what was generated so far; ids without a logit are not counted."""
        ids = np.asarray(token_ids, dtype=np.int64)
        prompt = self._bincount(ids[:num_prompt_tokens]) > 0
        outputs = self._bincount(ids[num_prompt_tokens:])
        if not self._free:
            self._grow()
        slot = self._free[-1]
        self._prompt_mask[slot] = torch.from_numpy(prompt.astype(np.uint8))
        self._output_counts[slot] = torch.from_numpy(outputs.astype(np.int32))
        self._strengths[:, row] = params.repetition_penalty, params.presence_penalty, params.frequency_penalty
        self._slots[row] = self._free.pop()  # only now: what raised before has taken nothing

    def remove(self, row: int) -> None:
        self._free.append(self._slots.pop(row))

    def count(self, rows: Sequence[int], token_ids: Sequence[int]) -> None:
        """Token token_ids[j] was generated in row rows[j]; rows are distinct and penalised."""
        cells = [self._slots[row] * self._logits_size + token for row, token in zip(rows, token_ids, strict=True)]
        self._output_counts.view(-1)[torch.tensor(cells, device=self._device)] += 1

    def apply(self, logits: Tensor, positions: Sequence[int], rows: Sequence[int]) -> None:
        """Penalise row positions[j] of logits [N, V] by the counts of row rows[j], in place."""
        repetition, presence, frequency = torch.from_numpy(self._strengths.take(rows, axis=1)).to(self._device)
        kernels.apply_penalties(
            logits,
            torch.tensor(positions, device=self._device),
            torch.tensor([self._slots[row] for row in rows], device=self._device),
            self._output_counts,
            self._prompt_mask,
            repetition=repetition,
            presence=presence,
            frequency=frequency,
        )

    def _bincount(self, ids: np.ndarray) -> np.ndarray:
        return np.bincount(ids[ids < self._logits_size], minlength=self._logits_size)

    def _grow(self) -> None:
        before = self._output_counts.shape[0]
        added = max(before, _FIRST_SLOTS)
        counts = torch.cat([self._output_counts, self._output_counts.new_zeros(added, self._logits_size)])
        masks = torch.cat([self._prompt_mask, self._prompt_mask.new_zeros(added, self._logits_size)])
        self._output_counts, self._prompt_mask = counts, masks  # both or, out of memory, neither
        self._free = list(range(before + added - 1, before - 1, -1))
