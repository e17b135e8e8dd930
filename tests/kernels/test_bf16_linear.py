"""Products of bfloat16 pairs: near the definition, the same bits with every instruction set and in every batch."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from kernels import backend, testing
from kernels.linear import PackedLinear, bf16_instructions, pack_linear

IMPLEMENTATIONS = [name for name in testing.implementations("linear") if name != "triton"]
INSTRUCTIONS = ("generic", "avx512_bf16")
SHAPES = ((1, 1), (33, 17), (64, 257), (130, 600))  # [N, K]: partial panels, odd K, partial chunks, several of each
DTYPES = (torch.float32, torch.float16, torch.bfloat16)

needs_cpp = pytest.mark.skipif("cpp" not in IMPLEMENTATIONS, reason="no C++ compiler")


def random_weight(N: int, K: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return (torch.randn(N, K) / K**0.5).to(dtype)


def packed(name: str, weight: Tensor, bias: Tensor | None = None) -> PackedLinear:
    with backend.using(name):
        return pack_linear(weight, bias, mode="bf16")


def exact(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return x.bfloat16().double() @ weight.bfloat16().double().t() + bias.double()


@contextmanager
def instructions(name: str) -> Iterator[None]:
    """Products are made of these; skips where this CPU or the library lacks them."""
    from kernels.linear.cpp_impl import bf16_isa

    widest = bf16_isa()
    try:
        if bf16_isa(name) != name:
            pytest.skip(f"no {name} here")
        yield
    finally:
        bf16_isa(widest)


@pytest.mark.parametrize("name", ["reference", *IMPLEMENTATIONS])
@pytest.mark.parametrize("dtype", DTYPES)
def test_error_is_near_that_of_a_float32_product_of_the_rounded_operands(name: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    for N, K in SHAPES:
        weight, bias, x = random_weight(N, K, dtype), torch.randn(N), torch.randn(64, K)
        expected = exact(x, weight, bias)
        plain = F.linear(x.bfloat16().float(), weight.bfloat16().float(), bias)
        limit = 4 * (plain - expected).abs().max()  # FBGEMM also loses tiny weights
        product = packed(name, weight, bias)
        for num_tokens in testing.ODD_TOKENS:
            out = testing.nan_filled(num_tokens, N)
            assert product(x[:num_tokens], out=out) is out
            assert ((out - expected[:num_tokens]).abs() <= limit).all()


@needs_cpp
def test_activations_are_really_rounded() -> None:
    x = torch.tensor([[1 + 2.0**-9, 1 + 2.0**-8 + 2.0**-9, -(1 + 3 * 2.0**-8)]])  # below, above and at a tie
    out = packed("cpp", torch.eye(3))(x)
    assert out.tolist() == [[1.0, 1 + 2.0**-7, -(1 + 2.0**-6)]]
    assert torch.equal(out, x.bfloat16().float())


@needs_cpp
@pytest.mark.parametrize("isa", INSTRUCTIONS)
def test_a_row_has_the_same_bits_in_every_batch(isa: str) -> None:
    torch.manual_seed(1)
    weight, bias, x = random_weight(100, 421), torch.randn(100), torch.randn(61, 421)
    product = packed("cpp", weight, bias)
    assert product.is_batch_invariant
    with instructions("generic"):
        expected = product(x)
    with instructions(isa):
        for num_rows in range(1, 62):
            assert torch.equal(product(x[:num_rows]), expected[:num_rows])
            assert torch.equal(product(x[-num_rows:]), expected[-num_rows:])
        assert torch.equal(product(x.flip(0)), expected.flip(0))


@needs_cpp
def test_every_instruction_set_has_the_same_bits_for_every_shape() -> None:
    torch.manual_seed(2)
    for N, K in (*SHAPES, (513, 520)):
        product, x = packed("cpp", random_weight(N, K), torch.randn(N)), torch.randn(70, K) * torch.randn(70, K).exp()
        with instructions("generic"):
            expected = product(x)
        with instructions("avx512_bf16"):
            assert torch.equal(product(x), expected)


@needs_cpp
def test_threads_change_no_bit() -> None:
    torch.manual_seed(3)
    product, x = packed("cpp", random_weight(513, 520)), torch.randn(200, 520)
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


@pytest.mark.parametrize("name", ["reference", *IMPLEMENTATIONS])
def test_infinities_and_nan_stay_in_their_rows_and_columns(name: str) -> None:
    torch.manual_seed(4)
    weight, x = random_weight(35, 301), torch.randn(14, 301)
    clean = packed(name, weight)(x)
    x[3, 7], x[5, 300] = float("inf"), float("nan")
    weight[2, 0], weight[9, 150] = float("-inf"), float("nan")
    out = packed(name, weight)(x)
    assert not out[[3, 5]].isfinite().any()
    assert not out[:, [2, 9]].isfinite().any()
    rows = [row for row in range(14) if row not in (3, 5)]
    columns = [column for column in range(35) if column not in (2, 9)]
    testing.assert_close(out[rows][:, columns], clean[rows][:, columns])


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_strided_operands(name: str) -> None:
    torch.manual_seed(5)
    weight, x = random_weight(40, 48), torch.randn(7, 48)
    expected = packed("reference", weight)(x)
    columns = torch.empty(48, 7).t().copy_(x)
    for w in (weight, testing.strided(weight), weight.t().contiguous().t()):
        product = packed(name, w)
        for rows in (x, testing.strided(x), columns):
            testing.assert_close(product(rows), expected)


@needs_cpp
def test_no_inputs_leave_the_bias() -> None:
    bare = packed("cpp", torch.empty(5, 0), torch.arange(5.0))
    assert torch.equal(bare(torch.empty(3, 0)), torch.arange(5.0).expand(3, 5))


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_rows_are_those_of_the_rounded_weight_which_is_not_kept(name: str) -> None:
    weight = random_weight(45, 531)
    expected, gone = weight.bfloat16().float(), weakref.ref(weight)
    product = packed(name, weight)
    del weight
    assert gone() is None
    ids = torch.arange(44, -1, -1)
    if not product.holds_rows:
        with pytest.raises(NotImplementedError, match="keep the embedding table"):
            product.rows(ids)
        return
    assert torch.equal(product.rows(ids), expected[ids])
    with pytest.raises(IndexError, match="the weight has 45 rows"):
        product.rows(torch.tensor([45]))


@needs_cpp
def test_a_weight_takes_two_bytes() -> None:
    assert packed("cpp", random_weight(64, 10)).nbytes == 64 * 10 * 2
    assert packed("cpp", random_weight(33, 11), torch.zeros(33)).nbytes == 64 * 12 * 2 + 64 * 4


def test_other_devices_and_types_are_refused() -> None:
    with pytest.raises(ValueError, match="mode 'bf16' runs on CPU only, the weight is on meta"):
        pack_linear(torch.empty(4, 4, device="meta"), mode="bf16")
    for name in IMPLEMENTATIONS:
        with pytest.raises(ValueError, match="activations"):
            packed(name, random_weight(5, 8))(torch.zeros(2, 8, dtype=torch.float64))


def test_the_report_names_the_instructions() -> None:
    with backend.using("torch"):
        assert bf16_instructions() == "plain torch (torch), which wins nothing over fp32 activations"
    if "cpp" in IMPLEMENTATIONS:
        with backend.using("cpp"), instructions("generic"):
            assert bf16_instructions() == "fp32 ones (no AVX512-BF16 here), which win nothing over fp32 activations"
