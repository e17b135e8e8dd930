"""The choice of implementation: by device, once, and never silently another than the one that was forced."""

from __future__ import annotations

import pytest
import torch

from kernels import backend, native


def test_cpu_runs_cpp_where_the_native_library_is_there():
    expected = "cpp" if native.library() is not None else "torch"
    assert backend.select("paged_attention", "cpu") == expected


def test_cuda_runs_triton():
    pytest.importorskip("triton", reason="triton is not installed")
    assert backend.select("paged_attention", "cuda") == "triton"


@pytest.mark.parametrize("name", ["torch", "reference"])
def test_forced_backend_is_used_and_then_forgotten(name):
    before = backend.select("paged_attention", "cpu")
    with backend.using(name):
        assert backend.select("paged_attention", "cpu") == name
    assert backend.select("paged_attention", "cpu") == before


def test_forced_backend_is_forgotten_after_an_error():
    before = backend.select("paged_attention", "cpu")
    with pytest.raises(KeyError), backend.using("reference"):
        raise KeyError
    assert backend.select("paged_attention", "cpu") == before


def test_unknown_backend_lists_the_known_ones():
    with pytest.raises(ValueError, match="'fast'; known: auto, cpp"):
        backend.use("fast")


@pytest.mark.skipif(native.library() is None, reason="needs the native library")
def test_cpp_is_refused_for_a_gpu():
    with backend.using("cpp"), pytest.raises(ValueError, match="CPU tensors only"):
        backend.implementation("paged_attention", torch.device("cuda"))


def test_every_operation_has_a_torch_implementation_and_a_reference():
    operations = [path.parent.name for path in native.SOURCE_DIR.glob("*/reference.py")]
    assert operations
    assert [op for op in operations if not backend.exists(op, "torch")] == []
