"""The same model on CPU and on a CUDA device."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from engine.models import load_model
from tests.models.families import CASES, Case, save
from tests.models.paged_driver import PagedDriver, PagedRequest, prompt_logits

TOKEN_IDS = list(range(3, 48))


@pytest.mark.gpu
@torch.inference_mode()
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_cuda_equals_cpu_in_fp32(case: Case, tmp_path: Path) -> None:
    save(case.build(), tmp_path, max_shard_size=case.max_shard_size)
    expected, actual = (
        prompt_logits(
            load_model(tmp_path, device=device, dtype="float32", max_model_len=case.max_model_len),
            TOKEN_IDS,
            first_chunk=19,
        )
        for device in ("cpu", "cuda")
    )
    torch.testing.assert_close(actual.cpu(), expected, rtol=0, atol=1e-3)


@pytest.mark.gpu
@torch.inference_mode()
@pytest.mark.parametrize("name", ["llama", "gemma2", "qwen2_moe"])
def test_bf16_on_cuda_stays_near_fp32_on_cpu(name: str, tmp_path: Path) -> None:
    case = next(case for case in CASES if case.name == name)
    save(case.build().bfloat16(), tmp_path)
    expected = prompt_logits(load_model(tmp_path), TOKEN_IDS, first_chunk=19)
    model = load_model(tmp_path, device="cuda")
    assert model.dtype == torch.bfloat16
    driver = PagedDriver(model, dtype=torch.bfloat16)
    request = PagedRequest(list(TOKEN_IDS))
    [hidden] = driver.forward([(request, len(TOKEN_IDS))])
    error = (model.logits(hidden).cpu() - expected).square().mean().sqrt()
    assert error < 0.15 * expected.square().mean().sqrt()  # a wrong model is off by more than the size of the logits
