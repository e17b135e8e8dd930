"""Row gathers are exact; 16-bit tables widen to float32 on CPU without a rounding."""

from __future__ import annotations

import math

import pytest
import torch

import kernels
from kernels import backend, testing

OP = "embedding"


@pytest.mark.parametrize("name", testing.implementations(OP))
@pytest.mark.parametrize("dtype", testing.FLOAT_DTYPES)
@pytest.mark.parametrize("num_tokens", testing.ODD_TOKENS)
@pytest.mark.parametrize("size", [20, 64])
def test_embedding_is_exact(name: str, dtype: torch.dtype, num_tokens: int, size: int) -> None:
    if not testing.runs_dtype(name, dtype):
        pytest.skip("Triton's interpreter computes bfloat16 wrongly")
    generator = torch.Generator().manual_seed(num_tokens)
    device = testing.device_of(name)
    table = torch.randn(50, size, generator=generator).to(dtype).to(device)
    ids = torch.randint(50, (num_tokens,), generator=generator).to(device)
    with backend.using(name):
        got = kernels.embedding(ids, table)
    assert got.dtype == (torch.float32 if device.type == "cpu" else dtype)
    assert torch.equal(got, table[ids].to(got.dtype))


@pytest.mark.parametrize("name", testing.implementations(OP))
@pytest.mark.parametrize("dtype", testing.FLOAT_DTYPES)
def test_gather_rows_keeps_the_type_and_takes_strided_rows(name: str, dtype: torch.dtype) -> None:
    device = testing.device_of(name)
    x = testing.strided(torch.randn(9, 24).to(dtype).to(device))
    rows = torch.tensor([8, 0, 0, 3], device=device)
    with backend.using(name):
        got = kernels.gather_rows(x, rows)
    assert got.dtype == dtype
    assert torch.equal(got, x[rows])


@pytest.mark.parametrize("name", testing.implementations(OP))
@pytest.mark.parametrize("dtype", testing.FLOAT_DTYPES)
def test_the_last_row_of_every_segment_is_gathered(name: str, dtype: torch.dtype) -> None:
    device = testing.device_of(name)
    x = testing.strided(torch.randn(9, 37).to(dtype).to(device))
    starts = torch.tensor([0, 1, 4, 8, 9], dtype=torch.int32, device=device)
    with backend.using(name):
        last, is_finite = kernels.gather_last(x, starts)
    assert is_finite
    assert last.dtype == dtype
    assert torch.equal(last, x[[0, 3, 7, 8]])


@pytest.mark.parametrize("name", testing.implementations(OP))
@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("place", [(0, 0), (5, 36), (8, 17)])
def test_an_element_that_is_not_finite_is_found_in_any_row(name: str, value: float, place: tuple[int, int]) -> None:
    x = torch.randn(9, 37, device=testing.device_of(name))
    x[place] = value
    with backend.using(name):
        assert not kernels.gather_last(x, torch.tensor([0, 4, 9], dtype=torch.int32, device=x.device))[1]


@pytest.mark.parametrize("name", testing.implementations(OP))
def test_large_numbers_whose_sum_is_not_finite_are_finite(name: str) -> None:
    x = torch.full((4, 40), 3e38, device=testing.device_of(name))
    with backend.using(name):
        assert kernels.gather_last(x, torch.tensor([0, 4], dtype=torch.int32, device=x.device))[1]


def test_wrong_arguments_are_named() -> None:
    with pytest.raises(ValueError, match=r"table must be \[rows, H\] float"):
        kernels.embedding(torch.tensor([0]), torch.zeros(3, 4, dtype=torch.int32))
    with pytest.raises(ValueError, match=r"ids must be \[n\] int64"):
        kernels.embedding(torch.tensor([0], dtype=torch.int32), torch.zeros(3, 4))
    with pytest.raises(ValueError, match=r"x must be \[rows, H\] float"):
        kernels.gather_last(torch.zeros(3, 4, dtype=torch.int32), torch.tensor([0, 3], dtype=torch.int32))
    with pytest.raises(ValueError, match=r"cu_seqlens must be \[R \+ 1\] int32"):
        kernels.gather_last(torch.zeros(3, 4), torch.tensor([0, 3]))
