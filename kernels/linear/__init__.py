"""Matrix products with weights that are packed once: y = x W^T + bias.

On CPU 16-bit weights stay 16 bits wide and are widened in registers; sums are float32. Bandwidth bounds the product
for a few rows, arithmetic for many.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels import backend
from kernels.linear.packed import BF16, MODES, QUANTIZED, PackedLinear

__all__ = [
    "BF16",
    "MODES",
    "QUANTIZED",
    "PackedLinear",
    "available_modes",
    "bf16_instructions",
    "pack_linear",
    "quantized_instructions",
]

ROUNDED = (BF16, *QUANTIZED)  # modes that round activations, so that their results differ from the others'


def pack_linear(weight: Tensor, bias: Tensor | None = None, *, mode: str = "auto") -> PackedLinear:
    """Bring a weight into the form that its product reads; neither argument is kept on CPU (see "fp32").

    weight  [N, K] float32, float16 or bfloat16; rows may lie apart. Its device decides where the product runs.
    bias    [N] or None; added in float32 on CPU
    mode    "auto"           16-bit weights stay 16 bits wide where that holds their values, float32 ones stay float32
            "fp32"           float32 weights. The torch backend keeps a float32 `weight` itself, all else is a copy
            "fp16"           16 bits also for a float32 weight, rounded to float16 where its range allows, else float32
            "deterministic"  like "auto", computed so that a row's result has the same bits in every batch
            "bf16"           weights and, at each product, activations rounded to bfloat16, fp32 sums; batch-invariant
                             on the native library. Twice as fast for many rows where the CPU has AVX512-BF16. CPU only
            "int8", "int4"   rounded to so many bits, activations to 8 row by row; see quantized.py. CPU only
    On CUDA the weight keeps its type in all modes but "fp32".
    Raises ValueError for an unknown mode or when shapes, types or devices disagree.
    """
    if mode not in (*MODES, *ROUNDED):
        raise ValueError(f"unknown linear mode {mode!r}; known: {', '.join((*MODES, *ROUNDED))}")
    if mode in ROUNDED and weight.device.type != "cpu":
        raise ValueError(f"linear mode {mode!r} runs on CPU only, the weight is on {weight.device}")
    if weight.dim() != 2 or not weight.shape[0] or weight.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(
            f"weight must be [N, K] with N >= 1 in float32, float16 or bfloat16, "
            f"got {weight.dtype} {tuple(weight.shape)}"
        )
    if bias is not None and (bias.shape != weight.shape[:1] or bias.device != weight.device):
        raise ValueError(
            f"bias is {tuple(bias.shape)} on {bias.device}, weight {tuple(weight.shape)} on {weight.device}"
        )
    return backend.implementation("linear", weight.device).pack(weight, bias, mode)


def available_modes(device: torch.device | str = "cpu") -> dict[str, str]:
    """For the start-up report: by mode, the kind that a bfloat16 weight within range gets on `device`."""
    weight = torch.zeros(1, 1, dtype=torch.bfloat16, device=device)
    return {mode: pack_linear(weight, mode=mode).kind for mode in MODES}


def quantized_instructions() -> str:
    """For the start-up report: what products with weights of 8 and 4 bits are made of on this CPU."""
    implementation = backend.select("linear", "cpu")
    if implementation != "cpp":
        return f"plain torch ({implementation}), which is slow"
    from kernels.linear.cpp_impl import quantized_isa  # builds the library

    return quantized_isa()


def bf16_instructions() -> str:
    """For the start-up report: what products of mode "bf16" are made of on this CPU."""
    implementation = backend.select("linear", "cpu")
    if implementation != "cpp":
        return f"plain torch ({implementation}), which wins nothing over fp32 activations"
    from kernels.linear.cpp_impl import bf16_isa  # builds the library

    isa = bf16_isa()
    return "fp32 ones (no AVX512-BF16 here), which win nothing over fp32 activations" if isa == "generic" else isa
