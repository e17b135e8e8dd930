"""The fields that constrain an output, of OpenAI, vLLM, SGLang, llama.cpp and TGI, as one `Constraint`.

Which fields there are, which exclude each other, and their forms; whether a schema or grammar works is the engine's to
say. Nothing is dropped: what cannot be honoured is refused.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from typing import Any

from engine.errors import InvalidParameter, UnsupportedParameter
from engine.types import Constraint, ConstraintKind
from server.fields import Body, Text

SCHEMA_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")


class ConstraintFields(Body):
    """Looked at by `constraint_of`, which words the errors; at most one of them may ask for something."""

    response_format: Any = None
    structured_outputs: Any = None
    guided_json: Any = None
    guided_regex: Any = None
    guided_choice: Any = None
    guided_grammar: Any = None
    guided_whitespace_pattern: Text | None = None
    json_schema: Any = None
    regex: Any = None
    ebnf: Any = None
    grammar: Any = None
    structural_tag: Any = None


CONSTRAINT_FIELDS = frozenset(ConstraintFields.model_fields)


def constraint_of(fields: ConstraintFields) -> Constraint | None:
    """What the output must look like, or None. Raises InvalidParameter and UnsupportedParameter."""
    found: list[Constraint] = []
    for name, read in _READERS.items():
        value = getattr(fields, name)
        if value is not None and value is not False and (constraint := read(value, name)) is not None:
            found.append(constraint)
    if len(found) > 1:
        raise InvalidParameter(
            f"{found[0].param} and {found[1].param} both constrain the output; give one of them", param=found[1].param
        )
    whitespace = fields.guided_whitespace_pattern
    if whitespace is None:
        return found[0] if found else None
    if not found or found[0].kind not in ("json_object", "json_schema"):
        raise InvalidParameter("guided_whitespace_pattern needs guided_json", param="guided_whitespace_pattern")
    return Constraint(found[0].kind, found[0].value, whitespace, found[0].param)


def _response_format(value: Any, param: str) -> Constraint | None:
    form = _object(value, param)
    kind = form.get("type")
    match kind:
        case "text":
            return None
        case "json_object":
            schema = form.get("schema")  # llama.cpp's addition
            return Constraint("json_object", param=param) if schema is None else _schema(schema, f"{param}.schema")
        case "json_schema":
            return _named_schema(form, param)
        case "structural_tag":
            return Constraint("structural_tag", _json(form, param), param=param)
        case "json":  # TGI
            return _schema(form.get("value"), f"{param}.value")
        case "regex" | "grammar" | "choice" | "regex_schema" | "ebnf":
            key = next((key for key in _keys_of(kind) if form.get(key) is not None), kind)
            read = _choice if kind == "choice" else _text("grammar" if kind in ("grammar", "ebnf") else "regex")
            return read(form.get(key), f"{param}.{key}")
    raise InvalidParameter(
        f"{param}.type must be one of text, json_object, json_schema, structural_tag, regex, grammar and choice",
        param=f"{param}.type",
    )


def _keys_of(kind: str) -> tuple[str, ...]:
    """Where a response format of this type has its value."""
    return {"regex": ("regex", "pattern", "value"), "choice": ("choice", "choices")}.get(kind, (kind, "value"))


def _named_schema(form: Mapping[str, Any], param: str) -> Constraint:
    if form.get("json_schema") is None and form.get("schema") is not None:  # llama.cpp
        return _schema(form["schema"], f"{param}.schema")
    param = f"{param}.json_schema"
    named = _object(form.get("json_schema"), param)
    name = named.get("name")
    if name is None:
        raise InvalidParameter(f"{param}.name is required", param=f"{param}.name", code="missing_required_parameter")
    if not isinstance(name, str) or not SCHEMA_NAME.fullmatch(name):
        raise InvalidParameter(f"{param}.name must be 1 to 64 characters of A-Z a-z 0-9 _ -", param=f"{param}.name")
    for key, kind, expected in (("strict", bool, "true or false"), ("description", str, "a string")):
        if named.get(key) is not None and not isinstance(named[key], kind):
            raise InvalidParameter(f"{param}.{key} must be {expected}", param=f"{param}.{key}", code="invalid_type")
    if named.get("schema") is None:
        return Constraint("json_object", param=param)
    return _schema(named["schema"], f"{param}.schema")


def _structured_outputs(value: Any, param: str) -> Constraint | None:
    """vLLM's object: exactly one constraint, and options."""
    form = {name: item for name, item in _object(value, param).items() if item is not None and item is not False}
    if "disable_additional_properties" in form:
        raise UnsupportedParameter(
            f"{param}.disable_additional_properties is not supported; put additionalProperties: false into the schema",
            param=f"{param}.disable_additional_properties",
        )
    given = [name for name in _PARTS if name in form]
    unknown = sorted(set(form) - {*_PARTS, *_OPTIONS})
    if unknown:
        raise InvalidParameter(f"{param} can hold {', '.join((*_PARTS, *_OPTIONS))}", param=param)
    if len(given) != 1:
        raise InvalidParameter(f"{param} must hold exactly one of {', '.join(_PARTS)}", param=param)
    constraint = _PARTS[given[0]](form[given[0]], f"{param}.{given[0]}")
    whitespace = form.get("whitespace_pattern")
    if whitespace is not None and not isinstance(whitespace, str):
        raise InvalidParameter(f"{param}.whitespace_pattern must be a string", param=f"{param}.whitespace_pattern")
    if form.get("disable_any_whitespace") is True:
        whitespace = ""
    return Constraint(constraint.kind, constraint.value, whitespace, constraint.param)


