"""Per-row state that outlives a step: token ids and block tables of the running requests.

Plans carry only changes; this table is where they accumulate, so that building a step's batch costs what the step
computes and not what the contexts hold.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from engine.execution.transfers import to_device
from engine.scheduling.plan import Chunk, NewRow

# Columns that a batch's table has beyond the need, so that growing contexts do not copy it again at every block.
SPARE_BLOCKS = 16
# So many tokens in all, per row that there can be, are gathered one by one; and a draft or two in any case.
TOKENS_PER_ROW = 3
MIN_TOKENS = 128


class StepTensors(NamedTuple):
    """A step's tokens: row r's are [cu_seqlens_q[r], cu_seqlens_q[r + 1])."""

    token_ids: Tensor  # [T] int64
    positions: Tensor  # [T] int64
    slots: Tensor  # [T] int64
    cu_seqlens_q: Tensor  # [R + 1] int32
    seq_lens: Tensor  # [R] int32


class Gathered(NamedTuple):
    """What `RowTable.gather` finds. A later call may write into the same memory."""

    tensors: StepTensors  # on the CPU
    max_seqlen_q: int
    max_seq_len: int


class RowTable:
    """Token ids [rows, max_model_len + 1] and block tables [rows, max_blocks] of the running requests.

    Shape letters: T tokens of a step, R rows of a step, MB blocks of a table.
    """

    def __init__(self, num_rows: int, max_model_len: int, block_size: int, device: torch.device | str = "cpu") -> None:
        """device: where the batch's block table is kept."""
        self._block_size = block_size
        max_blocks = -(-max_model_len // block_size) + 1
        # calloc'ed: pages that no request reaches are never touched
        self._token_ids = np.zeros((num_rows, max_model_len + 1), dtype=np.int32)
        self._tables = np.zeros((num_rows, max_blocks), dtype=np.int32)
        self._token_at = self._token_ids.data  # single entries: several times faster than through numpy
        self._block_at = self._tables.data
        self._num_blocks = [0] * num_rows
        self._num_prompt_tokens = [0] * num_rows
        self._num_dropped = [0] * num_rows  # logical position minus cache slot
        self._decode = _DecodeBuffers(num_rows)
        self._batch = _BatchTable(torch.device(device))

    @property
    def num_rows(self) -> int:
        """Rows that there can be."""
        return len(self._num_blocks)

    def add(self, new: NewRow) -> None:
        count = len(new.token_ids)
        self._token_ids[new.row, :count] = new.token_ids
        self._num_prompt_tokens[new.row] = new.num_prompt_tokens
        blocks = len(new.block_ids)
        self._tables[new.row, :blocks] = new.block_ids
        self._num_blocks[new.row] = blocks
        self._num_dropped[new.row] = 0
        self._batch.forget(new.row)

    def append_blocks(self, row: int, block_ids: Sequence[int]) -> None:
        """Extends a row's table. Doing it twice is harmless, so that a failed step can be run again."""
        if not block_ids:
            return
        count, end = len(block_ids), self._num_blocks[row]
        known = range(max(0, end - count), end)
        if [self._block_at[row, index] for index in known] == list(block_ids):
            return
        self._num_blocks[row] = end + count
        for index, block_id in enumerate(block_ids, start=end):
            self._block_at[row, index] = block_id
            self._batch.set(row, index, block_id)

    def edit_block(self, row: int, index: int, block_id: int) -> None:
        """Puts another block with the same content at `index` of a row's table."""
        self._tables[row, index] = block_id
        self._batch.set(row, index, block_id)

    def compact(self, row: int, block_ids: Sequence[int], num_dropped: int) -> None:
        """The row has this table from now on; its next token goes to slot `position - num_dropped`."""
        count = len(block_ids)
        self._tables[row, :count] = block_ids
        self._num_blocks[row] = count
        self._num_dropped[row] = num_dropped
        self._batch.forget(row)

    def num_dropped(self, row: int) -> int:
        """Tokens of the row that are no longer in the cache."""
        return self._num_dropped[row]

    def block_ids(self, row: int) -> np.ndarray:
        """The row's table, [MB] int32."""
        return self._tables[row, : self._num_blocks[row]]

    def set_token(self, row: int, output_index: int, token_id: int) -> None:
        """Records the chosen token number `output_index` of a row."""
        self._token_at[row, self._num_prompt_tokens[row] + output_index] = token_id

    def write(self, row: int, start: int, token_ids: Sequence[int]) -> None:
        """Puts tokens at positions `start` and on, which may be guesses that others replace later."""
        self._token_ids[row, start : start + len(token_ids)] = token_ids

    def slot(self, row: int, index: int) -> int:
        """Cache slot of the row's slot number `index`."""
        return int(self._block_at[row, index // self._block_size]) * self._block_size + index % self._block_size

    def truncate(self, row: int, num_slots: int) -> None:
        """The row has given back the blocks behind so many slots."""
        self._num_blocks[row] = min(self._num_blocks[row], -(-num_slots // self._block_size))

    def num_free(self, row: int, output_index: int) -> int:
        """How many more tokens the row can hold after the chosen token number `output_index`."""
        return self._token_ids.shape[1] - self._num_prompt_tokens[row] - output_index - 1

    def tokens(self, row: int, start: int, end: int) -> np.ndarray:
        """Token ids [start, end) of a row, int32."""
        return self._token_ids[row, start:end]

    def num_prompt_tokens(self, row: int) -> int:
        return self._num_prompt_tokens[row]

    def gather(self, chunks: Sequence[Chunk]) -> Gathered:
        """The tokens that the chunks compute, and where their keys and values go."""
        num_tokens = sum([chunk.num_tokens for chunk in chunks])
        if num_tokens == len(chunks):
            return self._gather_decode(chunks)
        if num_tokens <= self._decode.max_tokens:
            return self._gather_few(chunks, num_tokens)
        return self._gather_ragged(chunks)

    def _gather_decode(self, chunks: Sequence[Chunk]) -> Gathered:
        """One token each: entry by entry into memory that is kept, which for a few rows beats every array operation."""
        buffers, block_size = self._decode, self._block_size
        max_seq_len = 0
        for i, chunk in enumerate(chunks):
            row, position = chunk.row, chunk.start
            slot = position - self._num_dropped[row]
            buffers.token_ids[i] = self._token_at[row, position]
            buffers.positions[i] = position
            buffers.slots[i] = self._block_at[row, slot // block_size] * block_size + slot % block_size
            buffers.seq_lens[i] = slot + 1
            if slot >= max_seq_len:
                max_seq_len = slot + 1
        return Gathered(buffers.first(len(chunks)), 1, max_seq_len)

    def _gather_few(self, chunks: Sequence[Chunk], num_tokens: int) -> Gathered:
        """As `_gather_decode`, where some rows compute a few tokens: those that a grammar forced, or guesses."""
        buffers, block_size = self._decode, self._block_size
        max_seqlen_q = max_seq_len = i = 0
        for r, chunk in enumerate(chunks):
            row, position, count = chunk.row, chunk.start, chunk.num_tokens
            slot = position - self._num_dropped[row]
            buffers.starts[r] = i
            end = i + count
            while i < end:
                buffers.token_ids[i] = self._token_at[row, position]
                buffers.positions[i] = position
                buffers.slots[i] = self._block_at[row, slot // block_size] * block_size + slot % block_size
                position += 1
                slot += 1
                i += 1
            buffers.seq_lens[r] = slot
            if slot > max_seq_len:
                max_seq_len = slot
            if count > max_seqlen_q:
                max_seqlen_q = count
        buffers.starts[len(chunks)] = i
        return Gathered(buffers.first_ragged(len(chunks), num_tokens), max_seqlen_q, max_seq_len)

    def _gather_ragged(self, chunks: Sequence[Chunk]) -> Gathered:
        rows = np.array([chunk.row for chunk in chunks])
        starts = np.array([chunk.start for chunk in chunks])
        lengths = np.array([chunk.num_tokens for chunk in chunks])
        num_dropped = np.array([self._num_dropped[chunk.row] for chunk in chunks])
        ends = np.cumsum(lengths)
        token_rows = np.repeat(rows, lengths)
        positions = np.arange(ends[-1]) - np.repeat(ends - lengths - starts, lengths)
        index, offset = np.divmod(positions - np.repeat(num_dropped, lengths), self._block_size)
        slots = self._tables[token_rows, index] * np.int64(self._block_size) + offset
        seq_lens = starts + lengths - num_dropped
        tensors = StepTensors(
            token_ids=torch.from_numpy(self._token_ids[token_rows, positions].astype(np.int64)),
            positions=torch.from_numpy(positions),
            slots=torch.from_numpy(slots),
            cu_seqlens_q=torch.from_numpy(np.concatenate(([0], ends)).astype(np.int32)),
            seq_lens=torch.from_numpy(seq_lens.astype(np.int32)),
        )
        return Gathered(tensors, int(lengths.max()), int(seq_lens.max()))

    def block_table(self, rows: Sequence[int], max_len: int) -> Tensor:
        """[R, MB] int32 on the device, with room for `max_len` tokens: what was there before where rows are the same.

        Only changed entries go to the device then; a later call may change the returned tensor.
        """
        width = -(-max_len // self._block_size)
        return self._batch.get(rows, width, self._tables)


class _DecodeBuffers:
    """Memory of the tensors of steps with one or a few tokens per row, and their views by number of rows."""

    def __init__(self, num_rows: int) -> None:
        self.max_tokens = max(MIN_TOKENS, TOKENS_PER_ROW * num_rows)  # beyond, array operations are faster
        token_ids, positions, slots = (torch.zeros(self.max_tokens, dtype=torch.int64) for _ in range(3))
        seq_lens = torch.zeros(num_rows, dtype=torch.int32)
        one_each = torch.arange(num_rows + 1, dtype=torch.int32)
        self._tensors = StepTensors(token_ids, positions, slots, one_each, seq_lens)
        self._starts = torch.zeros(num_rows + 1, dtype=torch.int32)
        self.token_ids, self.positions, self.slots = token_ids.numpy().data, positions.numpy().data, slots.numpy().data
        self.seq_lens, self.starts = seq_lens.numpy().data, self._starts.numpy().data
        # Views are kept: making five in every step takes as long as filling them.
        self._firsts: dict[int, StepTensors] = {}  # by rows
        self._by_tokens: dict[int, tuple[Tensor, Tensor, Tensor]] = {}
        self._by_rows: dict[int, tuple[Tensor, Tensor]] = {}

    def first(self, num_rows: int) -> StepTensors:
        """What belongs to the first rows, with a token each."""
        found = self._firsts.get(num_rows)
        if found is None:
            token_ids, positions, slots, one_each, seq_lens = self._tensors
            found = self._firsts[num_rows] = StepTensors(
                token_ids[:num_rows],
                positions[:num_rows],
                slots[:num_rows],
                one_each[: num_rows + 1],
                seq_lens[:num_rows],
            )
        return found

    def first_ragged(self, num_rows: int, num_tokens: int) -> StepTensors:
        """What belongs to the first rows, with so many tokens in all that begin at `starts`."""
        tokens, rows = self._by_tokens.get(num_tokens), self._by_rows.get(num_rows)
        if tokens is None:
            token_ids, positions, slots, _, _ = self._tensors
            tokens = self._by_tokens[num_tokens] = token_ids[:num_tokens], positions[:num_tokens], slots[:num_tokens]
        if rows is None:
            rows = self._by_rows[num_rows] = self._starts[: num_rows + 1], self._tensors.seq_lens[:num_rows]
        return StepTensors(*tokens, *rows)


class _BatchTable:
    """The block table of the rows that ran last, on the device; written anew only when rows come, go or move."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._is_shared = device.type == "cpu"  # host and device see the same memory
        self._rows: list[int] = []
        self._places: dict[int, int] = {}  # row -> place in the batch
        self._on_host = np.empty((0, 0), dtype=np.int32)
        self._on_device = torch.empty(0, 0, dtype=torch.int32)
        self._edits: dict[tuple[int, int], int] = {}  # (place, index) -> block id that the device does not have yet

    def forget(self, row: int) -> None:
        """The row has a new table."""
        if row in self._places:
            self._rows = []
            self._places = {}

    def set(self, row: int, index: int, block_id: int) -> None:
        place = self._places.get(row)
        if place is None or index >= self._on_host.shape[1]:
            return  # the table is written anew before the entry is needed
        self._on_host[place, index] = block_id
        if not self._is_shared:
            self._edits[place, index] = block_id

    def get(self, rows: Sequence[int], width: int, tables: np.ndarray) -> Tensor:
        rows = list(rows)
        if rows != self._rows or width > self._on_host.shape[1]:
            self._on_host = tables[rows, : min(width + SPARE_BLOCKS, tables.shape[1])]
            on_host = torch.from_numpy(self._on_host)
            self._on_device = on_host if self._is_shared else to_device(on_host.clone(), self._device)
            self._rows = rows
            self._places = {row: place for place, row in enumerate(rows)}
            self._edits = {}
        elif self._edits:
            entries = torch.tensor([(*place, block_id) for place, block_id in self._edits.items()])
            places, indices, block_ids = to_device(entries, self._device).unbind(1)
            self._on_device[places, indices] = block_ids.to(torch.int32)
            self._edits = {}
        return self._on_device
