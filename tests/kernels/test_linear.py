"""Packed linear: every implementation and mode against float64, batch invariance, ranges, fallbacks, errors."""

from __future__ import annotations

import logging
import weakref

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from kernels import backend, linear, testing
from kernels.linear import PackedLinear, pack_linear, torch_impl
from kernels.linear.precision import float16_problem

IMPLEMENTATIONS = testing.implementations("linear")
SHAPES = ((1, 1), (33, 17), (64, 257), (130, 600))  # [N, K]: partial panels, partial chunks, several of each
DTYPES = (torch.float32, torch.float16, torch.bfloat16)

needs_cpp = pytest.mark.skipif("cpp" not in IMPLEMENTATIONS, reason="no C++ compiler")


def random_weight(N: int, K: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return (torch.randn(N, K) / K**0.5).to(dtype)


def packed(name: str, weight: Tensor, bias: Tensor | None = None, mode: str = "auto") -> PackedLinear:
    device = testing.device_of(name)
    with backend.using(name):
        return pack_linear(weight.to(device), None if bias is None else bias.to(device), mode=mode)


# Triton has one mode of its own and no float32 activations for 16-bit weights: it has its own test for those.
CASES = [
    (name, mode, dtype)
    for name in ("reference", *IMPLEMENTATIONS)
    for mode in linear.MODES
    for dtype in DTYPES
    if name != "triton" or (mode, dtype) == ("deterministic", torch.float32)
]


@pytest.mark.parametrize(("name", "mode", "dtype"), CASES)
def test_error_is_at_most_twice_that_of_plain_torch(name: str, mode: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    for N, K in SHAPES[:3] if name == "triton" else SHAPES:
        weight, bias = random_weight(N, K, dtype), torch.randn(N)
        if mode == "fp16":
            weight = weight.half()  # rounding a float32 weight is the point of this mode, not an error of the product
        product = packed(name, weight, bias, mode)
        x = torch.randn(64, K)
        exact = x.double() @ weight.double().t() + bias.double()
        # The yardstick is the whole batch: over one row, or one element, the largest error is a matter of luck.
        limit = 2 * (F.linear(x, weight.float(), bias) - exact).abs().max()
        for num_tokens in testing.ODD_TOKENS:
            out = testing.nan_filled(num_tokens, N)
            assert product(x[:num_tokens], out=out) is out
            assert ((out - exact[:num_tokens]).abs() <= limit).all()


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_no_bias_and_strided_operands(name: str) -> None:
    torch.manual_seed(1)
    weight, x = random_weight(40, 48), torch.randn(7, 48)
    expected = x @ weight.t()
    columns = torch.randn(48, 7).t().copy_(x)
    for w in (weight, testing.strided(weight), weight.t().contiguous().t()):
        product = packed(name, w, mode="deterministic" if name == "triton" else "auto")
        for rows in (x, testing.strided(x), columns):
            testing.assert_close(product(rows), expected)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_deterministic_rows_have_the_same_bits_in_every_batch(name: str) -> None:
    torch.manual_seed(2)
    dtype = torch.float32 if name == "triton" else torch.bfloat16
    product = packed(name, random_weight(70, 600, dtype), torch.randn(70), "deterministic")
    assert product.is_batch_invariant
    x = torch.randn(70, 600)
    full = product(x)
    for num_rows in (1, 40) if name == "triton" else range(1, 40):
        assert torch.equal(product(x[:num_rows]), full[:num_rows])
        assert torch.equal(product(x[30 : 30 + num_rows]), full[30 : 30 + num_rows])
    assert torch.equal(product(x.flip(0)), full.flip(0))


@needs_cpp
@pytest.mark.parametrize("mode", linear.MODES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_panels_are_batch_and_thread_invariant_in_every_mode(mode: str, dtype: torch.dtype) -> None:
    torch.manual_seed(3)
    product = packed("cpp", random_weight(513, 520, dtype), mode=mode)
    assert product.is_batch_invariant
    x = torch.randn(50, 520)
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
@pytest.mark.parametrize("dtype", DTYPES)
def test_panels_keep_infinities_and_nan_in_their_rows(dtype: torch.dtype) -> None:
    torch.manual_seed(4)
    product = packed("cpp", random_weight(35, 300, dtype))
    x = torch.randn(14, 300)
    clean = product(x)
    x[3, 7], x[5, 299] = float("inf"), float("nan")
    result = product(x)
    assert not result[3].isfinite().any()
    assert result[5].isnan().all()
    kept = [row for row in range(14) if row not in (3, 5)]
    assert torch.equal(result[kept], clean[kept])


@needs_cpp
@pytest.mark.parametrize("dtype", DTYPES)
def test_panels_hold_every_value_of_the_weight_exactly(dtype: torch.dtype) -> None:
    weight = torch.randn(45, 530).to(dtype)
    largest = torch.finfo(dtype).max
    weight[0, :4] = torch.tensor([largest, -largest, torch.finfo(dtype).smallest_normal, 0.0], dtype=dtype)
    product = packed("cpp", weight)
    assert product.kind.startswith("panels_")
    ids = torch.arange(44, -1, -1)
    assert torch.equal(product.rows(ids), weight.float()[ids])
    assert torch.equal(product(torch.eye(530)[:3]), weight.float().t()[:3])


@pytest.mark.parametrize("name", ["reference", *IMPLEMENTATIONS])
def test_rows_give_back_the_weight_or_say_that_they_cannot(name: str) -> None:
    weight = random_weight(9, 20)
    for mode in linear.MODES:
        product = packed(name, weight, mode=mode)
        if not product.holds_rows:
            with pytest.raises(NotImplementedError, match="keep the embedding table"):
                product.rows(torch.tensor([0]))
            continue
        ids = torch.tensor([8, 0, 8])
        expected = weight.half().float() if product.kind.endswith("fp16") else weight
        assert torch.equal(product.rows(ids).cpu(), expected[ids])
        assert product.rows(torch.empty(0, dtype=torch.int64)).shape == (0, 20)
        for bad in (-1, 9):
            with pytest.raises(IndexError, match="the weight has 9 rows"):
                product.rows(torch.tensor([bad]))


def test_kinds_by_mode_are_reported() -> None:
    with backend.using("torch"):
        assert linear.available_modes() == {
            "auto": "fbgemm_fp16",
            "fp32": "torch_fp32",
            "fp16": "fbgemm_fp16",
            "deterministic": "torch_rowwise_fp32",
        }


@needs_cpp
def test_kinds_by_mode_are_reported_for_the_native_library() -> None:
    with backend.using("cpp"):
        assert linear.available_modes() == {
            "auto": "panels_bf16",
            "fp32": "panels_fp32",
            "fp16": "panels_bf16",
            "deterministic": "panels_bf16",
        }


@pytest.mark.parametrize("name", [name for name in IMPLEMENTATIONS if name != "triton"])
@pytest.mark.parametrize("value", [65536.0, float("inf"), float("nan")])
def test_a_float32_weight_beyond_float16_stays_float32(
    name: str, value: float, caplog: pytest.LogCaptureFixture
) -> None:
    weight = random_weight(5, 8)
    weight[2, 3] = value
    with caplog.at_level(logging.WARNING):
        product = packed(name, weight, mode="fp16")
    assert product.kind.endswith("fp32")
    assert "float16 ends at 65504" in caplog.text
    assert torch.equal(product(torch.eye(8)[3:4])[0].isfinite(), weight[:, 3].isfinite())


def test_bfloat16_weights_outside_float16_fall_back_per_tensor() -> None:
    large, small = random_weight(5, 8, torch.bfloat16), random_weight(5, 8, torch.bfloat16) * 1e-6
    large[0, 0] = 1e5
    assert packed("torch", large).kind == "torch_fp32"
    assert packed("torch", small).kind == "torch_fp32"
    assert packed("torch", random_weight(5, 8, torch.bfloat16)).kind == "fbgemm_fp16"


def test_range_check_weighs_tiny_elements_by_the_norm_of_the_tensor() -> None:
    assert float16_problem(torch.full((3, 4), 1e-6)) is not None
    assert float16_problem(torch.tensor([[1.0, 1e-12]])) is None
    assert float16_problem(torch.tensor([[65504.0, 2.0**-24]])) is None
    assert float16_problem(torch.zeros(2, 2)) is None
    assert float16_problem(torch.zeros(0, 2)) is None


def test_without_fbgemm_the_product_is_float32(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(torch_impl, "fbgemm_problem", lambda: "no such operation")
    weight = random_weight(6, 8, torch.bfloat16)
    with caplog.at_level(logging.WARNING):
        product = packed("torch", weight)
    assert product.kind == "torch_fp32"
    assert "no such operation" in caplog.text


def test_fbgemm_adds_the_bias_in_float32() -> None:
    assert torch_impl.fbgemm_problem() is None
    bias = torch.tensor([1 + 2**-20, 1e-9, 70000.0])
    product = packed("torch", torch.zeros(3, 4, dtype=torch.bfloat16), bias)
    assert product.kind == "fbgemm_fp16"
    assert torch.equal(product(torch.ones(1, 4))[0], bias)


@pytest.mark.parametrize("name", [name for name in IMPLEMENTATIONS if name != "triton"])
@pytest.mark.parametrize("mode", linear.MODES)
def test_a_16_bit_source_is_not_kept(name: str, mode: str) -> None:
    weight, bias = random_weight(8, 8, torch.bfloat16), torch.randn(8)
    gone = weakref.ref(weight)
    product = packed(name, weight, bias, mode)
    before = product(torch.ones(1, 8))
    weight.zero_()
    assert torch.equal(product(torch.ones(1, 8)), before)
    del weight
    assert gone() is None


@needs_cpp
def test_packed_bytes_are_those_of_the_weight_rounded_up_to_panels() -> None:
    assert packed("cpp", random_weight(64, 10, torch.bfloat16)).nbytes == 64 * 10 * 2
    assert packed("cpp", random_weight(33, 10), torch.zeros(33)).nbytes == 64 * 10 * 4 + 64 * 4


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_no_inputs_features_leave_the_bias(name: str) -> None:
    product = packed(name, torch.empty(5, 0), torch.arange(5.0), "deterministic")
    assert torch.equal(product(torch.empty(3, 0)).cpu(), torch.arange(5.0).expand(3, 5))


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_wrong_arguments_are_refused(name: str) -> None:
    weight = random_weight(5, 8)
    with pytest.raises(ValueError, match="unknown linear mode 'int3'"):
        packed(name, weight, mode="int3")
    with pytest.raises(ValueError, match="weight must be"):
        packed(name, weight[0])
    with pytest.raises(ValueError, match="N >= 1"):
        packed(name, weight[:0])
    with pytest.raises(ValueError, match="bias is"):
        packed(name, weight, torch.zeros(6))
    product = packed(name, weight, mode="deterministic")
    with pytest.raises(ValueError, match=r"the weight takes \[T, 8\]"):
        product(torch.zeros(2, 7))
    with pytest.raises(ValueError, match=r"needed: \[2, 5\], contiguous"):
        product(torch.zeros(2, 8), out=torch.zeros(2, 6))
    with pytest.raises(ValueError, match="activations"):
        product(torch.zeros(2, 8, dtype=torch.float64))


def test_triton_takes_float16_and_sums_in_float32() -> None:
    if "triton" not in IMPLEMENTATIONS:
        pytest.skip("triton is not installed")
    torch.manual_seed(5)
    weight, x, bias = random_weight(33, 65, torch.float16), torch.randn(7, 65).half(), torch.randn(33).half()
    device = testing.device_of("triton")
    product = packed("triton", weight, bias, "deterministic")
    exact = x.double() @ weight.double().t() + bias.double()
    testing.assert_close(product(x.to(device)), exact, dtype=torch.float16)
