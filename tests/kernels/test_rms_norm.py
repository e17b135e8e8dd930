"""RMS normalisation agrees with a float64 definition, alone and fused with the residual addition."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import kernels
from kernels import backend, testing

IMPLEMENTATIONS = testing.implementations("rms_norm")
SHAPES = ((0, 8), (1, 1), (7, 20), (33, 64), (3, 1031), (40, 512))
EPS = 1e-5

CASES = [(name, dtype) for name in IMPLEMENTATIONS for dtype in testing.FLOAT_DTYPES if testing.runs_dtype(name, dtype)]


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 3).to(dtype)


def normed(name: str, x: Tensor, weight: Tensor) -> Tensor:
    device = testing.device_of(name)
    out = testing.nan_filled(*x.shape, dtype=x.dtype, device=device)
    with backend.using(name):
        assert kernels.rms_norm(x.to(device), weight.to(device), EPS, out=out) is out
    return out.cpu()


def added(name: str, x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    device = testing.device_of(name)
    residual = residual.to(device, copy=True)
    with backend.using(name):
        out = kernels.add_rms_norm(x.to(device), residual, weight.to(device), EPS)
    return out.cpu(), residual.cpu()


@pytest.mark.parametrize(("name", "dtype"), CASES)
@pytest.mark.parametrize("shape", SHAPES)
def test_agrees_with_the_definition(name: str, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    x, weight = random(*shape, dtype=dtype), random(shape[1], dtype=dtype, seed=1)
    testing.assert_close(normed(name, x, weight), normed("reference", x, weight))


@pytest.mark.parametrize(("name", "dtype"), CASES)
@pytest.mark.parametrize("shape", SHAPES)
def test_fused_addition_agrees_and_rounds_the_sum_first(name: str, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    x, residual = random(*shape, dtype=dtype), random(*shape, dtype=dtype, seed=1)
    weight = random(shape[1], seed=2)
    out, total = added(name, x, residual, weight)
    expected, _ = added("reference", x, residual, weight)
    assert torch.equal(total, (x.float() + residual.float()).to(dtype))
    testing.assert_close(out, expected)


@pytest.mark.parametrize("name", [name for name in IMPLEMENTATIONS if name != "torch"])
def test_float32_error_is_at_most_twice_that_of_plain_torch(name: str) -> None:
    x, weight = random(50, 896), random(896, seed=1)
    exact = x.double() / (x.double().square().mean(-1, keepdim=True) + EPS).sqrt() * weight.double()
    testing.assert_at_most_twice_the_error(normed(name, x, weight), normed("torch", x, weight), exact)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_normalises_heads_inside_a_fused_projection_in_place(name: str) -> None:
    device = testing.device_of(name)
    qkv, weight = random(5, 4 * 20).to(device), random(20, seed=1).to(device)
    before = qkv.clone()
    heads = qkv[:, 20:60].unflatten(1, (2, 20))
    expected = normed("reference", heads.reshape(10, 20).cpu(), weight.cpu()).view(5, 40)
    with backend.using(name):
        kernels.rms_norm(heads, weight, EPS, out=heads)
    testing.assert_close(qkv[:, 20:60], expected)
    assert torch.equal(qkv[:, :20], before[:, :20])
    assert torch.equal(qkv[:, 60:], before[:, 60:])


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_takes_rows_that_lie_apart(name: str) -> None:
    x, residual, weight = random(6, 24), random(6, 24, seed=1), random(24, seed=2)
    testing.assert_close(normed(name, testing.strided(x), weight), normed("reference", x, weight))
    device = testing.device_of(name)
    total = testing.strided(residual.to(device))
    with backend.using(name):
        out = kernels.add_rms_norm(testing.strided(x.to(device)), total, weight.to(device), EPS)
    testing.assert_close(out, added("reference", x, residual, weight)[0])
    assert torch.equal(total.cpu(), x + residual)


@pytest.mark.skipif("cpp" not in IMPLEMENTATIONS, reason="no C++ compiler")
def test_the_native_result_of_a_row_does_not_depend_on_the_others() -> None:
    x, weight = random(64, 600), random(600, seed=1)
    whole = normed("cpp", x, weight)
    for i in (0, 17, 63):
        assert torch.equal(normed("cpp", x[i : i + 1], weight)[0], whole[i])


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_zero_rows_stay_zero_and_nan_stays_in_its_row(name: str) -> None:
    x = torch.zeros(3, 20)
    x[1, 3] = float("nan")
    out = normed(name, x, torch.ones(20))
    assert torch.equal(out[[0, 2]], torch.zeros(2, 20))
    assert out[1].isnan().all()


def test_wrong_arguments_are_named() -> None:
    x, weight = torch.zeros(2, 4), torch.ones(4)
    with pytest.raises(ValueError, match=r"x must be \[T, H\] or"):
        kernels.rms_norm(x[0], weight, EPS)
    with pytest.raises(ValueError, match=r"weight is \[3\]"):
        kernels.rms_norm(x, weight[:3], EPS)
    with pytest.raises(ValueError, match=r"out is .* last dim contiguous"):
        kernels.rms_norm(x, weight, EPS, out=torch.zeros(4, 2).t())
    with pytest.raises(ValueError, match=r"x must be \[T, H\] float"):
        kernels.add_rms_norm(x[None], x[None], weight, EPS)
    with pytest.raises(ValueError, match="residual is"):
        kernels.add_rms_norm(x, x.half(), weight, EPS)
