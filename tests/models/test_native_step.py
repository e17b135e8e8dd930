"""The native step of every dense family gives the very bits of its operations called one by one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from engine.models import load_model
from engine.models.decoder import Decoder
from kernels import native
from tests.models.families import CASES, Case, save
from tests.models.paged_driver import PagedDriver, PagedRequest

pytestmark = pytest.mark.skipif(native.library() is None, reason="needs the native library")

MIXED_EXPERTS = {"mixtral", "qwen2_moe", "qwen3_moe", "olmoe"}
DENSE = [case for case in CASES if case.name not in MIXED_EXPERTS]


def load(case: Case, folder: Path, dtype: str) -> Decoder:
    model = load_model(save(case.build(), folder), dtype=dtype, max_model_len=case.max_model_len)
    assert isinstance(model, Decoder)
    return model


def run(model: Decoder, dtype: torch.dtype) -> tuple[list[Tensor], Tensor, Tensor]:
    """Prompts in chunks among decoding rows, long enough for two splits of keys; hidden states and both pools."""
    driver = PagedDriver(model, num_blocks=128, dtype=dtype)
    ids = torch.randint(3, 128, (3, 300), generator=torch.Generator().manual_seed(1)).tolist()
    longest = min(model.max_model_len, 256) - 2
    long, middle, short = PagedRequest(ids[0]), PagedRequest(ids[1]), PagedRequest(ids[2])
    found = driver.forward([(short, 3), (long, longest - 40)])
    found += driver.forward([(long, 37), (middle, 21), (short, 1)])
    found += driver.forward([(middle, 1), (short, 1), (long, 1)])
    found += driver.forward([(long, 1)])
    return found, driver.cache.k, driver.cache.v


@pytest.mark.parametrize("case", DENSE, ids=lambda case: case.name)
@pytest.mark.parametrize("threads", [1, 2])
def test_the_native_step_has_the_bits_of_the_operations(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: Case, threads: int
) -> None:
    dtype = "float32" if threads == 1 else "bfloat16"
    model = load(case, tmp_path, dtype)
    assert model.description()["step"] == "one native call"
    cache_dtype = getattr(torch, dtype)
    expected = run_by_operations(model, cache_dtype)
    monkeypatch.setattr(native, "num_threads", lambda: threads)
    got = run(model, cache_dtype)
    for actual, wanted in zip(got[0], expected[0], strict=True):
        assert torch.equal(actual, wanted)
    for actual, wanted in zip(got[1:], expected[1:], strict=True):  # NaN where nothing was written
        assert torch.equal(actual.nan_to_num(7.0), wanted.nan_to_num(7.0))


def run_by_operations(model: Decoder, dtype: torch.dtype) -> tuple[list[Tensor], Tensor, Tensor]:
    step, model._step = model._step, None
    try:
        return run(model, dtype)
    finally:
        model._step = step


@pytest.mark.parametrize("threads", [2, 3])
def test_threads_change_no_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, threads: int) -> None:
    """Wide enough that products, attention and norms are really divided."""
    sizes = {"hidden_size": 512, "intermediate_size": 1024, "num_attention_heads": 8, "num_hidden_layers": 2}
    model = load(Case("wide", "Llama", sizes), tmp_path, "bfloat16")
    monkeypatch.setattr(native, "num_threads", lambda: 1)
    expected = run(model, torch.float32)
    monkeypatch.setattr(native, "num_threads", lambda: threads)
    got = run(model, torch.float32)
    for actual, wanted in zip(got[0], expected[0], strict=True):
        assert torch.equal(actual, wanted)


@pytest.mark.parametrize("name", sorted(MIXED_EXPERTS))
def test_mixtures_of_experts_run_operation_by_operation(
    tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    model = load(next(case for case in CASES if case.name == name), tmp_path, "float32")
    assert model.description()["step"] == "operation by operation"
    assert "mixtures of experts" in caplog.text


def test_a_token_outside_of_the_vocabulary_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    model = load(DENSE[0], tmp_path, "float32")
    driver = PagedDriver(model)
    with pytest.raises(IndexError, match="128"):
        driver.forward([(PagedRequest([5, 128, 6]), 3)])
    assert bool(driver.cache.k.isnan().all())
