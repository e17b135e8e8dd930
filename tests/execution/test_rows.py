"""Per-row state accumulates what plans bring, once, whatever order and repetition they come in."""

from __future__ import annotations

import numpy as np
import pytest

from engine.execution.rows import RowTable
from engine.scheduling.plan import Chunk, NewRow
from engine.types import SamplingParams

BLOCK_SIZE = 4


def table(num_rows: int = 4, max_model_len: int = 64) -> RowTable:
    return RowTable(num_rows, max_model_len, BLOCK_SIZE)


def new_row(row: int, token_ids: list[int], block_ids: tuple[int, ...] = (), num_computed: int = 0) -> NewRow:
    return NewRow(
        row=row,
        request_id=f"r{row}",
        choice=0,
        token_ids=token_ids,
        num_prompt_tokens=len(token_ids),
        sampling=SamplingParams(),
        block_ids=block_ids,
        num_computed=num_computed,
    )


def chunk(row: int, start: int, num_tokens: int, new_block_ids: tuple[int, ...] = ()) -> Chunk:
    return Chunk(
        row=row,
        start=start,
        num_tokens=num_tokens,
        new_block_ids=new_block_ids,
        is_sampling=False,
        output_index=0,
    )


def test_gather_lays_out_a_ragged_batch() -> None:
    rows = table()
    rows.add(new_row(0, [10, 11, 12, 13, 14, 15], block_ids=(7,), num_computed=4))
    rows.add(new_row(2, [20, 21, 22]))
    rows.append_blocks(0, (3,))
    rows.append_blocks(2, (5,))
    found = rows.gather([chunk(0, 4, 2), chunk(2, 0, 3)])
    assert found.tensors.token_ids.tolist() == [14, 15, 20, 21, 22]
    assert found.tensors.positions.tolist() == [4, 5, 0, 1, 2]
    assert found.tensors.slots.tolist() == [3 * 4, 3 * 4 + 1, 5 * 4, 5 * 4 + 1, 5 * 4 + 2]
    assert found.tensors.cu_seqlens_q.tolist() == [0, 2, 5]
    assert found.tensors.seq_lens.tolist() == [6, 3]
    assert (found.max_seqlen_q, found.max_seq_len) == (3, 6)


def test_rows_that_decode_are_gathered_like_any_others() -> None:
    rows = table()
    for row, length in ((0, 9), (1, 3), (3, 17)):
        rows.add(
            new_row(row, list(range(100 * row, 100 * row + length)), block_ids=tuple(range(10 * row, 10 * row + 5)))
        )
    chunks = [chunk(3, 16, 1), chunk(0, 8, 1), chunk(1, 2, 1)]
    for found in (rows.gather(chunks), rows._gather_ragged(chunks)):
        assert found.tensors.token_ids.tolist() == [316, 8, 102]
        assert found.tensors.positions.tolist() == [16, 8, 2]
        assert found.tensors.slots.tolist() == [34 * 4, 2 * 4, 10 * 4 + 2]
        assert found.tensors.cu_seqlens_q.tolist() == [0, 1, 2, 3]
        assert found.tensors.seq_lens.tolist() == [17, 9, 3]
        assert (found.max_seqlen_q, found.max_seq_len) == (1, 17)
    assert rows.gather(chunks[1:]).tensors.token_ids.tolist() == [8, 102]


def test_rows_with_a_few_tokens_are_gathered_like_any_others() -> None:
    rows = table()
    for row, length in ((0, 9), (1, 5), (3, 17)):
        rows.add(
            new_row(row, list(range(100 * row, 100 * row + length)), block_ids=tuple(range(10 * row, 10 * row + 5)))
        )
    rows.compact(3, (34, 33), num_dropped=11)
    chunks = [chunk(3, 13, 4), chunk(0, 8, 1), chunk(1, 1, 4)]
    assert sum(each.num_tokens for each in chunks) <= rows._decode.max_tokens
    few = rows.gather(chunks)
    kept = [tensor.clone() for tensor in few.tensors]
    many = rows._gather_ragged(chunks)
    assert few[1:] == many[1:] == (4, 9)
    for one, other in zip(kept, many.tensors, strict=True):
        assert one.dtype == other.dtype
        assert one.tolist() == other.tolist()


