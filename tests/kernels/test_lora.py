"""The grouped low-rank product agrees with its definition, for many adapters in one batch."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

import kernels
from kernels import LoraPart, LoraTable, backend, testing
from kernels.lora.plan import BLOCK_ROWS

IMPLEMENTATIONS = testing.implementations("lora")
CASES = [
    (name, dtype)
    for name in IMPLEMENTATIONS
    for dtype in testing.FLOAT_DTYPES
    if testing.runs_dtype(name, dtype) and (name != "cpp" or dtype == torch.float32)
]
# (N, K, ranks of the adapters' parts, each at its first column): one part, several, odd sizes, the largest rank
LAYOUTS: list[tuple[int, int, list[list[tuple[int, int, int]]]]] = [
    (20, 13, [[(4, 0, 20)]]),
    (70, 100, [[(1, 0, 30), (3, 30, 17)], [(16, 47, 23)], [], [(8, 0, 30), (20, 47, 23)]]),
    (300, 128, [[(64, 0, 300)], [(17, 100, 45)]]),
    (33, 64, [[(256, 0, 33)]]),
]


def random(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def table_of(
    layout: tuple[int, int, list[list[tuple[int, int, int]]]], dtype: torch.dtype, device: torch.device | str = "cpu"
) -> LoraTable:
    """Adapter i + 1 has the parts (rank, first column, columns) of entry i."""
    num_columns, depth, adapters = layout
    table = LoraTable(num_columns, depth, num_adapters=len(adapters) + 1, num_parts=2, device=device, dtype=dtype)
    for index, parts in enumerate(adapters, start=1):
        if parts:
            table.set(
                index,
                [
                    LoraPart(
                        random(rank, depth, seed=index * 10 + first).to(dtype) / depth**0.5,
                        random(width, rank, seed=index * 10 + first + 1).to(dtype) / rank**0.5,
                        0.5 + index,
                        first,
                    )
                    for rank, first, width in parts
                ],
            )
    return table


def added(
    name: str, layout: tuple[int, int, list[list[tuple[int, int, int]]]], y: Tensor, x: Tensor, adapters: list[int]
) -> Tensor:
    device = testing.device_of(name)
    table = table_of(layout, x.dtype, device)
    y = y.to(device, copy=True)
    with backend.using(name):
        kernels.add_lora(y, x.to(device), table, kernels.plan_lora(adapters, device))
    return y.cpu()


def assignment(num_tokens: int, num_adapters: int, seed: int = 0) -> list[int]:
    """Adapters in no order, some tokens without."""
    return np.random.default_rng(seed).integers(0, num_adapters + 1, num_tokens).tolist()


@pytest.mark.parametrize(("name", "dtype"), CASES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("num_tokens", testing.ODD_TOKENS)
def test_agrees_with_the_definition(
    name: str, dtype: torch.dtype, layout: tuple[int, int, list[list[tuple[int, int, int]]]], num_tokens: int
) -> None:
    x, y = random(num_tokens, layout[1], seed=1, dtype=dtype), random(num_tokens, layout[0], seed=2, dtype=dtype)
    adapters = assignment(num_tokens, len(layout[2]))
    testing.assert_close(added(name, layout, y, x, adapters), added("reference", layout, y, x, adapters), factor=2.0)


@pytest.mark.parametrize("name", [name for name in IMPLEMENTATIONS if name != "torch"])
def test_float32_error_is_at_most_twice_that_of_plain_torch(name: str) -> None:
    layout = LAYOUTS[2]
    x, y, adapters = random(33, 128, seed=1), random(33, 300, seed=2), assignment(33, 2)
    exact = added("reference", layout, y.double().float(), x, adapters)
    testing.assert_at_most_twice_the_error(
        added(name, layout, y, x, adapters), added("torch", layout, y, x, adapters), exact
    )


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_tokens_without_an_adapter_are_neither_read_nor_written(name: str) -> None:
    x, y = random(9, 100, seed=1), random(9, 70, seed=2)
    adapters = [0, 1, 0, 3, 0, 2, 0, 4, 0]  # the third has no part in this linear
    x[::2] = float("nan")
    y[4] = float("nan")
    out = added(name, LAYOUTS[1], y, x, adapters)
    assert torch.equal(out[[0, 2, 3, 6, 8]], y[[0, 2, 3, 6, 8]])
    assert out[4].isnan().all()
    assert not torch.equal(out[1], y[1])
    assert out[[1, 5, 7]].isfinite().all()
    assert torch.equal(out[1, 47:], y[1, 47:])  # columns that no part covers


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_takes_rows_that_lie_apart(name: str) -> None:
    device = testing.device_of(name)
    x, y, adapters = random(7, 100, seed=1), random(7, 70, seed=2), assignment(7, 4)
    strided_y = testing.strided(y.to(device))
    with backend.using(name):
        plan = kernels.plan_lora(adapters, device)
        kernels.add_lora(strided_y, testing.strided(x.to(device)), table_of(LAYOUTS[1], x.dtype, device), plan)
    testing.assert_close(strided_y, added("reference", LAYOUTS[1], y, x, adapters), factor=2.0)


@pytest.mark.parametrize("name", [name for name in IMPLEMENTATIONS if name != "torch"])
@pytest.mark.parametrize("layout", LAYOUTS[:3])
def test_a_token_gets_the_same_bits_in_any_batch(
    name: str, layout: tuple[int, int, list[list[tuple[int, int, int]]]]
) -> None:
    num_tokens = 2 * BLOCK_ROWS + 7
    x, y = random(num_tokens, layout[1], seed=1), random(num_tokens, layout[0], seed=2)
    adapters = assignment(num_tokens, len(layout[2]))
    together = added(name, layout, y, x, adapters)
    for part in (slice(0, 1), slice(5, 6), slice(3, 6), slice(10, 27), slice(20, None)):
        assert torch.equal(added(name, layout, y[part], x[part], adapters[part]), together[part])


@pytest.mark.skipif("cpp" not in IMPLEMENTATIONS, reason="no C++ compiler")
def test_native_bits_do_not_depend_on_the_number_of_threads() -> None:
    layout = (640, 512, [[(64, 0, 320), (64, 320, 320)], [(32, 0, 640)]])
    x, y, adapters = random(90, 512, seed=1), random(90, 640, seed=2), assignment(90, 2)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 4):
            torch.set_num_threads(threads)
            results.append(added("cpp", layout, y, x, adapters))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.skipif("cpp" not in IMPLEMENTATIONS, reason="no C++ compiler")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_native_reads_matrices_of_16_bits_beside_those_of_32(dtype: torch.dtype) -> None:
    table = LoraTable(40, 50, num_adapters=3)
    pairs = [(random(8, 50, seed=3), random(40, 8, seed=4)), (random(5, 50, seed=5), random(40, 5, seed=6))]
    table.set(1, [LoraPart(pairs[0][0].to(dtype), pairs[0][1].to(dtype), 0.25)])
    table.set(2, [LoraPart(*pairs[1], 2.0)])
    x, y = random(6, 50, seed=1), random(6, 40, seed=2)
    results = {}
    for name in ("cpp", "reference"):
        results[name] = y.clone()
        with backend.using(name):
            kernels.add_lora(results[name], x, table, kernels.plan_lora([1, 2, 0, 2, 1, 1]))
    testing.assert_close(results["cpp"], results["reference"], factor=2.0)


def test_an_index_can_be_cleared_and_taken_again() -> None:
    table = table_of(LAYOUTS[0], torch.float32)
    with pytest.raises(ValueError, match="adapter index 1 is taken"):
        table.set(1, [LoraPart(torch.ones(2, 13), torch.ones(20, 2), 1.0)])
    num_bytes = table.nbytes
    table.clear(1)
    table.clear(1)
    assert (table.nbytes, table.max_rank, table.parts(1)) == (0, 0, ())
    y = torch.zeros(2, 20)
    kernels.add_lora(y, torch.ones(2, 13), table, kernels.plan_lora([1, 1]))
    assert not y.any()
    table.set(1, [LoraPart(torch.ones(2, 13), torch.ones(20, 2), 0.5)])
    assert 0 < table.nbytes < num_bytes
    kernels.add_lora(y, torch.ones(2, 13), table, kernels.plan_lora([0, 1]))
    assert y.tolist() == [[0.0] * 20, [13.0] * 20]


def test_the_table_keeps_copies_of_its_own() -> None:
    a, b = torch.ones(2, 13), torch.ones(20, 2)
    table = LoraTable(20, 13, num_adapters=2)
    table.set(1, [LoraPart(a, b, 1.0)])
    a.zero_()
    b.zero_()
    y = torch.zeros(1, 20)
    kernels.add_lora(y, torch.ones(1, 13), table, kernels.plan_lora([1]))
    assert (y == 26.0).all()


def test_a_plan_sorts_tokens_by_adapter_and_cuts_them_into_blocks() -> None:
    adapters = [2, 0, 1, 2, 1, 0] + [3] * (BLOCK_ROWS + 1)
    plan = kernels.plan_lora(adapters)
    assert plan.rows[:4].tolist() == [2, 4, 0, 3]
    assert plan.segments == ((1, 0, 2), (2, 2, 4), (3, 4, 4 + BLOCK_ROWS + 1))
    assert plan.blocks.tolist() == [[1, 0, 2], [2, 2, 2], [3, 4, BLOCK_ROWS], [3, 4 + BLOCK_ROWS, 1]]
    assert (plan.num_tokens, plan.num_rows, plan.max_adapter) == (len(adapters), len(adapters) - 2, 3)
    for empty in ([], [0, 0]):
        assert (kernels.plan_lora(empty).num_rows, kernels.plan_lora(empty).segments) == (0, ())


def test_wrong_arguments_are_named() -> None:
    table, plan = table_of(LAYOUTS[0], torch.float32), kernels.plan_lora([1, 1])
    x, y = torch.zeros(2, 13), torch.zeros(2, 20)
    with pytest.raises(ValueError, match=r"y is \[3, 20\].*need \[2, 20\]"):
        kernels.add_lora(torch.zeros(3, 20), x, table, plan)
    with pytest.raises(ValueError, match=r"x is \[2, 13\] torch.float16"):
        kernels.add_lora(y, x.half(), table, plan)
    with pytest.raises(ValueError, match="the plan has adapter 2, the table ends at 1"):
        kernels.add_lora(y, x, table, kernels.plan_lora([1, 2]))
    with pytest.raises(ValueError, match="numbers from 0 on"):
        kernels.plan_lora([-1])
    with pytest.raises(ValueError, match=r"not in 1 \.\. 1"):
        table.set(0, [LoraPart(torch.ones(2, 13), torch.ones(20, 2), 1.0)])
    empty = LoraTable(20, 13, num_adapters=2, num_parts=2)
    with pytest.raises(ValueError, match="0 parts, the table takes 1 to 2"):
        empty.set(1, [])
    for part in (
        LoraPart(torch.ones(2, 12), torch.ones(20, 2), 1.0),
        LoraPart(torch.ones(2, 13), torch.ones(20, 3), 1.0),
        LoraPart(torch.ones(2, 13), torch.ones(20, 2), 1.0, first_column=1),
    ):
        with pytest.raises(ValueError, match="do not fit a linear"):
            empty.set(1, [part])
    halves = [LoraPart(torch.ones(2, 13), torch.ones(11, 2), 1.0, first_column=first) for first in (0, 9)]
    with pytest.raises(ValueError, match="parts overlap"):
        empty.set(1, halves)
    with pytest.raises(ValueError, match="need two float matrices"):
        empty.set(1, [LoraPart(torch.ones(2, 13), torch.ones(20, 2, dtype=torch.float16), 1.0)])
