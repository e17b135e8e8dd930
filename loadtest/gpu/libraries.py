"""Attention of the libraries that are installed, on dense tensors: q [R, H, n, D], k and v [R, H_kv, S, D]."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right

Call = Callable[[], object]

_TORCH = {
    "torch flash": SDPBackend.FLASH_ATTENTION,
    "torch cudnn": SDPBackend.CUDNN_ATTENTION,
    "torch efficient": SDPBackend.EFFICIENT_ATTENTION,
    "torch math": SDPBackend.MATH,
}


def attention(q: Tensor, k: Tensor, v: Tensor) -> dict[str, Call]:
    """Calls by library; the last query of a row sees all its slots, the one before it one fewer."""
    queries, slots = q.shape[2], k.shape[2]
    options: dict[str, Any] = {"enable_gqa": True}
    if queries == slots:
        options["is_causal"] = True
    elif queries > 1:
        options["attn_mask"] = causal_lower_right(queries, slots)
    found: dict[str, Call] = {}
    for name, backend in _TORCH.items():
        if (name == "torch math") == (q.device.type == "cpu"):  # on a GPU it is no contender
            found[name] = _torch_call(backend, q, k, v, options)
    if importlib.util.find_spec("flash_attn") is not None:
        found["flash_attn"] = _flash_call(*(x.transpose(1, 2).contiguous() for x in (q, k, v)))
    if importlib.util.find_spec("flashinfer") is not None and q.shape[0] == 1:
        found["flashinfer"] = _flashinfer_call(*(x[0].transpose(0, 1).contiguous() for x in (q, k, v)))
    return found


def _torch_call(backend: SDPBackend, q: Tensor, k: Tensor, v: Tensor, options: dict[str, Any]) -> Call:
    def call() -> Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v, **options)

    return call


def _flash_call(q: Tensor, k: Tensor, v: Tensor) -> Call:
    flash = importlib.import_module("flash_attn")
    if q.shape[1] == 1:
        return lambda: flash.flash_attn_with_kvcache(q, k, v, cache_seqlens=k.shape[1])
    return lambda: flash.flash_attn_func(q, k, v, causal=True)


def _flashinfer_call(q: Tensor, k: Tensor, v: Tensor) -> Call:
    flashinfer = importlib.import_module("flashinfer")
    if q.shape[0] == 1:
        return lambda: flashinfer.single_decode_with_kv_cache(q[0], k, v)
    return lambda: flashinfer.single_prefill_with_kv_cache(q, k, v, causal=True)


def best_ms(calls: dict[str, Call], ms: Callable[[Call], float]) -> tuple[str, dict[str, float | str]]:
    """Name of the fastest, and each one's milliseconds, or why it does not run. Raises RuntimeError if none does."""
    found: dict[str, float | str] = {}
    for name, call in calls.items():
        try:
            call()
            found[name] = ms(call)
        except torch.AcceleratorError:
            raise
        except (RuntimeError, TypeError, NotImplementedError, ValueError) as error:  # this case is not for it
            found[name] = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
    times = {name: value for name, value in found.items() if isinstance(value, float)}
    if not times:
        raise RuntimeError(f"no library runs this case: {found}")
    return min(times, key=times.__getitem__), found
