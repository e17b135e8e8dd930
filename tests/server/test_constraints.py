"""Fields that constrain the output: which constraint each becomes, and that none is dropped."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.server.support import CHAT, COMPLETIONS, HELLO, app

SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}
TEXT = json.dumps(SCHEMA)
TAG = {"type": "structural_tag", "structures": [{"begin": "<a>", "schema": {}, "end": "</a>"}], "triggers": ["<a>"]}


def error_of(response: Any) -> dict[str, Any]:
    assert response.status_code == 400, response.text
    error: dict[str, Any] = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error


@pytest.mark.parametrize(
    ("fields", "kind", "value", "param"),
    [
        ({"response_format": {"type": "json_object"}}, "json_object", "", "response_format"),
        ({"response_format": {"type": "json_object", "schema": SCHEMA}}, "json_schema", TEXT, "response_format.schema"),
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "x", "schema": SCHEMA, "strict": True},
                }
            },
            "json_schema",
            TEXT,
            "response_format.json_schema.schema",
        ),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}},
            "json_object",
            "",
            "response_format.json_schema",
        ),
        ({"response_format": {"type": "json_schema", "schema": SCHEMA}}, "json_schema", TEXT, "response_format.schema"),
        ({"response_format": {"type": "json", "value": SCHEMA}}, "json_schema", TEXT, "response_format.value"),
        ({"response_format": {"type": "regex", "pattern": "a+"}}, "regex", "a+", "response_format.pattern"),
        ({"response_format": {"type": "choice", "choice": ["a"]}}, "choice", '["a"]', "response_format.choice"),
        ({"response_format": {"type": "grammar", "grammar": "start: /a/"}}, "grammar", "start: /a/", None),
        ({"response_format": TAG}, "structural_tag", json.dumps(TAG), "response_format"),
        ({"structured_outputs": {"json": SCHEMA}}, "json_schema", TEXT, "structured_outputs.json"),
        ({"structured_outputs": {"json": TEXT}}, "json_schema", TEXT, "structured_outputs.json"),
        ({"structured_outputs": {"regex": "a+", "json": None}}, "regex", "a+", "structured_outputs.regex"),
        ({"structured_outputs": {"choice": ["a", "b"]}}, "choice", '["a", "b"]', "structured_outputs.choice"),
        ({"structured_outputs": {"grammar": "start: /a/"}}, "grammar", "start: /a/", "structured_outputs.grammar"),
        ({"structured_outputs": {"json_object": True}}, "json_object", "", "structured_outputs.json_object"),
        ({"structured_outputs": {"structural_tag": json.dumps(TAG)}}, "structural_tag", json.dumps(TAG), None),
        ({"guided_json": SCHEMA}, "json_schema", TEXT, "guided_json"),
        ({"guided_json": TEXT}, "json_schema", TEXT, "guided_json"),
        ({"guided_regex": "a+"}, "regex", "a+", "guided_regex"),
        ({"guided_choice": ["a", "é"]}, "choice", '["a", "é"]', "guided_choice"),
        ({"guided_grammar": "root ::= [a]"}, "grammar", "root ::= [a]", "guided_grammar"),
        ({"json_schema": TEXT}, "json_schema", TEXT, "json_schema"),
        ({"json_schema": SCHEMA}, "json_schema", TEXT, "json_schema"),
        ({"regex": "a+"}, "regex", "a+", "regex"),
        ({"ebnf": "root ::= [a]"}, "grammar", "root ::= [a]", "ebnf"),
        ({"grammar": "root ::= [a]"}, "grammar", "root ::= [a]", "grammar"),
        ({"grammar": {"type": "regex", "value": "a+"}}, "regex", "a+", "grammar.value"),
        ({"structural_tag": TAG}, "structural_tag", json.dumps(TAG), "structural_tag"),
    ],
)
@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
async def test_every_form_becomes_its_constraint(
    path: str, fields: dict[str, Any], kind: str, value: str, param: str | None
) -> None:
    base = HELLO if path == CHAT else {"prompt": "ab"}
    async with app() as server:
        response = await server.post(path, {**base, **fields})
        assert response.status_code == 200, response.text
        constraint = server.engine.seen[0].constraint
        assert constraint is not None
        assert (constraint.kind, constraint.value, constraint.whitespace) == (kind, value, None)
        assert param is None or constraint.param == param


async def test_options_for_white_space_reach_the_grammar() -> None:
    async with app() as server:
        await server.chat(structured_outputs={"json": SCHEMA, "disable_any_whitespace": True})
        await server.chat(structured_outputs={"json": SCHEMA, "whitespace_pattern": " ?"})
        await server.chat(guided_json=SCHEMA, guided_whitespace_pattern="[ ]{0,2}")
        assert [request.constraint.whitespace for request in server.engine.seen] == ["", " ?", "[ ]{0,2}"]


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"response_format": {"type": "text"}},
        {"response_format": None, "guided_json": None, "grammar": None, "structured_outputs": None},
        {"guided_regex": False, "response_format": {"type": "text"}},
    ],
)
async def test_nothing_asked_is_no_constraint(fields: dict[str, Any]) -> None:
    async with app() as server:
        assert (await server.chat(**fields)).status_code == 200
        assert server.engine.seen[0].constraint is None


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"response_format": "json"}, "response_format"),
        ({"response_format": {}}, "response_format.type"),
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        ({"response_format": {"type": "json_schema", "json_schema": {}}}, "response_format.json_schema.name"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "a b"}}},
            "response_format.json_schema.name",
        ),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "a" * 65}}},
            "response_format.json_schema.name",
        ),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "strict": 1}}},
            "response_format.json_schema.strict",
        ),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": 5}}},
            "response_format.json_schema.schema",
        ),
        ({"response_format": {"type": "regex"}}, "response_format.regex"),
        ({"structured_outputs": []}, "structured_outputs"),
        ({"structured_outputs": {}}, "structured_outputs"),
        ({"structured_outputs": {"regex": "a", "json": {}}}, "structured_outputs"),
        ({"structured_outputs": {"regex": "a", "colour": "red"}}, "structured_outputs"),
        ({"structured_outputs": {"json_object": 1}}, "structured_outputs.json_object"),
        ({"structured_outputs": {"json": {}, "whitespace_pattern": 1}}, "structured_outputs.whitespace_pattern"),
        ({"guided_json": 5}, "guided_json"),
        ({"guided_regex": ["a"]}, "guided_regex"),
        ({"guided_choice": "a"}, "guided_choice"),
        ({"guided_choice": [1]}, "guided_choice"),
        ({"guided_whitespace_pattern": " ?"}, "guided_whitespace_pattern"),
        ({"guided_regex": "a", "guided_whitespace_pattern": " ?"}, "guided_whitespace_pattern"),
        ({"grammar": 5}, "grammar"),
        ({"structural_tag": 5}, "structural_tag"),
        ({"regex": "a", "ebnf": "root ::= [a]"}, "ebnf"),
        ({"response_format": {"type": "json_object"}, "guided_regex": "a"}, "guided_regex"),
    ],
)
@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
async def test_wrong_forms_and_conflicts_are_refused_with_the_field(
    path: str, fields: dict[str, Any], param: str
) -> None:
    base = HELLO if path == CHAT else {"prompt": "ab"}
    async with app() as server:
        assert error_of(await server.post(path, {**base, **fields}))["param"] == param
        assert not server.engine.seen


async def test_an_option_that_cannot_be_honoured_is_refused() -> None:
    async with app() as server:
        response = await server.chat(structured_outputs={"json": SCHEMA, "disable_additional_properties": True})
        assert error_of(response)["code"] == "unsupported_parameter"
        allowed = {"json": SCHEMA, "disable_additional_properties": False}
        assert (await server.chat(structured_outputs=allowed)).status_code == 200


async def test_the_kind_of_constraint_is_counted() -> None:
    async with app() as server:
        assert server.engine.on_constraint is None
        server.context.metrics.grammar.observe("regex", "compiled", 0.01)
        server.context.metrics.grammar.observe("regex", "cached", 0.0)
        server.context.metrics.grammar.observe("json_schema", "invalid_value", 0.0)
        text = await server.metrics()
        assert 'kvasir_grammar_requests_total{kind="regex",model="fake"} 2.0' in text
        assert 'kvasir_grammar_errors_total{model="fake",reason="invalid"} 1.0' in text
        assert 'kvasir_grammar_cache_hits_total{model="fake"} 1.0' in text
        assert 'kvasir_grammar_compile_seconds_count{model="fake"} 1.0' in text
