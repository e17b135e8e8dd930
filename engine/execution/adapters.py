"""The tensor half of low-rank adapters: which row runs with which, and their weights in the model's tables.

Knows rows and indices; never names, keys or requests.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

import kernels
from engine.models.batch import ForwardBatch
from engine.models.lora import DecoderAdapters
from engine.models.lora_file import AdapterWeights, read_adapter
from engine.scheduling.plan import Chunk
from kernels import LoraPlan


class RowAdapters:
    """One model's adapters and the batch rows that use them."""

    def __init__(self, adapters: DecoderAdapters, num_rows: int, max_rank: int, device: torch.device) -> None:
        self._adapters = adapters
        self._max_rank = max_rank
        self._device = device
        self._of_row = np.zeros(num_rows, dtype=np.int64)
        self._planned: tuple[bytes, LoraPlan | None] = (b"", None)  # adapters of a step's tokens -> its plan

    @property
    def num_bytes(self) -> int:
        """Bytes of all adapters held."""
        return self._adapters.num_bytes

    def read(self, folder: Path) -> AdapterWeights:
        """Reads and checks an adapter's files. Raises ConfigError. Takes about as long as reading them twice."""
        return read_adapter(folder, self._adapters.targets, max_rank=self._max_rank)

    def put(self, index: int, weights: AdapterWeights) -> None:
        """Not during a step, like `drop`."""
        self._adapters.add(index, weights)

    def drop(self, index: int) -> None:
        """Gives the adapter's memory back."""
        self._adapters.remove(index)

    def add_row(self, row: int, index: int) -> None:
        """From now on the row's tokens run with that adapter; 0 is none."""
        self._of_row[row] = index

    def add_to(self, batch: ForwardBatch, chunks: Sequence[Chunk]) -> ForwardBatch:
        """The batch of these chunks with the adapters of its tokens; as it is when no token has one."""
        indices = self._of_row[[chunk.row for chunk in chunks]]
        if not indices.any():
            return batch
        if batch.token_ids.shape[0] != len(chunks):
            indices = np.repeat(indices, [chunk.num_tokens for chunk in chunks])
        return dataclasses.replace(batch, adapters=self._plan(indices))

    def _plan(self, indices: np.ndarray) -> LoraPlan | None:
        """Rows that go on decoding have the same plan step after step."""
        key = indices.tobytes()
        if self._planned[0] != key:
            self._planned = key, kernels.plan_lora(indices, self._device)
        return self._planned[1]
