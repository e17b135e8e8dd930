"""What the kernel tests share: implementations that can run here, odd shapes, NaN-filled outputs, tolerances."""

from __future__ import annotations

import importlib.util
import os

import torch
from torch import Tensor

from kernels import backend, native

# Token counts that no tile size divides, the empty batch, and one of each side of a vector or tile edge.
ODD_TOKENS = (0, 1, 7, 33)

# Largest absolute and relative error against a float32 reference, by the type in which results are stored.
TOLERANCES = {torch.float32: (2e-6, 2e-5), torch.float16: (1e-3, 2e-3), torch.bfloat16: (8e-3, 1.6e-2)}

FLOAT_DTYPES = tuple(TOLERANCES)


def implementations(op: str) -> list[str]:
    """Names of the implementations of `op` that can run on this machine, without the reference.

    "triton" needs a CUDA device or TRITON_INTERPRET=1 (set before triton is imported).
    """
    able = {
        "torch": True,
        "cpp": native.library() is not None,
        "triton": importlib.util.find_spec("triton") is not None
        and (torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1"),
    }
    return [name for name, runs in able.items() if runs and backend.exists(op, name)]


def device_of(name: str) -> torch.device:
    """Where an implementation is tested: Triton on the GPU if there is one, all else on the CPU."""
    return torch.device("cuda" if name == "triton" and torch.cuda.is_available() else "cpu")


def runs_dtype(name: str, dtype: torch.dtype) -> bool:
    """Whether results of that type can be trusted: Triton's interpreter computes bfloat16 wrongly without an error."""
    return not (name == "triton" and dtype == torch.bfloat16 and device_of(name).type == "cpu")


def nan_filled(*shape: int, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> Tensor:
    """An output in which every element that a kernel forgets to write shows."""
    return torch.full(shape, float("nan"), dtype=dtype, device=device)


def strided(x: Tensor) -> Tensor:
    """Equal values in rows that lie further apart than their length: x is [T, ...], the result not contiguous."""
    wide = nan_filled(x.shape[0], 2, *x.shape[1:], dtype=x.dtype, device=x.device)
    wide[:, 1] = x
    return wide[:, 1]


def assert_close(actual: Tensor, expected: Tensor, *, dtype: torch.dtype | None = None, factor: float = 1.0) -> None:
    """Compare with a reference result under the tolerance of `dtype` (default: that of `actual`), times `factor`."""
    atol, rtol = TOLERANCES[dtype or actual.dtype]
    torch.testing.assert_close(actual.cpu().float(), expected.cpu().float(), atol=atol * factor, rtol=rtol * factor)


def assert_at_most_twice_the_error(actual: Tensor, plain: Tensor, exact: Tensor) -> None:
    """The relative yardstick: `actual` may be twice as far from `exact` (float64) as `plain` torch in the same type."""
    exact = exact.cpu().double()
    error = (actual.cpu().double() - exact).abs().max().item()
    allowed = 2 * (plain.cpu().double() - exact).abs().max().item()
    spacing = torch.finfo(actual.dtype).eps * exact.abs().max().item()
    assert error <= max(allowed, spacing), f"largest error {error:.3g} exceeds {max(allowed, spacing):.3g}"
