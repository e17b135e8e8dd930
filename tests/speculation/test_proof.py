"""The long proof: every drafter, 200 prompts, 128 tokens each, greedy and seeded, with preemption, chunks and hits."""

from __future__ import annotations

import random

import msgspec
import pytest
import torch

from engine.compression.artefacts import model_digest
from engine.execution.eagle.files import write
from engine.mimir import model_path
from engine.models import load_model
from engine.models.batch import Model
from engine.speculation.allowance import FixedBudget
from engine.speculation.catalogue import drafters
from engine.text.tokenizer import Tokenizer
from engine.types import EngineRequest
from tests.e2e.driving import Answer, core_for, request, run, tokens
from tests.speculation.heads import random_head

NUM_PROMPTS = 200
NUM_TOKENS = 128
NUM_BLOCKS = 180  # of 8 tokens, for 16 rows of up to 240: some must give way
WORDS = (
    "the dog",
    "a red ball",
    "def add(a, b):",
    "return a + b",
    '{"name":',
    "Monday,",
    "Ana",
    "is",
    "said:",
    "1, 2, 3,",
)


@pytest.fixture(scope="module")
def model() -> Model:
    return load_model(model_path("mimir"), device=torch.device("cpu"), dtype="float32", deterministic=True)


@pytest.fixture(scope="module")
def head(model: Model, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Of random weights: what the drafter eagle guesses is nearly always wrong, and has to be put away."""
    path = tmp_path_factory.mktemp("head")
    write(random_head(model_digest(model_path("mimir")), width=128), path)
    return str(path)


@pytest.fixture(scope="module")
def prompts() -> list[EngineRequest]:
    """Texts that repeat themselves more or less, a third of them with one beginning; every other one is sampled."""
    tokenizer = Tokenizer.from_folder(model_path("mimir"))
    generator = random.Random(11)
    shared = tokenizer.encode("You are a helpful assistant who repeats what is said and goes on from there. ")
    requests = []
    for i in range(NUM_PROMPTS):
        words = generator.sample(WORDS, generator.randint(1, 4))
        text = " ".join(generator.choice(words) for _ in range(generator.randint(3, 20)))
        prompt = (shared if i % 3 == 0 else []) + tokenizer.encode(text)
        temperature = (0.0, 0.7, 0.0, 1.0)[i % 4]
        requests.append(request(f"r{i}", prompt[:100], max_tokens=NUM_TOKENS, temperature=temperature, seed=i))
    return requests


@pytest.fixture(scope="module")
def expected(model: Model, prompts: list[EngineRequest], head: str) -> dict[tuple[str, int], list[int]]:
    return tokens(run_in_turns(model, prompts, head, num_blocks=1000, budget=512))


def run_in_turns(
    model: Model, requests: list[EngineRequest], head: str, *, num_blocks: int, budget: int
) -> dict[tuple[str, int], Answer]:
    core = core_for(model, num_blocks=num_blocks, budget=budget, max_model_len=240, eagle_head=head)
    core.speculation._budget = FixedBudget(64)  # guesses whether it pays off or not
    answers: dict[tuple[str, int], Answer] = {}
    for first in range(0, len(requests), 50):
        answers.update(run(core, requests[first : first + 50]))
    assert core.scheduler.cache.pool.counts.active == 0
    assert core.scheduler.stats().spec_steps > 2000 or all(one.speculative is None for one in requests)
    return answers


@pytest.mark.slow
@pytest.mark.parametrize("name", drafters.names())
def test_every_drafter_leaves_200_answers_of_128_tokens_as_they_are(
    name: str, model: Model, prompts: list[EngineRequest], head: str, expected: dict[tuple[str, int], list[int]]
) -> None:
    choice = {"drafters": [name], "max_nodes": 12}
    asking = [msgspec.structs.replace(one, speculative=choice) for one in prompts]
    found = run_in_turns(model, asking, head, num_blocks=NUM_BLOCKS, budget=40)
    assert tokens(found) == expected
    assert sum(answer.num_preemptions for answer in found.values()) > 0, "the pool was meant to be too small"
    assert sum(answer.num_cached_tokens for answer in found.values()) > 0