def test_steps_of_the_same_size_share_their_tensors() -> None:
    """Steps with a few tokens more than rows come in any order: nothing is allocated for one that was there before."""
    rows = table()
    for row in range(3):
        rows.add(new_row(row, list(range(9)), block_ids=(3 * row, 3 * row + 1, 3 * row + 2)))
    first = rows.gather([chunk(0, 4, 2), chunk(1, 5, 1), chunk(2, 3, 1)])
    other = rows.gather([chunk(0, 6, 1), chunk(1, 6, 3), chunk(2, 4, 1)])
    again = rows.gather([chunk(0, 7, 1), chunk(1, 7, 1), chunk(2, 5, 2)])
    assert [tensor.shape[0] for tensor in other.tensors] == [5, 5, 5, 4, 3]
    for one, same in zip(first.tensors, again.tensors, strict=True):
        assert one is same


def test_a_chosen_token_is_the_next_input() -> None:
    rows = table()
    rows.add(new_row(1, [1, 2, 3, 4], block_ids=(9, 8), num_computed=4))
    rows.set_token(1, 0, 42)
    found = rows.gather([chunk(1, 4, 1)])
    assert (found.tensors.token_ids.tolist(), found.tensors.positions.tolist(), found.tensors.slots.tolist()) == (
        [42],
        [4],
        [8 * 4],
    )


def test_appending_the_same_blocks_twice_is_harmless() -> None:
    rows = table()
    rows.add(new_row(0, [1] * 8))
    for _ in range(2):
        rows.append_blocks(0, (3, 4))
    rows.append_blocks(0, (5,))
    assert rows.block_table([0], 12)[0, :3].tolist() == [3, 4, 5]


def test_the_batch_table_follows_growth_edits_and_new_rows() -> None:
    rows = table(max_model_len=512)
    for row, block in ((0, 11), (1, 21)):
        rows.add(new_row(row, [1] * 4, block_ids=(block,)))
    assert rows.block_table([0, 1], 4)[:, 0].tolist() == [11, 21]
    rows.append_blocks(1, (22,))
    assert rows.block_table([0, 1], 8)[1, :2].tolist() == [21, 22]
    rows.edit_block(1, 0, 99)
    assert rows.block_table([0, 1], 8)[1, :2].tolist() == [99, 22]
    rows.add(new_row(0, [1] * 4, block_ids=(12,)))
    assert rows.block_table([0, 1], 8)[0, 0] == 12
    assert rows.block_table([1, 0], 8)[:, 0].tolist() == [99, 12]


def test_a_steady_batch_is_not_copied_again() -> None:
    rows = table(max_model_len=512)
    for row in (0, 1):
        rows.add(new_row(row, [1] * 4, block_ids=(row + 1,)))
    first = rows.block_table([0, 1], 4)
    rows.append_blocks(0, (7,))
    second = rows.block_table([0, 1], 8)
    assert first.data_ptr() == second.data_ptr()
    assert second[0, 1] == 7


@pytest.mark.parametrize("is_shared", [True, False], ids=["on the host", "on a device"])
@pytest.mark.parametrize("seed", range(5))
def test_batch_tables_equal_a_naive_model_under_random_changes(seed: int, is_shared: bool) -> None:
    """A device has memory of its own, to which only changed entries go."""
    generator = np.random.default_rng(seed)
    rows, naive = table(6, 400), {}
    rows._batch._is_shared = is_shared
    for step in range(300):
        row = int(generator.integers(6))
        if row not in naive or generator.random() < 0.05:
            naive[row] = [step + 1000]
            rows.add(new_row(row, [1], block_ids=(step + 1000,)))
        elif len(naive[row]) < 90:
            blocks = [int(b) for b in generator.integers(1, 10**6, size=int(generator.integers(1, 3)))]
            naive[row] += blocks
            rows.append_blocks(row, blocks)
            edited = int(generator.integers(len(naive[row])))
            naive[row][edited] += 1
            rows.edit_block(row, edited, naive[row][edited])
        if step % 3 == 0:  # else the same rows go on, with what changed
            order = [int(r) for r in generator.permutation(sorted(naive))[: int(generator.integers(1, len(naive) + 1))]]
        width = max(len(naive[r]) for r in order)
        got = rows.block_table(order, width * BLOCK_SIZE)
        for i, r in enumerate(order):
            assert got[i, : len(naive[r])].tolist() == naive[r]
