"""What quantised weights are and how their product is defined, in plain torch: exact integer sums, then floats.

Weights have codes q, a zero z and a scale s for each group along K: w ~ s (q - z). "int8": symmetric, groups of 128.
"int4": 0 .. 15 with a zero of its own for each group of 64. Scales are bfloat16, rounded up so that no code is cut off.
Rows of x are rounded to -127 .. 127 in the same groups, each row by itself, so a result does not depend on other rows.
Every implementation gives the same bits: see quantized.h for the order of float operations.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels.linear.packed import PackedLinear, check_float32, check_ids

SMALLEST = 1e-30  # quantized.h: kSmallest


@dataclass(frozen=True)
class Format:
    """How one mode quantises; quantized.h has the same."""

    bits: int  # also the format's code there
    group: int  # weights with one scale
    is_symmetric: bool


FORMATS = {"int8": Format(8, 128, True), "int4": Format(4, 64, False)}


class Codes(NamedTuple):
    """A quantised matrix; G groups of g along K, padded with what stands for zero."""

    codes: Tensor  # [N, G, g] uint8
    zeros: Tensor  # [N, G] int32
    scales: Tensor  # [N, G] float32


class Rows(NamedTuple):
    """Rounded activations; a scale is NaN where a value of its group is not finite."""

    codes: Tensor  # [T, G, g] int8
    scales: Tensor  # [T, G] float32


def quantize(weight: Tensor, form: Format) -> Codes:
    """weight [N, K] float -> its codes. A group with a value that is not finite gets a NaN scale."""
    groups = _grouped(weight.float(), form.group)
    if form.is_symmetric:
        span = groups.abs().amax(-1) / 127
    else:
        span = (groups.amax(-1).clamp(min=0) - groups.amin(-1).clamp(max=0)) / 15
    finite = groups.isfinite().all(-1) & span.isfinite()
    scales = torch.where(finite, _round_up(torch.where(finite, span, 0.0)), float("nan"))
    is_empty = ~(scales > 0)
    step = torch.where(is_empty, 1.0, scales)[..., None]
    values = torch.where(is_empty[..., None], 0.0, groups)
    if form.is_symmetric:
        zeros = torch.full_like(scales, 128.0)
    else:
        zeros = (-values.amin(-1).clamp(max=0) / step[..., 0]).round()
    codes = ((values / step).round() + zeros[..., None]).clamp(0, 2**form.bits - 1)
    return Codes(codes.to(torch.uint8), zeros.to(torch.int32), scales)


def dequantize(codes: Codes, in_features: int) -> Tensor:
    """[n, K] float32: what the codes stand for."""
    values = (codes.codes.int() - codes.zeros[..., None]).float() * codes.scales[..., None]
    return values.flatten(1)[:, :in_features]


def round_rows(x: Tensor, group: int) -> Rows:
    """x [T, K] float32 -> codes to the nearest, ties to even, by the largest magnitude of each group."""
    groups = _grouped(x, group)
    top = groups.abs().amax(-1)
    finite, counts = top.isfinite(), top >= SMALLEST  # amax keeps NaN
    inverse = torch.where(finite & counts, 127.0 / top, 0.0)
    codes = (torch.where(finite[..., None], groups, 0.0) * inverse[..., None]).round()
    scales = torch.where(finite, torch.where(counts, top / 127.0, 0.0), float("nan"))
    return Rows(codes.to(torch.int8), scales)


class QuantizedLinear(PackedLinear):
    """Codes as they are, and the product one group after the other; the sums of a group are exact in float32 too."""

    is_batch_invariant = True

    def __init__(self, weight: Tensor, bias: Tensor | None, mode: str, sum_dtype: torch.dtype) -> None:
        """sum_dtype: in which codes are multiplied: int64 by definition, float32 where speed matters."""
        super().__init__(*weight.shape)
        self.kind = f"torch_{mode}"
        self._form = FORMATS[mode]
        self._codes = quantize(weight, self._form)
        self._bias = None if bias is None else bias.float().clone()
        self._sum_dtype = sum_dtype

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self._codes) + (0 if self._bias is None else self._bias.nbytes)

    def _product(self, x: Tensor, out: Tensor | None) -> Tensor:
        check_float32(self.kind, x)
        rows = round_rows(x, self._form.group)
        total = torch.zeros(x.shape[0], self.out_features)
        for g in range(self._codes.scales.shape[1]):
            codes = self._codes.codes[:, g].to(self._sum_dtype) - self._codes.zeros[:, g, None].to(self._sum_dtype)
            sums = rows.codes[:, g].to(self._sum_dtype) @ codes.t()  # below 2^24, hence exact
            total += sums.float() * (self._codes.scales[:, g] * rows.scales[:, g, None])
        if self._bias is not None:
            total += self._bias
        return total if out is None else out.copy_(total)

    def rows(self, ids: Tensor) -> Tensor:
        check_ids(ids, self.out_features)
        return dequantize(Codes(*(part[ids] for part in self._codes)), self.in_features)


def _grouped(x: Tensor, group: int) -> Tensor:  # [n, K] -> [n, G, group]
    num_groups = -(-x.shape[1] // group)
    return F.pad(x, (0, num_groups * group - x.shape[1])).view(x.shape[0], num_groups, group)


def _round_up(x: Tensor) -> Tensor:
    """The smallest bfloat16 that is not below x >= 0, as float32."""
    return ((x.contiguous().view(torch.int32) + 0xFFFF) & ~0xFFFF).view(torch.float32)
