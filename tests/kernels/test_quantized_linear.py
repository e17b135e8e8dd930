"""Quantised products: every implementation and instruction set has the bits of the definition, whatever the batch."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from kernels import backend, testing
from kernels.linear import QUANTIZED, PackedLinear, pack_linear, quantized_instructions
from kernels.linear.quantized import FORMATS, dequantize, quantize, round_rows

IMPLEMENTATIONS = [name for name in testing.implementations("linear") if name != "triton"]
INSTRUCTIONS = ("generic", "avx2", "avx_vnni", "avx512_vnni")
SHAPES = ((1, 1), (33, 17), (64, 257), (130, 600))  # [N, K]: partial panels, partial groups, several of each
DTYPES = (torch.float32, torch.float16, torch.bfloat16)

needs_cpp = pytest.mark.skipif("cpp" not in IMPLEMENTATIONS, reason="no C++ compiler")


def random_weight(N: int, K: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return (torch.randn(N, K) / K**0.5).to(dtype)


def random_rows(T: int, K: int) -> Tensor:
    """Values of very different sizes, as activations have them."""
    return torch.randn(T, K) * torch.randn(T, K).exp()


def packed(name: str, weight: Tensor, bias: Tensor | None = None, mode: str = "int8") -> PackedLinear:
    with backend.using(name):
        return pack_linear(weight, bias, mode=mode)


@contextmanager
def instructions(name: str) -> Iterator[None]:
    """Products of the native library are made of these; skips where this CPU or the library lacks them."""
    from kernels.linear.cpp_impl import quantized_isa

    widest = quantized_isa()
    try:
        if quantized_isa(name) != name:
            pytest.skip(f"no {name} here")
        yield
    finally:
        quantized_isa(widest)


@pytest.mark.parametrize("mode", QUANTIZED)
def test_the_definition_is_the_exact_product_of_what_the_codes_stand_for(mode: str) -> None:
    torch.manual_seed(0)
    for N, K in SHAPES:
        weight, bias, x = random_weight(N, K), torch.randn(N), random_rows(9, K)
        rounded = round_rows(x, FORMATS[mode].group)
        x_values = (rounded.codes.double() * rounded.scales.double()[..., None]).flatten(1)[:, :K]
        w_values = dequantize(quantize(weight, FORMATS[mode]), K).double()
        exact = x_values @ w_values.t() + bias.double()
        out = packed("reference", weight, bias, mode)(x)
        assert ((out - exact).abs() <= 1e-5 * exact.abs().max()).all()


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize("mode", QUANTIZED)
@pytest.mark.parametrize("dtype", DTYPES)
def test_implementations_have_the_bits_of_the_definition(name: str, mode: str, dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    for N, K in SHAPES:
        weight, bias, x = random_weight(N, K, dtype), torch.randn(N), random_rows(30, K)
        expected = packed("reference", weight, bias, mode)
        product = packed(name, weight, bias, mode)
        assert product.is_batch_invariant
        ids = torch.arange(N - 1, -1, -1)
        assert torch.equal(product.rows(ids), expected.rows(ids))
        for num_tokens in (0, 1, 2, 7, 30):
            out = testing.nan_filled(num_tokens, N)
            assert product(x[:num_tokens], out=out) is out
            assert torch.equal(out, expected(x[:num_tokens]))


@needs_cpp
@pytest.mark.parametrize("isa", INSTRUCTIONS)
@pytest.mark.parametrize("mode", QUANTIZED)
def test_every_instruction_set_has_the_same_bits_in_every_batch(isa: str, mode: str) -> None:
    torch.manual_seed(2)
    weight, bias, x = random_weight(100, 420), torch.randn(100), random_rows(37, 420)
    expected = packed("reference", weight, bias, mode)(x)
    product = packed("cpp", weight, bias, mode)
    with instructions(isa):
        for num_rows in range(1, 38):
            assert torch.equal(product(x[:num_rows]), expected[:num_rows])
            assert torch.equal(product(x[-num_rows:]), expected[-num_rows:])
        assert torch.equal(product(x.flip(0)), expected.flip(0))


@needs_cpp
@pytest.mark.parametrize("mode", QUANTIZED)
def test_threads_change_no_bit(mode: str) -> None:
    torch.manual_seed(3)
    product, x = packed("cpp", random_weight(513, 520), mode=mode), random_rows(200, 520)
    num_threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        single = product(x)
        for threads in (2, 5):
            torch.set_num_threads(threads)
            assert torch.equal(product(x), single)
            assert torch.equal(torch.cat([product(row[None]) for row in x[:6]]), single[:6])
    finally:
        torch.set_num_threads(num_threads)


@needs_cpp
@pytest.mark.parametrize("isa", INSTRUCTIONS)
@pytest.mark.parametrize("mode", QUANTIZED)
def test_the_largest_sums_do_not_saturate(isa: str, mode: str) -> None:
    """All codes at their ends over a long K: 16 bits would overflow with the second product."""
    weight, x = torch.full((33, 4864), 1.0), torch.full((14, 4864), 1.0)
    weight[::2], x[::3] = -1.0, -1.0
    with instructions(isa):
        out = packed("cpp", weight, mode=mode)(x)
    exact = x.double() @ weight.double().t()
    torch.testing.assert_close(out, (exact * (out[1, 1] / 4864)).float(), rtol=1e-5, atol=0)
    assert abs(out[1, 1] / 4864 - 1) < 0.01


@pytest.mark.parametrize("mode", QUANTIZED)
def test_a_weight_is_off_by_half_a_step_of_its_group_and_zero_stays_zero(mode: str) -> None:
    torch.manual_seed(4)
    form, weight = FORMATS[mode], random_weight(40, 500)
    weight[3, 64:256], weight[5, 7] = 0.0, 0.0
    codes = quantize(weight, form)
    error = (dequantize(codes, 500) - weight).abs()
    # with a zero of its own, rounding it may cut the last half step off
    steps = codes.scales.repeat_interleave(form.group, 1)[:, :500]
    assert (error <= steps * (0.501 if form.is_symmetric else 1.001)).all()
    assert (dequantize(codes, 500)[weight == 0] == 0).all()
    for name in IMPLEMENTATIONS:
        assert torch.equal(packed(name, weight, mode=mode).rows(torch.arange(40)), dequantize(codes, 500))


@pytest.mark.parametrize("name", ["reference", *IMPLEMENTATIONS])
@pytest.mark.parametrize("mode", QUANTIZED)
def test_infinities_and_nan_stay_in_their_rows_and_columns(name: str, mode: str) -> None:
    torch.manual_seed(5)
    weight, x = random_weight(35, 300), random_rows(14, 300)
    clean = packed(name, weight, mode=mode)(x)
    x[3, 7], x[5, 299] = float("inf"), float("nan")
    weight[2, 0], weight[9, 150] = float("-inf"), float("nan")
    out = packed(name, weight, mode=mode)(x)
    assert not out[[3, 5]].isfinite().any()
    assert not out[:, [2, 9]].isfinite().any()
    rows = [row for row in range(14) if row not in (3, 5)]
    columns = [column for column in range(35) if column not in (2, 9)]
    assert torch.equal(out[rows][:, columns], clean[rows][:, columns])


@pytest.mark.parametrize("name", ["reference", *IMPLEMENTATIONS])
@pytest.mark.parametrize("mode", QUANTIZED)
def test_tiny_and_huge_values_round_like_any_other(name: str, mode: str) -> None:
    torch.manual_seed(6)
    weight, x = random_weight(20, 130), torch.randn(4, 130)
    expected = packed("reference", weight, mode=mode)(x)
    for factor in (2.0**-60, 2.0**60):
        assert torch.equal(packed(name, weight, mode=mode)(x * factor), expected * factor)
        assert torch.equal(packed(name, weight * factor, mode=mode)(x), expected * factor)
    assert not packed(name, weight, mode=mode)(torch.full((1, 130), 1e-38)).any()  # below what a scale can undo


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize("mode", QUANTIZED)
def test_strided_operands_and_no_inputs(name: str, mode: str) -> None:
    torch.manual_seed(7)
    weight, x = random_weight(40, 48), random_rows(7, 48)
    expected = packed("reference", weight, mode=mode)(x)
    columns = torch.empty(48, 7).t().copy_(x)
    for w in (weight, testing.strided(weight), weight.t().contiguous().t()):
        product = packed(name, w, mode=mode)
        for rows in (x, testing.strided(x), columns):
            assert torch.equal(product(rows), expected)
    bare = packed(name, torch.empty(5, 0), torch.arange(5.0), mode)
    assert torch.equal(bare(torch.empty(3, 0)), torch.arange(5.0).expand(3, 5))


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize("mode", QUANTIZED)
def test_the_source_is_not_kept(name: str, mode: str) -> None:
    weight, bias = random_weight(8, 8), torch.randn(8)
    gone = weakref.ref(weight)
    product = packed(name, weight, bias, mode)
    before = product(torch.ones(1, 8))
    weight.zero_()
    bias.zero_()
    assert torch.equal(product(torch.ones(1, 8)), before)
    del weight
    assert gone() is None


@needs_cpp
def test_a_weight_takes_8_125_or_4_5_bits() -> None:
    weight = random_weight(64, 256, torch.bfloat16)
    assert packed("cpp", weight, mode="int8").nbytes * 8 == 64 * 256 * 8.125
    assert packed("cpp", weight, mode="int4").nbytes * 8 == 64 * 256 * 4.5


@pytest.mark.parametrize("mode", QUANTIZED)
def test_other_devices_and_types_are_refused(mode: str) -> None:
    with pytest.raises(ValueError, match=f"mode '{mode}' runs on CPU only, the weight is on meta"):
        pack_linear(torch.empty(4, 4, device="meta"), mode=mode)
    product = pack_linear(random_weight(5, 8), mode=mode)
    with pytest.raises(ValueError, match="activations"):
        product(torch.zeros(2, 8, dtype=torch.float64))
    with pytest.raises(IndexError, match="the weight has 5 rows"):
        product.rows(torch.tensor([5]))


def test_the_report_names_the_instructions() -> None:
    with backend.using("torch"):
        assert quantized_instructions() == "plain torch (torch), which is slow"
    if "cpp" in IMPLEMENTATIONS:
        with backend.using("cpp"):
            assert quantized_instructions() in INSTRUCTIONS