def _schema(value: Any, param: str) -> Constraint:
    """A schema as an object or as JSON text."""
    if not isinstance(value, str | dict):
        raise InvalidParameter(f"{param} must be a JSON schema", param=param, code="invalid_type")
    return Constraint("json_schema", value if isinstance(value, str) else _json(value, param), param=param)


def _json_object(value: Any, param: str) -> Constraint:
    if value is not True:
        raise InvalidParameter(f"{param} must be true or false", param=param, code="invalid_type")
    return Constraint("json_object", param=param)


def _choice(value: Any, param: str) -> Constraint:
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise InvalidParameter(f"{param} must be an array of strings", param=param, code="invalid_type")
    return Constraint("choice", _json(value, param), param=param)


def _structural_tag(value: Any, param: str) -> Constraint:
    """An object or its JSON text."""
    text = value if isinstance(value, str) else _json(_object(value, param), param)
    return Constraint("structural_tag", text, param=param)


def _text(kind: ConstraintKind) -> Callable[[Any, str], Constraint]:
    def read(value: Any, param: str) -> Constraint:
        if not isinstance(value, str):
            raise InvalidParameter(f"{param} must be a string", param=param, code="invalid_type")
        return Constraint(kind, value, param=param)

    return read


def _grammar(value: Any, param: str) -> Constraint | None:
    """llama.cpp's grammar is a text, TGI's an object with a type."""
    return _text("grammar")(value, param) if isinstance(value, str) else _response_format(value, param)


def _object(value: Any, param: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise InvalidParameter(f"{param} must be an object", param=param, code="invalid_type")
    return value


def _json(value: Any, param: str) -> str:
    try:
        return json.dumps(value, ensure_ascii=False)
    except (ValueError, RecursionError):
        raise InvalidParameter(f"{param} cannot be written as JSON", param=param) from None


_PARTS: dict[str, Callable[[Any, str], Constraint]] = {
    "json": _schema,
    "regex": _text("regex"),
    "choice": _choice,
    "grammar": _text("grammar"),
    "json_object": _json_object,
    "structural_tag": _structural_tag,
}
_OPTIONS = ("whitespace_pattern", "disable_any_whitespace")
_READERS: dict[str, Callable[[Any, str], Constraint | None]] = {
    "response_format": _response_format,
    "structured_outputs": _structured_outputs,
    "guided_json": _schema,
    "guided_regex": _text("regex"),
    "guided_choice": _choice,
    "guided_grammar": _text("grammar"),
    "json_schema": _schema,
    "regex": _text("regex"),
    "ebnf": _text("grammar"),
    "grammar": _grammar,
    "structural_tag": _structural_tag,
}
