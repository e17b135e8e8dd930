"""The compiler child: good constraints compile, bad ones are worded, hostile ones cost their sender alone."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest
import pytest_asyncio

from engine.config import Limits
from engine.constraints import compiler as compiler_module
from engine.constraints.compiler import ConstraintCompiler
from engine.errors import InvalidParameter, QueueFull, RequestError, SchemaTooComplex, UnsupportedParameter
from engine.mimir import model_path
from engine.text.tokenizer_files import read
from engine.types import Constraint, ConstraintKind

Start = Callable[..., Awaitable[ConstraintCompiler]]

DEFINITION = read(model_path("mimir")).definition
MAX_ANSWER_S = 1.0


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shared() -> AsyncIterator[ConstraintCompiler]:
    patient = dataclasses.replace(Limits(), constraint_timeout_s=30.0)  # the machine may be busy
    compiler = ConstraintCompiler(DEFINITION, [0], patient)
    await compiler.compile(Constraint("json_object"))
    yield compiler
    await compiler.close()


@pytest_asyncio.fixture
async def start() -> AsyncIterator[Start]:
    started: list[ConstraintCompiler] = []

    async def begin(definition: dict[str, Any] = DEFINITION, **limits: Any) -> ConstraintCompiler:
        started.append(
            ConstraintCompiler(
                definition, [0], dataclasses.replace(Limits(), **{"constraint_timeout_s": 30.0, **limits})
            )
        )
        return started[-1]

    yield begin
    for compiler in started:
        await compiler.close()


def nested(depth: int) -> str:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(depth - 1):
        schema = {"items": schema}
    return json.dumps(schema)


def properties(count: int) -> str:
    return json.dumps({"type": "object", "properties": {f"field{i}": {"type": "string"} for i in range(count)}})


@pytest.mark.parametrize(
    ("kind", "value", "problem"),
    [
        ("json_schema", "{", "not valid JSON"),
        ("json_schema", "[" * 10_000 + "]" * 10_000, "nested too deeply|must be a JSON object"),
        ("json_schema", "[1]", "must be a JSON object"),
        ("json_schema", '{"type": "strin"}', "Invalid type: strin"),
        ("json_schema", '{"not": {"type": "string"}}', "Unimplemented keys.*not"),
        ("json_schema", '{"type": "array", "uniqueItems": true}', "uniqueItems"),
        ("json_schema", '{"type": "string", "format": "nonsense"}', "format"),
        ("json_schema", '{"$ref": "#/$defs/missing"}', "missing"),
        ("json_schema", '{"$ref": "#"}', "cannot be used"),
        ("json_schema", '{"allOf": [{"type": "string"}, {"type": "integer"}]}', "Unsatisfiable"),
        ("regex", "", "must not be empty"),
        ("regex", "(a", "unclosed group"),
        ("regex", "(?=a)b", "look-around"),
        ("regex", r"(a)\1", "backreferences"),
        ("regex", "(" * 5000 + "a" + ")" * 5000, "cannot be used"),
        ("regex", "\ud800", "not valid Unicode"),
        ("choice", "[]", "at least one string"),
        ("choice", '["a", 1]', "at least one string"),
        ("choice", '["a", ""]', "must not be empty"),
        ("grammar", "  ", "must not be empty"),
        ("grammar", "root ::= nowhere", "nowhere"),
        ("grammar", "start: nowhere", "nowhere"),
        ("grammar", 'start: "a" <|no_such_token|>', "unknown special token"),
        ("grammar", "start: " + "(" * 3000 + '"a"' + ")" * 3000, "nested"),
        ("structural_tag", "[]", "must be an object"),
        ("structural_tag", "{}", "needs format"),
        ("structural_tag", '{"format": {"type": "qwen_xml"}}', "not supported"),
        ("structural_tag", '{"structures": [], "triggers": ["<"]}', "must not be empty"),
        ("structural_tag", '{"structures": [{"begin": "a", "end": ""}], "triggers": ["b"]}', "start with one of"),
    ],
)
@pytest.mark.asyncio(loop_scope="module")
async def test_what_is_wrong_is_worded_at_once(
    shared: ConstraintCompiler, kind: ConstraintKind, value: str, problem: str
) -> None:
    took_s = []
    for _ in range(3):  # the best of three: the machine may be busy
        started = time.monotonic()
        with pytest.raises(InvalidParameter, match=problem) as caught:
            await shared.compile(Constraint(kind, value, param="some.field"))
        took_s.append(time.monotonic() - started)
    assert min(took_s) < MAX_ANSWER_S
    assert (caught.value.param, caught.value.code) == ("some.field", "invalid_value")
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize(
    ("kind", "fits", "exceeds"),
    [
        ("json_schema", nested(32), nested(33)),
        ("json_schema", json.dumps({"enum": ["a" * i for i in range(100)]}), json.dumps({"enum": ["a"] * 1001})),
        ("json_schema", json.dumps({"enum": ["a" * 2048]}), json.dumps({"enum": ["a" * 2049]})),
        ("json_schema", json.dumps({"const": "a" * 65_000}), json.dumps({"const": "a" * 65_536})),
        ("json_schema", '{"pattern": "a{1024}", "type": "string"}', '{"pattern": "a{1025}", "type": "string"}'),
        ("regex", "a{1,1024}", "a{1,1025}"),
        ("regex", "(b{3}){4}", "a{99999999999999999999}"),
        ("choice", json.dumps([f"choice {i}" for i in range(1000)]), json.dumps([f"choice {i}" for i in range(1001)])),
        ("choice", json.dumps(["b" * 2048] * 8), json.dumps(["b" * 2048] * 8 + ["b"])),
        ("grammar", 'start: "a"{1,1024}', 'start: "a"{1,1025}'),
    ],
)
@pytest.mark.asyncio(loop_scope="module")
async def test_limits_hold_at_their_edges(
    shared: ConstraintCompiler, kind: ConstraintKind, fits: str, exceeds: str
) -> None:
    await shared.compile(Constraint(kind, fits))
    with pytest.raises(SchemaTooComplex):
        await shared.compile(Constraint(kind, exceeds))


@pytest.mark.asyncio(loop_scope="module")
async def test_node_limit_and_rows_that_are_too_wide(shared: ConstraintCompiler) -> None:
    with pytest.raises(SchemaTooComplex, match="4096 nodes"):
        await shared.compile(Constraint("json_schema", json.dumps({f"p{i}": {} for i in range(4096)})))
    with pytest.raises(InvalidParameter, match="items"):
        await shared.compile(Constraint("json_schema", properties(1500)))


HOSTILE = [
    ("regex", "((a{1,1000}){1,1000}){1,1000}"),
    ("regex", "(a|b)*a(a|b){200}c(a|b)*d(a|b){200}"),
    ("regex", "(.*a.{14}b.*|.*c.{14}d.*|.*e.{13}f.*)"),
    ("regex", r"(\p{L}|\p{N}|\s){1,1000}(\p{L}+)+x"),
    ("regex", "(" + "|".join(f".*{i}.*" for i in range(800)) + ")"),
    ("json_schema", json.dumps({"type": "array", "items": {"type": "string", "maxLength": 10**9}, "minItems": 10**6})),
    (
        "json_schema",
        json.dumps(
            {
                "$defs": {f"d{i}": {"allOf": [{"$ref": f"#/$defs/d{i + 1}"}] * 2} for i in range(30)}
                | {"d30": {"type": "string"}},
                "$ref": "#/$defs/d0",
            }
        ),
    ),
    (
        "json_schema",
        json.dumps(
            {"allOf": [{"anyOf": [{"properties": {f"p{i}{j}": {"type": "null"}}} for j in range(8)]} for i in range(8)]}
        ),
    ),
    ("grammar", 'start: s\ns: s s s | "a" | "" '),
    ("grammar", "\n".join([*(f'r{i}: r{i + 1} r{i + 1} "x"?' for i in range(60)), 'r60: "y"', "start: r0"])),
]


@pytest.mark.parametrize(("kind", "value"), HOSTILE)
@pytest.mark.asyncio(loop_scope="module")
async def test_hostile_constraints_are_answered_and_the_next_one_works(
    shared: ConstraintCompiler, kind: ConstraintKind, value: str
) -> None:
    started = time.monotonic()
    try:
        await shared.compile(Constraint(kind, value))
    except RequestError as error:
        assert error.code in ("invalid_value", "schema_too_complex")  # noqa: PT017 - either outcome will do
    assert time.monotonic() - started < 2.5
    await shared.compile(Constraint("regex", f"next[{len(value) % 10}]"))


async def test_a_compilation_beyond_its_time_is_killed_and_the_next_one_works(start: Start) -> None:
    compiler = await start(constraint_cpu_s=0.02)
    with pytest.raises(SchemaTooComplex, match="too much time or memory"):
        await compiler.compile(Constraint("json_schema", properties(1200)))
    assert await compiler.compile(Constraint("regex", "a+"))
    waiting = await start(constraint_timeout_s=0.0)
    with pytest.raises(SchemaTooComplex, match="did not finish"):
        await waiting.compile(Constraint("regex", "a+"))


async def test_a_compilation_beyond_its_memory_ends_alone(start: Start) -> None:
    compiler = await start(constraint_memory_mib=1)
    with pytest.raises(SchemaTooComplex, match="too much time or memory"):
        await compiler.compile(Constraint("json_schema", properties(1200)))


async def test_compiled_constraints_are_remembered(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiler_module, "MAX_CACHED", 2)
    compiler = await start()
    seen: list[tuple[str, str]] = []
    compiler.on_done = lambda kind, outcome, seconds: seen.append((kind, outcome))
    for pattern in ("a", "b", "a", "c", "b", "a"):
        await compiler.compile(Constraint("regex", pattern, param=f"field {len(seen)}"))
    with pytest.raises(InvalidParameter):
        await compiler.compile(Constraint("regex", "("))
    outcomes = [outcome for _, outcome in seen]
    assert outcomes == ["compiled", "compiled", "cached", "compiled", "compiled", "compiled", "invalid_value"]


async def test_only_so_many_may_wait(start: Start) -> None:
    compiler = await start(max_queued_constraints=3)
    tasks = [asyncio.create_task(compiler.compile(Constraint("regex", f"x{i}"))) for i in range(6)]
    results = await asyncio.gather(*tasks, return_exceptions=True)
    assert sum(isinstance(result, QueueFull) for result in results) == 3
    assert sum(isinstance(result, str) for result in results) == 3
    same = [compiler.compile(Constraint("regex", "one for all")) for _ in range(6)]
    assert len(set(await asyncio.gather(*same))) == 1, "equal constraints wait for one compilation"


async def test_a_caller_that_leaves_does_not_disturb_the_next(start: Start) -> None:
    compiler = await start()
    for i in range(5):
        task = asyncio.create_task(compiler.compile(Constraint("json_schema", properties(100 + i))))
        await asyncio.sleep(0.001)
        task.cancel()
        grammar = await compiler.compile(Constraint("choice", json.dumps([f"answer {i}"])))
        assert f"answer {i}" in grammar


async def test_a_vocabulary_that_cannot_be_used_is_told_with_each_request(start: Start) -> None:
    definition = {"model": {"type": "WordPiece", "vocab": {"a": 0}, "unk_token": "a"}, "added_tokens": []}
    compiler = await start(definition)
    for _ in range(2):
        with pytest.raises(UnsupportedParameter, match="not possible with this tokenizer"):
            await compiler.compile(Constraint("regex", "a", param="regex"))
