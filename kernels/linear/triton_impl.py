"""Batch-invariant product on GPUs; every other mode is cuBLAS through torch, which chooses its kernel by batch size.

One program computes a tile of 64 rows x 32 columns over all of K, in the same order whatever the number of rows: no
split along K and no autotuning, since either would let the batch decide the order of a sum. Bound by the weight's
bandwidth for few rows. Why: He 2025, "Defeating Nondeterminism in LLM Inference" (Thinking Machines Lab).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.linear import torch_impl
from kernels.linear.packed import PackedLinear

BLOCK_T, BLOCK_N, BLOCK_K = 64, 32, 64


@triton.jit
def _linear_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    out_ptr,
    num_tokens,
    N,
    x_stride_t,  # elements between rows
    weight_stride_n,
    K: tl.constexpr,  # few values per model
    HAS_BIAS: tl.constexpr,
    PRECISION: tl.constexpr,  # of the tile product: "ieee" keeps float32 exact, 16-bit inputs ignore it
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)  # [BLOCK_T]
    column = tl.program_id(1).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    k = tl.arange(0, BLOCK_K)  # [BLOCK_K]
    token_mask = token < num_tokens
    column_mask = column < N
    x_ptrs = x_ptr + token[:, None] * x_stride_t + k[None, :]
    weight_ptrs = weight_ptr + column[None, :] * weight_stride_n + k[:, None]
    sums = tl.zeros((BLOCK_T, BLOCK_N), dtype=tl.float32)
    for k0 in range(0, K, BLOCK_K):
        k_mask = k < K - k0
        x = tl.load(x_ptrs + k0, mask=token_mask[:, None] & k_mask[None, :], other=0.0)
        weight = tl.load(weight_ptrs + k0, mask=column_mask[None, :] & k_mask[:, None], other=0.0)
        sums += tl.dot(x, weight, input_precision=PRECISION)
    if HAS_BIAS:
        sums += tl.load(bias_ptr + column, mask=column_mask, other=0.0).to(tl.float32)[None, :]
    mask = token_mask[:, None] & column_mask[None, :]
    tl.store(out_ptr + token[:, None] * N + column[None, :], sums.to(out_ptr.dtype.element_ty), mask=mask)


class TiledLinear(torch_impl.UnpackedLinear):
    """The weight as it is, multiplied by the kernel above; `x` has the weight's type."""

    is_batch_invariant = True

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__(weight.contiguous(), bias)
        self.kind = self.kind.replace("torch_", "triton_")

    def _product(self, x: Tensor, out: Tensor | None) -> Tensor:
        if x.dtype != self._weight.dtype:
            raise ValueError(f"x is {x.dtype}; {self.kind} takes {self._weight.dtype} activations")
        if x.stride(1) != 1:
            x = x.contiguous()
        num_tokens = x.shape[0]
        if out is None:
            out = torch.empty(num_tokens, self.out_features, dtype=x.dtype, device=x.device)
        grid = (triton.cdiv(num_tokens, BLOCK_T), triton.cdiv(self.out_features, BLOCK_N))
        if num_tokens == 0:
            return out
        _linear_kernel[grid](
            x,
            self._weight,
            self._bias,
            out,
            num_tokens,
            self.out_features,
            x.stride(0),
            self._weight.stride(0),
            K=self.in_features,
            HAS_BIAS=self._bias is not None,
            PRECISION="ieee",
            BLOCK_T=BLOCK_T,
            BLOCK_N=BLOCK_N,
            BLOCK_K=BLOCK_K,
        )
        return out


def pack(weight: Tensor, bias: Tensor | None, mode: str) -> PackedLinear:
    """See kernels.linear.pack_linear."""
    return TiledLinear(weight, bias) if mode == "deterministic" else torch_impl.pack(weight, bias, mode)
