"""Products of bfloat16 weights and activations rounded to bfloat16, in terms of a product that does not round.

The definition (around the reference) and the form without the native library, where rounding wins no time.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.linear.packed import BF16, PackedLinear, check_float32


class RoundedLinear(PackedLinear):
    """Rounds its rows to bfloat16, ties to even, and hands them to `product`, whose weight has bfloat16 values."""

    def __init__(self, product: PackedLinear) -> None:
        super().__init__(product.out_features, product.in_features)
        self.kind = f"{product.kind}_{BF16}_rows"
        self.is_batch_invariant = product.is_batch_invariant
        self.holds_rows = product.holds_rows
        self._product_of_rounded = product

    @property
    def nbytes(self) -> int:
        return self._product_of_rounded.nbytes

    def _product(self, x: Tensor, out: Tensor | None) -> Tensor:
        check_float32(self.kind, x)
        return self._product_of_rounded(x.to(torch.bfloat16).float(), out=out)

    def rows(self, ids: Tensor) -> Tensor:
        return self._product_of_rounded.rows(ids)
