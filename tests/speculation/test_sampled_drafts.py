"""Drafts that were drawn at random, verified by rules that use what they were drawn from, in the running engine."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch

from engine.models import load_model
from engine.models.batch import Model
from engine.speculation.base import RequestView
from engine.speculation.tree import DraftTree, Kind
from engine.types import EngineRequest
from tests.e2e.driving import core_for, request, run, tokens
from tests.speculation.hostile import NAME, Guess, Scripted, equip

VOCAB = 64
NUM_SAMPLES = 500
PROMPT = [5, 9, 17, 33]
# Largest chi-square of two samples over 16 cells, 15 degrees of freedom, that chance exceeds once in 10,000 times.
LIMIT = 44.3


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        initializer_range=0.2,
        tie_word_embeddings=False,
    )
    path: Path = tmp_path_factory.mktemp("toy")
    LlamaForCausalLM(config).save_pretrained(path)
    return load_model(path, device=torch.device("cpu"), dtype="float32", deterministic=True)


def drawn(kind: Kind, width: int, depth: int) -> Guess:
    """Trees whose nodes are drawn from one fixed distribution, `width` at the root and one after each below."""
    q = np.ones(VOCAB) / VOCAB
    q[::2] *= 3.0
    q /= q.sum()

    def guess(view: RequestView, cap: int, generator: random.Random) -> DraftTree:
        if not view.samples:
            return DraftTree()
        draws = np.random.default_rng(generator.randrange(1 << 30))
        found: list[int] = draws.choice(VOCAB, size=width, replace=kind == "iid", p=q).tolist()
        parents = [-1] * width
        for level in range(1, depth):
            for branch in range(width):
                found.append(int(draws.choice(VOCAB, p=q)))
                parents.append((level - 1) * width + branch)
        rows = np.tile(q.astype(np.float32), (len(found) + 1, 1))
        return DraftTree(tuple(found), tuple(parents), (1.0,) * len(found), (NAME,) * len(found), kind, rows)

    return guess


def traffic(verifier: str | None) -> list[EngineRequest]:
    """The same prompt under many seeds; the first token comes from the prompt, the second and third after drafts."""
    requests = []
    for seed in range(NUM_SAMPLES):
        plain = request(f"r{seed}", PROMPT, max_tokens=5, temperature=1.0, top_k=4, seed=seed)
        choice = None if verifier is None else {"drafters": NAME, "max_nodes": 8, "verifier": verifier}
        requests.append(msgspec.structs.replace(plain, speculative=choice))
    return requests


def outputs(model: Model, verifier: str | None, guess: Guess | None) -> tuple[list[tuple[int, ...]], Scripted | None]:
    core = core_for(model, max_num_seqs=64, num_blocks=512, max_model_len=32)
    drafter = None
    if guess is not None:
        drafter = Scripted(guess)
        equip(core, drafter)
    requests = traffic(verifier)
    found: dict[tuple[str, int], list[int]] = {}
    for first in range(0, len(requests), 100):
        found.update(tokens(run(core, requests[first : first + 100])))
    return [tuple(found[f"r{seed}", 0]) for seed in range(NUM_SAMPLES)], drafter


def chi_square(mine: list[tuple[int, ...]], theirs: list[tuple[int, ...]]) -> float:
    """Of two samples of one size: the 15 commonest cells and the rest."""
    a, b = Counter(mine), Counter(theirs)
    common = [cell for cell, _ in (a + b).most_common(15)]
    counts = [(a[cell], b[cell]) for cell in common]
    counts.append((len(mine) - sum(x for x, _ in counts), len(theirs) - sum(y for _, y in counts)))
    return sum((x - y) ** 2 / (x + y) for x, y in counts if x + y)


@pytest.fixture(scope="module")
def plain(model: Model) -> list[tuple[int, ...]]:
    return outputs(model, None, None)[0]


@pytest.mark.parametrize(
    ("verifier", "kind", "width", "depth"),
    [
        ("rrs", "swor", 4, 2),
        pytest.param("rejection", "swor", 1, 3, marks=pytest.mark.slow),
        pytest.param("block", "swor", 1, 3, marks=pytest.mark.slow),
        pytest.param("multi_round", "iid", 4, 2, marks=pytest.mark.slow),
        pytest.param("k_sequential", "iid", 4, 2, marks=pytest.mark.slow),
        pytest.param("multi_draft", "iid", 2, 2, marks=pytest.mark.slow),
        pytest.param("max_accept", "swor", 3, 2, marks=pytest.mark.slow),
    ],
)
def test_a_rule_that_uses_q_changes_no_distribution(
    model: Model, plain: list[tuple[int, ...]], verifier: str, kind: Kind, width: int, depth: int
) -> None:
    found, drafter = outputs(model, verifier, drawn(kind, width, depth))
    assert drafter is not None
    assert drafter.num_accepted > 20
    assert found != plain, "another rule than the walk has decided"
    for place in (1, 2):
        mine, theirs = ([row[place - 1 : place + 1] for row in rows] for rows in (found, plain))
        assert chi_square(mine, theirs) < LIMIT


def test_the_test_has_power(model: Model, plain: list[tuple[int, ...]]) -> None:
    """A drafter that lies about what it drew from is found out."""

    def lying(view: RequestView, cap: int, generator: random.Random) -> DraftTree:
        q = np.full((2, VOCAB), 1.0 / VOCAB, dtype=np.float32)
        return DraftTree((63,), (-1,), (1.0,), (NAME,), "swor", q)

    found, _ = outputs(model, "rejection", lying)
    assert chi_square([row[:2] for row in found], [row[:2] for row in plain]) > 2 * LIMIT


@pytest.mark.parametrize("options", [{"temperature": 0.0}, {"repetition_penalty": 1.3}, {"logprobs": 1}])
def test_rows_that_such_a_rule_cannot_serve_are_walked(model: Model, options: dict[str, float]) -> None:
    one = request("a", PROMPT, **{"max_tokens": 12, "temperature": 1.0, "seed": 3, **options})
    expected = run(core_for(model, max_model_len=32), [one])
    choice = {"drafters": NAME, "verifier": "rrs"}
    core = equip(core_for(model, max_model_len=32), Scripted(drawn("swor", 4, 2)))
    found = run(core, [msgspec.structs.replace(one, speculative=choice)])
    assert tokens(found) == tokens(expected)
    assert found["a", 0].logprobs == expected["a", 0].logprobs
