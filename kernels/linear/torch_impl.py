"""Packed linear on plain torch: FBGEMM's packed fp16 weights and unpacked float32 on CPU, F.linear (cuBLAS) on CUDA."""

from __future__ import annotations

import functools
import logging

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels.linear.packed import BF16, QUANTIZED, PackedLinear, check_float32, check_ids
from kernels.linear.precision import float16_problem
from kernels.linear.quantized import QuantizedLinear
from kernels.linear.rounded import RoundedLinear

logger = logging.getLogger(__name__)

# Measured with MKL (AVX2 and AVX-512): F.linear is slow for two and three rows, and up to 32 rows for wide weights;
# there the same product written as W x^T takes another path, which is up to twice as fast even with the copy.
_MAX_ROWS_SWAPPED = 3
_MAX_ROWS_SWAPPED_WIDE = 32
_WIDE = 4  # N / K


class UnpackedLinear(PackedLinear):
    """The weight as it is, in the type of the activations: float32 on CPU."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__(*weight.shape)
        self.kind = f"torch_{_short(weight.dtype)}"
        self._weight = weight
        self._bias = None if bias is None else bias.to(weight.dtype)
        self._on_cpu = weight.device.type == "cpu"

    @property
    def nbytes(self) -> int:
        return self._weight.nbytes + (0 if self._bias is None else self._bias.nbytes)

    def _product(self, x: Tensor, out: Tensor | None) -> Tensor:
        if self._on_cpu:
            check_float32(self.kind, x)
        y = self._swapped(x) if self._on_cpu and self._swap_pays(x.shape[0]) else F.linear(x, self._weight, self._bias)
        return y if out is None else out.copy_(y)

    def _swap_pays(self, num_rows: int) -> bool:
        wide = self.out_features >= _WIDE * self.in_features
        return 2 <= num_rows <= (_MAX_ROWS_SWAPPED_WIDE if wide else _MAX_ROWS_SWAPPED)

    def _swapped(self, x: Tensor) -> Tensor:
        y = torch.mm(self._weight, x.t()).t().contiguous()
        return y if self._bias is None else y.add_(self._bias)

    def rows(self, ids: Tensor) -> Tensor:
        if self._on_cpu:  # on CUDA to look is to wait for the device, and the gather fails there by itself
            check_ids(ids, self.out_features)
        return self._weight.index_select(0, ids)


class RowwiseLinear(UnpackedLinear):
    """One row at a time, so that no row can depend on another: the slow way to batch invariance.

    Each row is copied to memory of its own first: MKL may choose its path by alignment.
    """

    is_batch_invariant = True

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__(weight, bias)
        self.kind = f"torch_rowwise_{_short(weight.dtype)}"

    def _product(self, x: Tensor, out: Tensor | None) -> Tensor:
        if self._on_cpu:
            check_float32(self.kind, x)
        if out is None:
            out = x.new_empty(x.shape[0], self.out_features)
        for row in range(x.shape[0]):
            out[row : row + 1] = F.linear(x[row : row + 1].clone(), self._weight, self._bias)
        return out


class FbgemmLinear(PackedLinear):
    """FBGEMM's packed fp16 weights with float32 accumulation; the bias stays float32."""

    kind = "fbgemm_fp16"
    holds_rows = False

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__(*weight.shape)
        float_bias = None if bias is None else bias.float()
        self._packed = torch.ops.quantized.linear_prepack_fp16(weight.float().contiguous(), float_bias)
        self._nbytes = 2 * weight.numel() + (0 if float_bias is None else float_bias.nbytes)

    @property
    def nbytes(self) -> int:
        return self._nbytes

    def _product(self, x: Tensor, out: Tensor | None) -> Tensor:
        check_float32(self.kind, x)
        y = torch.ops.quantized.linear_dynamic_fp16(x, self._packed)
        return y if out is None else out.copy_(y)


@functools.cache
def fbgemm_problem() -> str | None:
    """Why FBGEMM's packed fp16 product cannot be used here, or None. Tries it once on a product with a known result."""
    weight, x = torch.eye(3) * 0.5, torch.tensor([[1.0, 2.0, 4.0]])
    try:
        packed = torch.ops.quantized.linear_prepack_fp16(weight, torch.ones(3))
        y = torch.ops.quantized.linear_dynamic_fp16(x, packed)
    except (AttributeError, RuntimeError) as error:  # this torch has no such operation, or this CPU no kernel for it
        return str(error).splitlines()[0]
    return None if torch.equal(y, x * 0.5 + 1) else f"it computed {y.tolist()}"


def pack(weight: Tensor, bias: Tensor | None, mode: str) -> PackedLinear:
    """See kernels.linear.pack_linear."""
    if mode in QUANTIZED:
        return QuantizedLinear(weight, bias, mode, torch.float32)
    if mode == BF16:
        return RoundedLinear(pack(weight.to(torch.bfloat16), bias, "auto"))
    if weight.device.type != "cpu":
        weight = weight.float() if mode == "fp32" else weight
        return (RowwiseLinear if mode == "deterministic" else UnpackedLinear)(weight, bias)
    if mode == "deterministic":
        return RowwiseLinear(weight.float(), bias)
    if mode == "fp16" or (mode == "auto" and weight.dtype != torch.float32):
        problem = fbgemm_problem() or float16_problem(weight)
        if problem is None:
            return FbgemmLinear(weight, bias)
        logger.warning("a weight %s becomes float32, twice the memory and slower: %s", tuple(weight.shape), problem)
    return UnpackedLinear(weight.float(), bias)


def _short(dtype: torch.dtype) -> str:
    return {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}[dtype]
