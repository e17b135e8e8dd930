"""Moves are exact, read a segment before they write it, skip negative addresses, and touch nothing else."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import kernels
from kernels import backend, testing

OP = "move_slots"
IMPLEMENTATIONS = testing.implementations(OP)


def pools(num_rows: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(num_rows, dim, generator=generator).to(dtype).to(device) for dim in (20, 12))  # type: ignore[return-value]


def moved(pool: Tensor, src: Tensor, dst: Tensor) -> Tensor:
    expected = pool.clone()
    for source, destination in zip(src.flatten().tolist(), dst.flatten().tolist(), strict=True):
        if source >= 0 and destination >= 0:
            expected[destination] = pool[source]
    return expected


def check(name: str, src: Tensor, dst: Tensor, num_rows: int, dtype: torch.dtype = torch.float32) -> None:
    device = testing.device_of(name)
    k, v = pools(num_rows, dtype, device)
    expected_k, expected_v = moved(k, src, dst), moved(v, src, dst)
    with backend.using(name):
        kernels.move_slots(k, v, src.to(device), dst.to(device))
    assert torch.equal(k, expected_k)
    assert torch.equal(v, expected_v)


@pytest.mark.parametrize("name", [*IMPLEMENTATIONS, "reference"])
@pytest.mark.parametrize("dtype", testing.FLOAT_DTYPES)
def test_moves_are_exact_and_touch_nothing_else(name: str, dtype: torch.dtype) -> None:
    src = torch.tensor([[3, 4, 9], [12, -1, 17], [20, 21, 22]])
    dst = torch.tensor([[0, 1, 2], [10, 11, -1], [20, 21, 22]])
    check(name, src, dst, 25, dtype)


@pytest.mark.parametrize("name", [*IMPLEMENTATIONS, "reference"])
def test_what_is_overwritten_was_read_before(name: str) -> None:
    check(name, torch.tensor([[0, 1, 2, 3], [7, 6, 5, 4]]), torch.tensor([[1, 2, 3, 0], [4, 5, 6, 7]]), 9)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_many_long_segments(name: str) -> None:
    generator = torch.Generator().manual_seed(1)
    length, num_kept, num_segments = 40, 19, 6
    order = torch.rand(num_segments, length, generator=generator).argsort(dim=1)
    kept = order[:, :num_kept].sort(dim=1).values
    first = torch.arange(num_segments)[:, None] * length
    check(name, first + kept, first + torch.arange(num_kept), num_segments * length)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize("shape", [(0, 4), (3, 0)])
def test_no_pairs_is_a_no_op(name: str, shape: tuple[int, int]) -> None:
    nothing = torch.empty(shape, dtype=torch.int64)
    check(name, nothing, nothing, 5)


def test_wrong_arguments_are_named() -> None:
    k, pairs = torch.zeros(4, 8), torch.zeros(1, 2, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"v must be \[4, D\], contiguous"):
        kernels.move_slots(k, torch.zeros(3, 8), pairs, pairs)
    with pytest.raises(ValueError, match=r"k must be .* contiguous"):
        kernels.move_slots(torch.zeros(8, 4).T, k, pairs, pairs)
    with pytest.raises(ValueError, match=r"src and dst must be \[n_segments, n\] int64"):
        kernels.move_slots(k, k, pairs, pairs.int())
