"""Bounds of blocks: what they are, what they promise, and that they follow a cache that grows and rolls back."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels import backend, bound_scores, native, testing, update_bounds

OP = "block_bounds"
IMPLEMENTATIONS = testing.implementations(OP)
BLOCK_SIZE = 4


def caches(dtype: torch.dtype, dim: int = 20, num_blocks: int = 7) -> tuple[Tensor, Tensor]:
    """Keys of layer 1 of a pool, strided as in the engine, and bounds of NaN."""
    generator = torch.Generator().manual_seed(0)
    keys = torch.randn(num_blocks, 2, 3, BLOCK_SIZE, dim, generator=generator).to(dtype)[:, 1]
    return keys, testing.nan_filled(num_blocks, 2, 3, 2, dim, dtype=dtype)[:, 1]


def update(name: str, keys: Tensor, bounds: Tensor, slots: list[int]) -> Tensor:
    device = testing.device_of(name)
    there = bounds.to(device)
    with backend.using(name):
        update_bounds(keys.to(device), there, torch.tensor(slots, dtype=torch.int64, device=device))
    return there.cpu()


def score(name: str, q: Tensor, bounds: Tensor, table: Tensor, seq_lens: list[int], block_size: int) -> Tensor:
    device = testing.device_of(name)
    lens = torch.tensor(seq_lens, dtype=torch.int32, device=device)
    with backend.using(name):
        return bound_scores(q.to(device), bounds.to(device), table.to(device), lens, block_size=block_size).cpu()


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", testing.FLOAT_DTYPES)
def test_bounds_are_those_of_the_filled_slots_and_no_other_block_changes(name: str, dtype: torch.dtype) -> None:
    if not testing.runs_dtype(name, dtype):
        pytest.skip("the interpreter computes bfloat16 wrongly")
    keys, bounds = caches(dtype)
    keys[4, :, 2:] = torch.nan  # not filled yet
    slots = [-1, -1, 5, 6, 7, 12, -1, 16, 17, 27]
    found = update(name, keys, bounds, slots)
    for block, filled in ((1, 4), (3, 1), (4, 2), (6, 4)):
        assert torch.equal(found[block, :, 0], keys[block, :, :filled].amin(1))
        assert torch.equal(found[block, :, 1], keys[block, :, :filled].amax(1))
    assert found[[0, 2, 5]].isnan().all()


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_what_was_rolled_back_is_forgotten(name: str) -> None:
    keys, bounds = caches(torch.float32)
    bounds = update(name, keys, bounds, [8, 9, 10, 11])
    keys[2, :, 1:] = 100.0  # rejected, and overwritten from slot 9 on
    keys[2, :, 1] = 0.0
    bounds = update(name, keys, bounds, [9])
    assert torch.equal(bounds[2, :, 1], keys[2, :, :2].amax(1))


@pytest.mark.parametrize("name", [*IMPLEMENTATIONS, "reference"])
def test_hand_checked_bounds(name: str) -> None:
    pages = [[(1, -2), (3, 1)], [(-1, 0), (2, 2)], [(0, -3), (1, 1)]]
    keys = torch.tensor(pages, dtype=torch.float32).unsqueeze(1)  # [3, 1, 2, 2]
    bounds = update(name, keys, testing.nan_filled(3, 1, 2, 2), [0, 1, 2, 3, 4, 5])
    q, table = torch.tensor([[[1.0, -1.0]]]), torch.tensor([[0, 1, 2]], dtype=torch.int32)
    assert score(name, q, bounds, table, [6], 2).flatten().tolist() == [5, 2, 4]


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("group", [1, 3])
def test_scores_agree_with_the_definition(name: str, dtype: torch.dtype, group: int) -> None:
    keys, bounds = caches(dtype)
    bounds = update("reference", keys, bounds, list(range(28)))
    generator = torch.Generator().manual_seed(1)
    q = torch.randn(4, 2, 3 * group, 20, generator=generator)[:, 1]
    table = torch.full((4, 5), 1 << 20, dtype=torch.int32)  # entries beyond a row's blocks are never read
    seq_lens = [9, 0, 20, 1]
    for row, length in enumerate(seq_lens):
        table[row, : -(-length // BLOCK_SIZE)] = torch.randperm(7, generator=generator)[: -(-length // BLOCK_SIZE)]
    expected = score("reference", q, bounds, table, seq_lens, BLOCK_SIZE)
    found = score(name, q, bounds, table, seq_lens, BLOCK_SIZE)
    assert torch.equal(found == -torch.inf, expected == -torch.inf)
    testing.assert_close(found, expected, dtype=torch.float32, factor=2)
    assert found[1].eq(-torch.inf).all()


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**31), st.sampled_from([1, 3, 16]), st.sampled_from([1, 8, 20, 64]), st.integers(1, 4))
def test_no_logit_is_above_its_bound(seed: int, block_size: int, dim: int, group: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    keys = torch.randn(5, 2, block_size, dim, generator=generator) * 3
    q = torch.randn(1, 2 * group, dim, generator=generator)
    name = "cpp" if "cpp" in IMPLEMENTATIONS else "torch"
    bounds = update(name, keys, testing.nan_filled(5, 2, 2, dim), list(range(5 * block_size)))
    found = score(name, q, bounds, torch.arange(5, dtype=torch.int32).view(1, 5), [5 * block_size], block_size)[0]
    logits = torch.einsum("hgd,bhsd->hbgs", q[0].double().unflatten(0, (2, group)), keys.double())
    largest = logits.amax((2, 3))  # [H_kv, blocks]
    assert (found >= largest - 1e-5 * largest.abs().clamp(min=1)).all()
    if block_size == 1:
        torch.testing.assert_close(found, largest.float(), atol=1e-4, rtol=1e-5)


@pytest.mark.skipif("cpp" not in IMPLEMENTATIONS, reason="needs the native library")
def test_the_number_of_threads_changes_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(2)
    keys = torch.randn(400, 2, 16, 64, generator=generator)
    q, table = torch.randn(3, 8, 64, generator=generator), torch.arange(400, dtype=torch.int32).expand(3, -1)
    results = []
    for num_threads in (1, 4):
        monkeypatch.setattr(native, "num_threads", lambda n=num_threads: n)
        bounds = update("cpp", keys, testing.nan_filled(400, 2, 2, 64), list(range(6400)))
        results.append((bounds, score("cpp", q, bounds, table, [6400, 100, 17], 16)))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_nothing_to_do(name: str) -> None:
    keys, bounds = caches(torch.float32)
    assert update(name, keys, bounds, []).isnan().all()
    empty = score(name, torch.zeros(0, 3, 20), bounds, torch.zeros(0, 2, dtype=torch.int32), [], BLOCK_SIZE)
    assert empty.shape == (0, 3, 2)


def test_wrong_arguments_are_named() -> None:
    keys, bounds = caches(torch.float32)
    slots = torch.zeros(1, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"need \[NB, 3, 2, 20\] float"):
        update_bounds(keys, bounds[:, :2], slots)
    with pytest.raises(ValueError, match=r"need the cache's torch\.float32"):
        update_bounds(keys, bounds.half(), slots)
    with pytest.raises(ValueError, match=r"slots must be \[T\] int64"):
        update_bounds(keys, bounds, slots.int())
    table, lens = torch.zeros(1, 2, dtype=torch.int32), torch.ones(1, dtype=torch.int32)
    with pytest.raises(ValueError, match="a multiple of 3"):
        bound_scores(torch.zeros(1, 4, 20), bounds, table, lens, block_size=4)
    with pytest.raises(ValueError, match="q has 2 rows"):
        bound_scores(torch.zeros(2, 3, 20), bounds, table, lens, block_size=4)
