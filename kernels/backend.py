"""Which implementation of each operation runs: decided once per operation and device, then a dictionary look-up.

An implementation is a module `kernels/<op>/<name>_impl.py` (or `reference.py`). Knows no configuration: the caller
passes the `kernel_backend` option to `use`.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import pkgutil
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

import torch

from kernels import native

logger = logging.getLogger(__name__)

BACKENDS = ("auto", "cpp", "torch", "triton", "reference")

_MODULES = {"cpp": "cpp_impl", "torch": "torch_impl", "triton": "triton_impl", "reference": "reference"}


class _Choice:
    """The forced backend and the modules already chosen: the only state of the package beside the native library."""

    def __init__(self) -> None:
        self.forced = "auto"
        self.modules: dict[tuple[str, str], ModuleType] = {}


_choice = _Choice()


def use(name: str) -> None:
    """Force one backend for the whole process; "auto" restores the choice by device.

    A forced backend never falls back: "cpp" raises where the native library cannot be built. An operation that has no
    implementation of that name at all runs its torch one.
    Raises ValueError for an unknown name and native.NativeBuildError when "cpp" cannot be had.
    """
    if name not in BACKENDS:
        raise ValueError(f"unknown kernel backend {name!r}; known: {', '.join(BACKENDS)}")
    if name == "cpp":
        native.require()
    _choice.forced = name
    _choice.modules.clear()


@contextmanager
def using(name: str) -> Iterator[None]:
    """`use(name)` for the length of a with block."""
    before = _choice.forced
    use(name)
    try:
        yield
    finally:
        _choice.forced = before
        _choice.modules.clear()


def select(op: str, device: torch.device | str) -> str:
    """Name of the implementation of `op` (a folder of this package) that runs for tensors on `device`.

    "triton" on CUDA; on CPU "cpp" where the native library is available, else "torch".
    """
    name = implementation(op, torch.device(device)).__name__.rsplit(".", 1)[1]
    return name.removesuffix("_impl")


def implementation(op: str, device: torch.device) -> ModuleType:
    """The module that implements `op` on `device`; chosen and imported at the first call."""
    key = (op, device.type)
    module = _choice.modules.get(key)
    if module is None:
        module = importlib.import_module(f"kernels.{op}.{_MODULES[_choose(op, device.type)]}")
        _choice.modules[key] = module
    return module


def _choose(op: str, device_type: str) -> str:
    name = _choice.forced
    if name == "auto":
        name = "triton" if device_type == "cuda" else _auto_cpu()
    if name == "cpp" and device_type != "cpu":
        raise ValueError(f"kernel backend 'cpp' takes CPU tensors only, got {device_type}; use 'auto' or 'triton'")
    if not exists(op, name):
        logger.debug("%s has no %s implementation; its torch implementation runs", op, name)
        return "torch"
    return name


def _auto_cpu() -> str:
    return "cpp" if native.library() is not None else "torch"


def operations() -> list[str]:
    """Names of all operations: the sub-packages that have a definition (`reference.py`)."""
    packages = (module.name for module in pkgutil.iter_modules([str(native.SOURCE_DIR)]) if module.ispkg)
    return sorted(name for name in packages if exists(name, "reference"))


def exists(op: str, name: str) -> bool:
    """Whether operation `op` has an implementation file of that name (it may still need a compiler or a GPU)."""
    return importlib.util.find_spec(f"kernels.{op}.{_MODULES[name]}") is not None
