"""Packed linear on the native library: column panels of 32, in the weight's own type, batch-invariant in every mode.

Faster than FBGEMM's packed fp16 product and than F.linear at every number of rows measured, hence the default.
"""

from __future__ import annotations

import ctypes
import logging

import torch
from torch import Tensor

from kernels import native
from kernels.linear.packed import BF16, QUANTIZED, PackedLinear, Panels, check_float32, check_ids
from kernels.linear.precision import float16_problem
from kernels.linear.quantized import FORMATS
from kernels.native import INT, PTR

logger = logging.getLogger(__name__)

PANEL = 32  # columns; kernel.cpp: kPanel
PAIRS_CODE = 16  # stands for an element type; pairs.h: kPairs

_NAMES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}


class PanelLinear(PackedLinear):
    """A weight [N, K] in panels; N is rounded up to whole panels with zeros."""

    is_batch_invariant = True

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__(*weight.shape)
        padded = -(-self.out_features // PANEL) * PANEL
        self._allocate(weight.dtype, padded)
        self._bias = None
        if bias is not None:
            self._bias = torch.zeros(padded)
            self._bias[: self.out_features] = bias
        self._fill(weight)
        self._run = native.function("kvasir_linear", PTR, *[INT] * 4, PTR, INT, PTR, PTR, INT, INT)
        bias_address = None if self._bias is None else self._bias.data_ptr()
        self.panels = Panels(self._packed.data_ptr(), self._dtype_code, bias_address)
        self._constant = (self.in_features, self.out_features, *self.panels)

    def _allocate(self, dtype: torch.dtype, padded: int) -> None:
        self.kind = f"panels_{_NAMES[dtype]}"
        self._packed = torch.empty(padded * self.in_features, dtype=dtype)
        self._dtype_code = native.DTYPE_CODES[dtype]

    def _fill(self, weight: Tensor) -> None:
        packed = self._packed
        advise = native.function("kvasir_linear_advise_large_pages", PTR, INT)
        advise(packed.data_ptr(), packed.nbytes)
        if weight.stride(1) != 1:
            weight = weight.contiguous()
        self._pack(weight, packed)

    def _pack(self, weight: Tensor, packed: Tensor) -> None:
        pack_panels = native.function("kvasir_linear_pack", PTR, *[INT] * 4, PTR, INT)
        shape = (weight.stride(0), self.out_features, self.in_features)
        pack_panels(weight.data_ptr(), self._dtype_code, *shape, packed.data_ptr(), native.num_threads())

    @property
    def nbytes(self) -> int:
        return self._packed.nbytes + (0 if self._bias is None else self._bias.nbytes)

    def _product(self, x: Tensor, out: Tensor | None) -> Tensor:
        check_float32(self.kind, x)
        if x.stride(1) != 1:
            x = x.contiguous()
        num_rows = x.shape[0]
        if out is None:
            out = torch.empty(num_rows, self.out_features)
        self._run(
            x.data_ptr(),
            x.stride(0),
            num_rows,
            *self._constant,
            out.data_ptr(),
            self.out_features,
            native.num_threads(),
        )
        return out

    def rows(self, ids: Tensor) -> Tensor:
        check_ids(ids, self.out_features)
        out = torch.empty(ids.shape[0], self.in_features)
        unpack = native.function("kvasir_linear_unpack_rows", PTR, INT, INT, PTR, INT, PTR, INT)
        ids = ids.contiguous()
        place = (self._packed.data_ptr(), self._dtype_code, self.in_features)
        unpack(*place, ids.data_ptr(), ids.shape[0], out.data_ptr(), native.num_threads())
        return out


class QuantizedPanelLinear(PanelLinear):
    """Panels of codes with their scales; the same bits as `quantized.QuantizedLinear`, whatever the instruction set."""

    def __init__(self, weight: Tensor, bias: Tensor | None, mode: str) -> None:
        self._mode = mode
        super().__init__(weight, bias)

    def _allocate(self, dtype: torch.dtype, padded: int) -> None:
        self.kind = f"panels_{self._mode}"
        self._dtype_code = FORMATS[self._mode].bits
        num_bytes = native.function("kvasir_quantized_bytes", INT, INT, INT, restype=INT)
        shape = (self._dtype_code, self.out_features, self.in_features)
        self._packed = torch.empty(num_bytes(*shape), dtype=torch.uint8)

    def _pack(self, weight: Tensor, packed: Tensor) -> None:
        quantize = native.function("kvasir_quantized_pack", PTR, *[INT] * 5, PTR, INT)
        shape = (weight.stride(0), self.out_features, self.in_features, self._dtype_code)
        dtype_code = native.DTYPE_CODES[weight.dtype]
        quantize(weight.data_ptr(), dtype_code, *shape, packed.data_ptr(), native.num_threads())


class Bf16PanelLinear(PanelLinear):
    """Panels of bfloat16 pairs (pairs.h); rows of x are rounded to bfloat16 too. The same bits on every CPU."""

    def _allocate(self, dtype: torch.dtype, padded: int) -> None:
        self.kind = "panels_bf16_pairs"
        self._dtype_code = PAIRS_CODE
        num_bytes = native.function("kvasir_pairs_bytes", INT, INT, restype=INT)
        self._packed = torch.empty(num_bytes(self.out_features, self.in_features), dtype=torch.uint8)

    def _pack(self, weight: Tensor, packed: Tensor) -> None:
        pack_pairs = native.function("kvasir_pairs_pack", PTR, *[INT] * 4, PTR, INT)
        shape = (weight.stride(0), self.out_features, self.in_features)
        dtype_code = native.DTYPE_CODES[weight.dtype]
        pack_pairs(weight.data_ptr(), dtype_code, *shape, packed.data_ptr(), native.num_threads())


def bf16_isa(wanted: str | None = None) -> str:
    """Name of the instructions that products of bfloat16 pairs use; `wanted` as for `quantized_isa`."""
    name: bytes = native.function("kvasir_pairs_isa", ctypes.c_char_p, restype=ctypes.c_char_p)(
        None if wanted is None else wanted.encode()
    )
    return name.decode()


def quantized_isa(wanted: str | None = None) -> str:
    """Name of the instructions that quantised products use; `wanted` selects them, where this CPU has them (tests)."""
    name: bytes = native.function("kvasir_quantized_isa", ctypes.c_char_p, restype=ctypes.c_char_p)(
        None if wanted is None else wanted.encode()
    )
    return name.decode()


def pack(weight: Tensor, bias: Tensor | None, mode: str) -> PackedLinear:
    """See kernels.linear.pack_linear."""
    if mode in QUANTIZED:
        return QuantizedPanelLinear(weight, bias, mode)
    if mode == BF16:
        return Bf16PanelLinear(weight, bias)
    if mode == "fp32":
        weight = weight.float()
    elif mode == "fp16" and weight.dtype == torch.float32:
        problem = float16_problem(weight)
        if problem is None:
            weight = weight.to(torch.float16)
        else:
            logger.warning("a weight %s stays float32: %s", tuple(weight.shape), problem)
    return PanelLinear(weight, bias)
