"""Every family against transformers on the same random fp32 weights."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from transformers import PreTrainedModel

from engine.models import load_model
from engine.models.batch import Model
from tests.e2e.driving import greedy
from tests.models.families import CASES, VOCAB, Case, save
from tests.models.paged_driver import prompt_logits

LOGITS_TOLERANCE = 1e-4
NUM_TOKENS = 64


@dataclass
class Pair:
    """The same checkpoint in both libraries."""

    reference: PreTrainedModel
    model: Model


@pytest.fixture(scope="module", params=CASES, ids=lambda case: case.name)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    case: Case = request.param
    reference = case.build()
    folder = save(reference, tmp_path_factory.mktemp(case.name), max_shard_size=case.max_shard_size)
    return Pair(reference, load_model(folder, dtype="float32", kind="native", max_model_len=case.max_model_len))


def random_ids(count: int, seed: int) -> list[int]:
    return torch.randint(3, VOCAB, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


@torch.inference_mode()
def reference_logits(reference: PreTrainedModel, token_ids: list[int]) -> torch.Tensor:
    return reference(torch.tensor([token_ids]), use_cache=False).logits[0]


@torch.inference_mode()
def test_logits_equal_transformers_when_the_prompt_runs_in_two_chunks(pair: Pair) -> None:
    token_ids = random_ids(45, seed=1)
    expected = reference_logits(pair.reference, token_ids)
    actual = prompt_logits(pair.model, token_ids, first_chunk=19)
    assert expected.std() > 0.1
    torch.testing.assert_close(actual, expected, rtol=0, atol=LOGITS_TOLERANCE)


@torch.inference_mode()
def test_greedy_tokens_of_the_batched_engine_equal_transformers(pair: Pair) -> None:
    """Token by token: each is what transformers finds most likely after the same prefix, so the greedy runs agree."""
    prompts = [random_ids(count, seed=count) for count in (17, 3, 26)]
    for prompt, output in zip(prompts, greedy(pair.model, prompts, NUM_TOKENS), strict=True):
        assert len(output) == NUM_TOKENS
        logits = reference_logits(pair.reference, prompt + output[:-1])
        assert output == logits[len(prompt) - 1 :].argmax(dim=-1).tolist()
