"""Per-row state that outlives a step: token ids and block tables of the running requests.

Plans carry only changes; this table is where they accumulate, so that building a step's batch costs what the step
computes and not what the contexts hold.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from engine.scheduling.plan import Chunk, NewRow


class RowTable:
    """Token ids [rows, max_model_len + 1] and block tables [rows, max_blocks] of the running requests.

    Shape letters: T tokens of a step, R rows of a step, MB blocks of a table.
    """

    def __init__(self, num_rows: int, max_model_len: int, block_size: int) -> None:
        self._block_size = block_size
        max_blocks = -(-max_model_len // block_size) + 1
        # calloc'ed: pages that no request reaches are never touched
        self._token_ids = np.zeros((num_rows, max_model_len + 1), dtype=np.int32)
        self._tables = np.zeros((num_rows, max_blocks), dtype=np.int32)
        self._num_blocks = np.zeros(num_rows, dtype=np.int64)
        self._num_prompt_tokens = np.zeros(num_rows, dtype=np.int64)
        self._batch_rows: tuple[int, ...] = ()
        self._batch_table = np.zeros((0, 0), dtype=np.int32)

    def add(self, new: NewRow) -> None:
        count = len(new.token_ids)
        self._token_ids[new.row, :count] = new.token_ids
        self._num_prompt_tokens[new.row] = new.num_prompt_tokens
        blocks = len(new.block_ids)
        self._tables[new.row, :blocks] = new.block_ids
        self._num_blocks[new.row] = blocks
        self._batch_rows = ()

    def append_blocks(self, row: int, block_ids: Sequence[int]) -> None:
        """Extends a row's table. Doing it twice is harmless, so that a failed step can be run again."""
        count, end = len(block_ids), int(self._num_blocks[row])
        if count == 0 or (end >= count and tuple(self._tables[row, end - count : end].tolist()) == tuple(block_ids)):
            return
        self._tables[row, end : end + count] = block_ids
        self._num_blocks[row] = end + count
        if row not in self._batch_rows:
            return
        if end + count <= self._batch_table.shape[1]:
            self._batch_table[self._batch_rows.index(row), end : end + count] = block_ids
        else:
            self._batch_rows = ()

    def edit_block(self, row: int, index: int, block_id: int) -> None:
        """Puts another block with the same content at `index` of a row's table."""
        self._tables[row, index] = block_id
        self._batch_rows = ()

    def set_token(self, row: int, output_index: int, token_id: int) -> None:
        """Records the chosen token number `output_index` of a row."""
        self._token_ids[row, self._num_prompt_tokens[row] + output_index] = token_id

    def tokens(self, row: int, start: int, end: int) -> np.ndarray:
        """Token ids [start, end) of a row, int32."""
        return self._token_ids[row, start:end]

    def num_prompt_tokens(self, row: int) -> int:
        return int(self._num_prompt_tokens[row])

    def gather(self, chunks: Sequence[Chunk]) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Token ids, positions and slots [T] int64, and lengths of the chunks [R] int64."""
        rows = np.fromiter((chunk.row for chunk in chunks), np.int64, len(chunks))
        starts = np.fromiter((chunk.start for chunk in chunks), np.int64, len(chunks))
        lengths = np.fromiter((chunk.num_tokens for chunk in chunks), np.int64, len(chunks))
        if int(lengths.sum()) == len(chunks):  # pure decode: one token each
            token_rows, positions = rows, starts
        else:
            ends = np.cumsum(lengths)
            token_rows = np.repeat(rows, lengths)
            positions = np.arange(ends[-1]) - np.repeat(ends - lengths - starts, lengths)
        token_ids = self._token_ids[token_rows, positions].astype(np.int64)
        blocks = self._tables[token_rows, positions // self._block_size].astype(np.int64)
        slots = blocks * self._block_size + positions % self._block_size
        return token_ids, positions, slots, lengths

    def block_table(self, rows: Sequence[int], max_len: int) -> Tensor:
        """[R, MB] int32 with room for `max_len` tokens. Copied only when the rows of the step change."""
        key = tuple(rows)
        width = -(-max_len // self._block_size)
        if key != self._batch_rows or width > self._batch_table.shape[1]:
            # some room beyond the need, so that growing contexts do not copy again at every block
            width = min(width + 16, self._tables.shape[1])
            self._batch_table = self._tables[list(key), :width]
            self._batch_rows = key
        return torch.from_numpy(self._batch_table)
