"""Constrained outputs through the whole engine: always valid, and the same text however the engine gets there."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable
from typing import Any

import jsonschema
import msgspec
import pytest
import torch

from engine.config import Limits
from engine.constraints import vocabulary as vocabulary_module
from engine.constraints.grammar import compile_constraint
from engine.constraints.limits import ConstraintLimits
from engine.constraints.vocabulary import Vocabulary
from engine.errors import InvalidParameter, SchemaTooComplex
from engine.mimir import model_path
from engine.models import load_model
from engine.models.batch import Model
from engine.text.tokenizer import Tokenizer
from engine.types import CompiledConstraint, Constraint, ConstraintKind, EngineRequest
from tests.e2e.driving import Answer, core_for, request, run, tokens

LIMITS = ConstraintLimits.of(Limits())
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "tags": {"type": "array", "items": {"enum": ["red", "green", "blue"]}, "minItems": 1, "maxItems": 3},
        "address": {
            "type": "object",
            "properties": {"city": {"type": "string", "pattern": "^[A-Z][a-z]{2,8}$"}, "zip": {"const": 12345}},
            "required": ["city", "zip"],
            "additionalProperties": False,
        },
    },
    "required": ["name", "age", "tags", "address"],
    "additionalProperties": False,
}
TREE = {
    "$defs": {
        "node": {"anyOf": [{"type": "boolean"}, {"type": "array", "items": {"$ref": "#/$defs/node"}, "maxItems": 2}]}
    },
    "$ref": "#/$defs/node",
}
CALLS = {
    "structures": [
        {"begin": "<f=add>", "schema": {"type": "object", "properties": {"a": {"type": "integer"}}}, "end": "</f>"}
    ],
    "triggers": ["<f="],
}
TAGGED = {
    "type": "structural_tag",
    "format": {
        "type": "tag",
        "begin": "<tool_call>",
        "content": {
            "type": "json_schema",
            "json_schema": {"type": "object", "properties": {"x": {"type": "null"}}, "additionalProperties": False},
        },
        "end": "</tool_call>",
    },
}


def is_json(schema: Any) -> Callable[[str], bool]:
    def check(text: str) -> bool:
        jsonschema.validate(json.loads(text), schema)
        return True

    return check


def matches(pattern: str) -> Callable[[str], bool]:
    return lambda text: re.fullmatch(pattern, text) is not None


CASES: list[tuple[ConstraintKind, str, Callable[[str], bool]]] = [
    ("json_object", "", is_json({"type": "object"})),
    ("json_schema", json.dumps(PERSON), is_json(PERSON)),
    ("json_schema", json.dumps(TREE), is_json(TREE)),
    ("regex", r"^[0-9]{3}-[a-z]{1,5}(@|\$)x$", matches(r"[0-9]{3}-[a-z]{1,5}(@|\$)x")),
    ("choice", '["yes", "no", "not \\"sure\\"\\n"]', lambda text: text in ("yes", "no", 'not "sure"\n')),
    ("grammar", 'start: "a" /[0-9]{1,4}/ ("," /[0-9]/)*', matches(r"a[0-9]{1,4}(,[0-9])*")),
    ("grammar", 'root ::= "x=" num\nnum ::= [1-9] [0-9]{0,3}', matches(r"x=[1-9][0-9]{0,3}")),
    ("structural_tag", json.dumps(TAGGED), matches(r"(?s)<tool_call>\{.*\}</tool_call>")),
    ("structural_tag", json.dumps(CALLS), lambda text: all(part.startswith("add>{") for part in text.split("<f=")[1:])),
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


Ask = Callable[..., EngineRequest]


@pytest.fixture(scope="module")
def ask(tokenizer: Tokenizer, vocabulary: Vocabulary) -> Ask:
    def build(
        name: str, kind: ConstraintKind, value: str = "", *, after: str = "", compact: bool = False, **options: Any
    ) -> EngineRequest:
        grammar = compile_constraint(Constraint(kind, value, "" if compact else None), vocabulary, LIMITS)
        prompt = tokenizer.encode("Tell me about JSON, and about Ana who is 31.")
        plain = request(name, prompt, **{"max_tokens": 90, "ignore_eos": False, **options})
        return msgspec.structs.replace(plain, constraint=CompiledConstraint(grammar, after))

    return build


def text_of(answer: Answer, tokenizer: Tokenizer, model: Model) -> str:
    return tokenizer.decode([token_id for token_id in answer.token_ids if token_id not in model.eos_token_ids])


def without_end(answer: Answer, model: Model) -> list[int]:
    """An end may be any of the end-of-sequence tokens."""
    has_end = answer.token_ids[-1] in model.eos_token_ids
    return answer.token_ids[:-1] if has_end else answer.token_ids


@pytest.mark.parametrize(("kind", "value", "is_valid"), CASES)
def test_every_finished_output_is_valid_however_random_the_choice(
    kind: ConstraintKind,
    value: str,
    is_valid: Callable[[str], bool],
    model: Model,
    tokenizer: Tokenizer,
    vocabulary: Vocabulary,
    ask: Ask,
) -> None:
    core = core_for(model, vocabulary=vocabulary, max_model_len=512)
    requests = [
        ask(f"r{seed}", kind, value, temperature=temperature, seed=seed, max_tokens=300)
        for seed, temperature in enumerate((0.0, 0.7, 1.0, 1.5, 2.0, 2.0))
    ]
    answers = run(core, requests)
    finished = [text_of(answer, tokenizer, model) for answer in answers.values() if answer.finish_reason == "stop"]
    assert finished, "no output came to an end"
    for text in finished:
        assert is_valid(text), text


@pytest.mark.parametrize("num_requests", [1, 7])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_jumping_ahead_gives_the_same_tokens_in_fewer_steps(
    num_requests: int, temperature: float, model: Model, vocabulary: Vocabulary, ask: Ask
) -> None:
    requests = [
        ask(f"r{i}", "json_schema", json.dumps(PERSON), compact=True, seed=i, temperature=temperature)
        for i in range(num_requests)
    ]
    found, num_steps = [], []
    for jump_ahead in (True, False):
        core = core_for(model, vocabulary=vocabulary, jump_ahead=jump_ahead)
        answers = run(core, requests)
        assert all(answer.finish_reason == "stop" for answer in answers.values())
        found.append([without_end(answers[request.request_id, 0], model) for request in requests])
        num_steps.append(sum(core.stats().num_steps.values()))
    assert found[0] == found[1]
    assert num_steps[0] < 0.8 * num_steps[1], num_steps


def test_no_forced_token_waits_for_a_forward_pass(model: Model, vocabulary: Vocabulary, ask: Ask) -> None:
    """In a batch of many rows as in one of few: behind a prompt, every chosen token had an alternative."""
    core = core_for(model, vocabulary=vocabulary)
    matchers = {}
    for i in range(9):
        asked = ask(f"r{i}", "json_schema", json.dumps(PERSON), compact=True, seed=i, max_tokens=50)
        assert asked.constraint is not None
        core.add(asked)
        matchers[asked.request_id] = vocabulary.matcher(asked.constraint.grammar)
    behind_prompt = dict.fromkeys(matchers, True)
    num_choices = num_forced = 0
    while core.has_work:
        for output in core.step():
            matcher = matchers[output.request_id]
            chosen, *forced = output.token_ids
            assert behind_prompt[output.request_id] or not matcher.compute_ff_tokens()
            behind_prompt[output.request_id] = False
            matcher.consume_tokens([chosen, *[token for token in forced if token not in model.eos_token_ids]])
            num_choices += 1
            num_forced += len(forced)
    assert num_forced > num_choices / 4


def test_a_row_that_ends_leaves_nothing_to_the_next_request_in_its_place(
    model: Model, vocabulary: Vocabulary, ask: Ask
) -> None:
    """Its mask may still be on its way when it ends; the next step must not see it."""
    core = core_for(model, vocabulary=vocabulary, max_num_seqs=2)
    free = request("free", [5, 9, 11, 300], max_tokens=12)
    expected = run(core_for(model), [free])["free", 0].token_ids
    constrained = [ask(f"r{i}", "choice", '["yes", "no", "perhaps"]', max_tokens=2 + i) for i in range(3)]
    mixed = []
    for asked in constrained:
        mixed += [asked, msgspec.structs.replace(free, request_id=f"free-{asked.request_id}")]
    answers = run(core, mixed)
    for asked in constrained:
        assert answers[f"free-{asked.request_id}", 0].token_ids == expected


def test_forced_tokens_stop_at_max_tokens_and_at_the_end_of_the_context(
    model: Model, tokenizer: Tokenizer, vocabulary: Vocabulary, ask: Ask
) -> None:
    long = json.dumps(["the one and only answer that may be given here, whatever was asked"])
    for max_model_len, max_tokens in ((128, 5), (40, 90)):
        core = core_for(model, vocabulary=vocabulary, max_model_len=max_model_len)
        asked = ask("r", "choice", long, max_tokens=max_tokens)
        answer = run(core, [asked])["r", 0]
        room = min(max_tokens, max_model_len - len(asked.prompt_token_ids))
        if answer.finish_reason == "length":
            assert len(answer.token_ids) == room
        assert json.loads(long)[0].startswith(text_of(answer, tokenizer, model))


def test_a_preempted_output_goes_on_where_it_was(model: Model, vocabulary: Vocabulary, ask: Ask) -> None:
    requests = [
        ask(f"r{i}", "json_schema", json.dumps(PERSON), after="." if i % 2 else "", seed=i, temperature=1.0)
        for i in range(6)
    ]
    calm = run(core_for(model, vocabulary=vocabulary), requests)
    pressed = run(core_for(model, vocabulary=vocabulary, num_blocks=30, budget=24), requests, stagger=2)
    assert sum(answer.num_preemptions for answer in pressed.values()) > 0
    assert {key: without_end(answer, model) for key, answer in calm.items()} == {
        key: without_end(answer, model) for key, answer in pressed.items()
    }


def test_every_choice_follows_the_grammar_on_its_own(
    model: Model, tokenizer: Tokenizer, vocabulary: Vocabulary, ask: Ask
) -> None:
    asked = ask("r", "json_schema", json.dumps(PERSON), compact=True, temperature=1.2, seed=3, max_tokens=200)
    core = core_for(model, vocabulary=vocabulary, max_model_len=256)
    answers = run(core, [msgspec.structs.replace(asked, num_choices=4)])
    texts = {text_of(answer, tokenizer, model) for answer in answers.values() if answer.finish_reason == "stop"}
    assert len(texts) > 1
    for text in texts:
        assert is_json(PERSON)(text)


def test_the_constraint_begins_after_its_marker(
    model: Model, tokenizer: Tokenizer, vocabulary: Vocabulary, ask: Ask
) -> None:
    free = request("free", ask("r", "json_object").prompt_token_ids, max_tokens=8, min_tokens=8, ignore_eos=False)
    token_ids = run(core_for(model, vocabulary=vocabulary), [free])["free", 0].token_ids
    marker = tokenizer.decode(token_ids)
    answer = run(core_for(model, vocabulary=vocabulary), [ask("r", "regex", "[0-9]{3}", after=marker, min_tokens=8)])[
        "r", 0
    ]
    assert answer.token_ids[:8] == token_ids
    assert re.fullmatch("[0-9]{3}", text_of(answer, tokenizer, model).removeprefix(marker))


def test_constrained_rows_leave_the_others_of_the_batch_alone(
    model: Model, tokenizer: Tokenizer, vocabulary: Vocabulary, ask: Ask
) -> None:
    plain = [
        request(f"p{i}", tokenizer.encode(text), max_tokens=30, seed=i, temperature=1.0)
        for i, text in enumerate(("Hi", "def f("))
    ]
    constrained = [ask(f"c{i}", "json_object", seed=i, temperature=1.0) for i in range(3)]
    alone = run(core_for(model, vocabulary=vocabulary), plain)
    mixed = run(
        core_for(model, vocabulary=vocabulary), [constrained[0], plain[0], constrained[1], plain[1], constrained[2]]
    )
    assert {key: mixed[key].token_ids for key in alone} == tokens(alone)


def test_other_sampling_parameters_still_hold(
    model: Model, tokenizer: Tokenizer, vocabulary: Vocabulary, ask: Ask
) -> None:
    digits = {tokenizer.encode(digit, add_special_tokens=False)[0] for digit in "0123456"}
    requests = [
        ask("logprobs", "regex", "[0-9]{4}", logprobs=2),
        ask("bias", "regex", "[0-9]{4}", logit_bias=dict.fromkeys(digits, -100.0)),
        ask("min", "regex", "[0-9]+", min_tokens=8, max_tokens=20, temperature=1.0),
        ask("stop", "regex", "[a-z]+[0-9]", stop_token_ids=tuple(digits), max_tokens=40),
        ask("goes on", "regex", "[0-9]{2,6}", ignore_eos=True),
        ask("bad words", "regex", "[0-9]{6}", bad_words_ids=tuple((token,) for token in digits)),
    ]
    answers = run(core_for(model, vocabulary=vocabulary), requests)
    answer = answers["logprobs", 0]
    assert [entry.token_id for entry in answer.logprobs] == answer.token_ids
    assert re.fullmatch("[789]{4}", text_of(answers["bias", 0], tokenizer, model))
    assert len(answers["min", 0].token_ids) >= 8
    assert answers["stop", 0].token_ids[-1] in digits or answers["stop", 0].finish_reason == "length"
    assert re.fullmatch("[0-9]{6}", text_of(answers["goes on", 0], tokenizer, model))
    assert answers["goes on", 0].finish_reason == "stop", "where nothing more is allowed, the output ends in any case"
    assert re.fullmatch("[789]{6}", text_of(answers["bad words", 0], tokenizer, model))


def test_a_bias_that_forbids_what_the_grammar_needs_ends_the_request_alone(
    model: Model, tokenizer: Tokenizer, vocabulary: Vocabulary, ask: Ask
) -> None:
    all_tokens = dict.fromkeys(range(4096), -100.0)
    requests = [ask("stuck", "choice", '["yes"]', logit_bias=all_tokens), ask("fine", "choice", '["yes"]')]
    core = core_for(model, vocabulary=vocabulary)
    for asked in requests:
        core.add(asked)
    ends = {}
    while core.has_work:
        ends.update({output.request_id: output for output in core.step() if output.finish_reason})
    assert (ends["stuck"].finish_reason, ends["stuck"].error) == ("error", InvalidParameter.code)
    assert ends["fine"].finish_reason == "stop"


def test_a_slow_grammar_holds_up_nobody_else(
    model: Model, tokenizer: Tokenizer, ask: Ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    class SlowVocabulary(Vocabulary):
        def matcher(self, grammar: str) -> Any:
            time.sleep(0.3)
            return super().matcher(grammar)

    slow = SlowVocabulary(tokenizer.files.definition, model.eos_token_ids, model.logits_size)
    core = core_for(model, vocabulary=slow)
    plain = request("plain", tokenizer.encode("Hi"), max_tokens=20)
    core.add(ask("slow", "choice", '["yes", "no"]', prompt_logprobs=1))
    core.add(plain)
    order = []
    while core.has_work:
        order += [output.request_id for output in core.step() if output.token_ids]
    assert order.index("slow") >= 20, "the plain request had all its tokens while the grammar was being built"
    stats = core.stats()
    assert stats.prompt_tokens_computed == len(plain.prompt_token_ids) + len(ask("x", "json_object").prompt_token_ids)


def test_a_grammar_that_becomes_too_complex_ends_its_request_alone(
    model: Model, tokenizer: Tokenizer, ask: Ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vocabulary_module, "MAX_LEXER_STATES", 3000)
    small = Vocabulary(tokenizer.files.definition, model.eos_token_ids, model.logits_size)
    core = core_for(model, vocabulary=small)
    core.add(ask("wide", "regex", "(.*a.{14}b.*|.*c.{14}d.*|.*e.{13}f.*)", temperature=1.5, max_tokens=100))
    core.add(ask("fine", "choice", '["yes", "no"]'))
    ends = {}
    while core.has_work:
        ends.update({output.request_id: output for output in core.step() if output.finish_reason})
    assert (ends["wide"].finish_reason, ends["wide"].error) == ("error", SchemaTooComplex.code)
    assert ends["fine"].finish_reason == "stop"
