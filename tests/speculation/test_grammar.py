"""Speculation under a grammar: the same text, whether drafts are legal or not, and wherever the grammar begins."""

from __future__ import annotations

import json
import random
from typing import Any

import msgspec
import pytest
import torch

from engine.config import Limits
from engine.constraints.grammar import compile_constraint
from engine.constraints.limits import ConstraintLimits
from engine.constraints.vocabulary import Vocabulary
from engine.mimir import model_path
from engine.models import load_model
from engine.models.batch import Model
from engine.speculation.base import RequestView
from engine.speculation.tree import DraftTree
from engine.text.tokenizer import Tokenizer
from engine.types import CompiledConstraint, Constraint, ConstraintKind, EngineRequest
from tests.e2e.driving import core_for, request, run, tokens
from tests.speculation import hostile
from tests.speculation.hostile import Guess, Scripted, equip, speculating

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "tags": {"type": "array", "items": {"enum": ["red", "green", "blue"]}, "minItems": 1, "maxItems": 3},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}
KINDS: list[tuple[ConstraintKind, str]] = [
    ("json_schema", json.dumps(PERSON)),
    ("regex", r"^[0-9]{3}-[a-z]{1,5}(@|\$)x$"),
    ("grammar", 'start: "a" /[0-9]{1,4}/ ("," /[0-9]/)*'),
]


@pytest.fixture(scope="module")
def model() -> Model:
    return load_model(model_path("mimir"), device=torch.device("cpu"), dtype="float32", deterministic=True)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_folder(model_path("mimir"))


@pytest.fixture(scope="module")
def vocabulary(model: Model, tokenizer: Tokenizer) -> Vocabulary:
    return Vocabulary(tokenizer.files.definition, model.eos_token_ids, model.logits_size)


def traffic(vocabulary: Vocabulary, tokenizer: Tokenizer, **options: Any) -> list[EngineRequest]:
    prompt = tokenizer.encode("Tell me about Ana who is 31, as JSON.")
    limits = ConstraintLimits.of(Limits())
    requests = []
    for i, (kind, value) in enumerate(KINDS):
        grammar = compile_constraint(Constraint(kind, value, ""), vocabulary, limits)
        for temperature in (0.0, 1.0):
            plain = request(
                f"{i}-{temperature}",
                prompt,
                max_tokens=40,
                ignore_eos=False,
                seed=i,
                temperature=temperature,
                **options,
            )
            requests.append(msgspec.structs.replace(plain, constraint=CompiledConstraint(grammar)))
    return requests


@pytest.mark.parametrize("num_rows", [2, 6])
@pytest.mark.parametrize("jump_ahead", [True, False])
def test_constrained_outputs_are_the_same_with_any_draft(
    num_rows: int, jump_ahead: bool, model: Model, vocabulary: Vocabulary, tokenizer: Tokenizer
) -> None:
    requests = traffic(vocabulary, tokenizer)[-num_rows:]
    options: dict[str, Any] = {"vocabulary": vocabulary, "jump_ahead": jump_ahead}
    expected = tokens(run(core_for(model, **options), requests))
    guesses: list[Guess] = [
        hostile.oracle(expected),
        hostile.oracle(expected, num_wrong=3, vocab_size=model.vocab_size),
        hostile.random_tree(model.vocab_size),
        hostile.with_ends(model.eos_token_ids[0]),
    ]
    for guess in guesses:
        drafter = Scripted(guess)
        core = equip(core_for(model, **options), drafter)
        assert tokens(run(core, speculating(requests))) == expected
        if guess is guesses[0]:
            assert drafter.num_accepted > 0


def test_penalties_and_a_grammar_together_follow_the_path(
    model: Model, vocabulary: Vocabulary, tokenizer: Tokenizer
) -> None:
    requests = traffic(vocabulary, tokenizer, repetition_penalty=1.2, frequency_penalty=0.5)
    expected = tokens(run(core_for(model, vocabulary=vocabulary), requests))
    drafter = Scripted(hostile.oracle(expected, num_wrong=2, vocab_size=model.vocab_size))
    core = equip(core_for(model, vocabulary=vocabulary), drafter)
    assert tokens(run(core, speculating(requests))) == expected
    assert drafter.num_accepted > 0


def test_a_grammar_that_begins_in_the_middle_of_a_draft_applies_from_there(
    model: Model, vocabulary: Vocabulary, tokenizer: Tokenizer
) -> None:
    """The text that it waits for is part of a guessed path: what follows on the same path is constrained already."""
    plain = request("a", tokenizer.encode("Tell me a story about a dog."), max_tokens=40)
    free = run(core_for(model), [plain])["a", 0].token_ids
    after = tokenizer.decode(free[6:8])
    grammar = compile_constraint(
        Constraint("regex", r"[0-9]{3}-[a-z]{1,5}x", ""), vocabulary, ConstraintLimits.of(Limits())
    )
    constrained = msgspec.structs.replace(plain, constraint=CompiledConstraint(grammar, after))
    expected = tokens(run(core_for(model, vocabulary=vocabulary), [constrained]))
    assert expected["a", 0] != free

    def unaware(view: RequestView, cap: int, generator: random.Random) -> DraftTree:
        place = len(view.token_ids) - view.num_prompt_tokens
        return DraftTree.chain(free[place : place + cap], source=hostile.NAME)

    for guess in (unaware, hostile.oracle(expected)):
        drafter = Scripted(guess)
        core = equip(core_for(model, vocabulary=vocabulary), drafter)
        assert tokens(run(core, speculating([constrained], 12))) == expected
        assert drafter.num_accepted >= 6
