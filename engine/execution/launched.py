"""Steps that the device runs while the host goes on: which tokens the host does not know yet, and where they are.

Knows rows, chunks and tensors; never requests. Only for rows that want nothing but their next tokens.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from engine.errors import NumericalError
from engine.execution.rows import RowTable
from engine.execution.transfers import HostCopy, to_device
from engine.scheduling.plan import Chunk, ChunkResult, NewRow, StepResult

NO_CHOICE = ChunkResult()
FAILED = ChunkResult(error=NumericalError.code)


class LaunchedStep:
    """Implements `engine.isolation.Pending`.

    awaited   rows whose newest token is on its way
    """

    def __init__(
        self, owner: Launches, rows: RowTable, chunks: Sequence[Chunk], chosen: HostCopy, is_finite: HostCopy | None
    ) -> None:
        """chosen: [N] int64 of the chunks that sample, -1 for none. is_finite: [T] bool of all tokens."""
        self.awaited = {chunk.row for chunk in chunks if chunk.is_sampling}
        self._owner = owner
        self._rows = rows
        self._chunks = chunks
        self._chosen = chosen
        self._is_finite = is_finite

    def forget(self, rows: Collection[int]) -> None:
        """The rows belong to others by now."""
        self.awaited.difference_update(rows)

    def result(self) -> StepResult:
        """Waits for the tokens and records them in their rows."""
        token_ids = iter(self._chosen.wait().tolist())
        is_finite = self._finite_chunks()
        results = []
        for chunk, is_whole in zip(self._chunks, is_finite, strict=True):
            token_id = next(token_ids) if chunk.is_sampling else 0
            if token_id < 0 or not is_whole:
                results.append(FAILED)
            elif not chunk.is_sampling:
                results.append(NO_CHOICE)
            else:
                if chunk.row in self.awaited:
                    self._rows.set_token(chunk.row, chunk.output_index, token_id)
                results.append(ChunkResult((token_id,)))
        self._owner.is_known(self)
        return StepResult(chunks=tuple(results))

    def _finite_chunks(self) -> list[bool]:
        """Whether all hidden states of each chunk are finite."""
        if self._is_finite is None:
            return [True] * len(self._chunks)
        parts = self._is_finite.wait().split([chunk.num_tokens for chunk in self._chunks])
        return [bool(part.all()) for part in parts]


class Launches:
    """The last tokens of all rows, on the device, and the newest step whose tokens are not on the host."""

    def __init__(self, rows: RowTable, device: torch.device) -> None:
        self._rows = rows
        self._device = device
        self._last_tokens = torch.zeros(rows.num_rows, dtype=torch.int64, device=device)
        self._newest: LaunchedStep | None = None

    def take_rows(self, new_rows: Sequence[NewRow]) -> None:
        """Rows that begin anew in the step to come: what the newest one chooses for them is not theirs."""
        if self._newest is not None:
            self._newest.forget([new.row for new in new_rows])

    def fill_in(self, chunks: Sequence[Chunk], token_ids: Tensor) -> None:
        """Puts those of the chunks' tokens [T] int64 in their places that are not on the host."""
        if self._newest is None:
            return
        places, rows = [], []
        place = 0
        for chunk in chunks:
            if chunk.row in self._newest.awaited:
                places.append(place)
                rows.append(chunk.row)
            place += chunk.num_tokens
        if rows:
            at = to_device(torch.tensor([places, rows]), self._device)
            token_ids.index_copy_(0, at[0], self._last_tokens.index_select(0, at[1]))

    def start(self, chunks: Sequence[Chunk], chosen: Tensor, hidden: Tensor) -> LaunchedStep:
        """The step has been queued: chosen [N] int64 of the chunks that sample, hidden [T, C] of all."""
        rows = [chunk.row for chunk in chunks if chunk.is_sampling]
        if rows:
            # where nothing could be chosen the row is over, and what the next step computes for it is thrown away
            at = to_device(torch.tensor(rows), self._device)
            self._last_tokens.index_copy_(0, at, chosen.clamp(min=0))
        is_finite = None
        if not all(chunk.is_decode for chunk in chunks):  # a single token shows in its logits
            is_finite = HostCopy(hidden.isfinite().all(dim=1))
        self._newest = LaunchedStep(self, self._rows, chunks, HostCopy(chosen), is_finite)
        return self._newest

    def is_known(self, step: LaunchedStep) -> None:
        """The tokens of the step are on the host."""
        if self._newest is step:
            self._newest = None
