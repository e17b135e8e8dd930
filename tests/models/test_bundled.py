"""The model that comes with Kvasir, as files: it must load, run, and agree with transformers."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from engine.launch import resolve_model_path
from engine.mimir import MODELS
from engine.models import load_model
from tests.e2e.driving import greedy
from tests.models.paged_driver import prompt_logits

TOKEN_IDS = list(range(300, 420, 3))


@torch.inference_mode()
@pytest.mark.parametrize("name", MODELS)
def test_bundled_model_equals_transformers(name: str) -> None:
    folder = resolve_model_path(name)
    model = load_model(folder, max_model_len=1024)
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    expected = reference(torch.tensor([TOKEN_IDS]), use_cache=False).logits[0]
    actual = prompt_logits(model, TOKEN_IDS, first_chunk=17)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-3)
    assert model.eos_token_ids
    [output] = greedy(model, [TOKEN_IDS], 16)
    assert len(output) == 16
