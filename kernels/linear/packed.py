"""What every packed weight offers. Knows no layout and no instruction set."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
from torch import Tensor

MODES = ("auto", "fp32", "fp16", "deterministic")
BF16 = "bf16"  # the mode that rounds weight and activations to bfloat16; see pairs.h
QUANTIZED = ("int8", "int4")  # modes that round the weight, and activations to 8 bits; see quantized.py


class Panels(NamedTuple):
    """A weight as the native library reads it; addresses are good as long as the PackedLinear lives."""

    weights: int  # address
    dtype_code: int  # kernels.native.DTYPE_CODES
    bias: int | None  # address of fp32 values, a whole number of panels


class PackedLinear(ABC):
    """y = x W^T + bias for one weight, held in the form that the product reads.

    in_features, out_features   K and N of the weight [N, K]
    kind                        how it is computed and held, for the start-up report, for instance "panels_bf16"
    is_batch_invariant          whether a row's result has the same bits in every batch and with any number of threads
    holds_rows                  whether `rows` works, so that a tied embedding needs no table of its own
    panels                      where the native library finds the weight; None: it lies elsewhere
    """

    kind: str
    is_batch_invariant: bool = False
    holds_rows: bool = True
    panels: Panels | None = None

    def __init__(self, out_features: int, in_features: int) -> None:
        self.out_features = out_features
        self.in_features = in_features

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Bytes held for weight and bias."""

    def __call__(self, x: Tensor, *, out: Tensor | None = None) -> Tensor:
        """x [T, K] -> [T, N], written to `out` (contiguous) when given.

        On CPU x and the result are float32; on CUDA they have the weight's type. Rows of x may lie apart.
        Raises ValueError when shape, type or layout disagree.
        """
        if x.dim() != 2 or x.shape[1] != self.in_features:
            raise ValueError(f"x has shape {tuple(x.shape)}, the weight takes [T, {self.in_features}]")
        if out is not None and (out.shape != (x.shape[0], self.out_features) or not out.is_contiguous()):
            raise ValueError(
                f"out has shape {tuple(out.shape)} and strides {out.stride()}; "
                f"needed: [{x.shape[0]}, {self.out_features}], contiguous"
            )
        return self._product(x, out)

    @abstractmethod
    def _product(self, x: Tensor, out: Tensor | None) -> Tensor: ...

    def rows(self, ids: Tensor) -> Tensor:
        """Rows of the weight: ids [T] int64 -> [T, K], float32 on CPU.

        Raises IndexError for an id outside [0, N) on CPU; on CUDA the device fails. Only where `holds_rows`; raises
        NotImplementedError elsewhere.
        """
        raise NotImplementedError(f"{self.kind} cannot give back rows of its weight; keep the embedding table")


def check_float32(kind: str, x: Tensor) -> None:
    """CPU products compute in float32 only. Raises ValueError."""
    if x.dtype != torch.float32:
        raise ValueError(f"x is {x.dtype}; {kind} takes torch.float32 activations")


def check_ids(ids: Tensor, num_rows: int) -> None:
    """Raises IndexError when an id lies outside [0, num_rows)."""
    if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < num_rows:
        raise IndexError(f"row ids span [{int(ids.min())}, {int(ids.max())}], the weight has {num_rows} rows")
