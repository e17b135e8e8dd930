"""The definition of a packed linear: a product in float64, rounded once. Batch-invariant only by accident."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.linear.packed import BF16, QUANTIZED, PackedLinear, check_ids
from kernels.linear.quantized import QuantizedLinear
from kernels.linear.rounded import RoundedLinear


class ReferenceLinear(PackedLinear):
    """Keeps the weight as it came, in float64."""

    kind = "reference"

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__(*weight.shape)
        self._dtype = torch.float32 if weight.device.type == "cpu" else weight.dtype
        self._weight = weight.double()
        self._bias = None if bias is None else bias.double()

    @property
    def nbytes(self) -> int:
        return self._weight.nbytes + (0 if self._bias is None else self._bias.nbytes)

    def _product(self, x: Tensor, out: Tensor | None) -> Tensor:
        y = x.double() @ self._weight.t()
        if self._bias is not None:
            y = y + self._bias
        return y.to(self._dtype) if out is None else out.copy_(y)

    def rows(self, ids: Tensor) -> Tensor:
        check_ids(ids, self.out_features)
        return self._weight[ids].to(self._dtype)


def pack(weight: Tensor, bias: Tensor | None, mode: str) -> PackedLinear:
    """See kernels.linear.pack_linear; all modes that do not round are the same here."""
    if mode in QUANTIZED:
        return QuantizedLinear(weight, bias, mode, torch.int64)
    if mode == BF16:
        return RoundedLinear(ReferenceLinear(weight.to(torch.bfloat16), bias))
    return ReferenceLinear(weight, bias)
