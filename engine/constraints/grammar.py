"""From a user's constraint to the grammar text that llguidance takes. Raises for what it can tell without compiling.

Grammars are llguidance's own (Lark with extensions, JSON schema, regular expressions over Rust's syntax). GBNF, the
form of llama.cpp and xgrammar, is converted by the library.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

import llguidance
from llguidance import LLMatcher

from engine.constraints.limits import ConstraintLimits, check_choices, check_repeats, check_schema, parse_json
from engine.constraints.structural_tag import structural_tag_grammar
from engine.constraints.vocabulary import Vocabulary
from engine.errors import InvalidParameter
from engine.types import Constraint

# Between two JSON tokens: a space, or a new line with indentation. Not more, or a model may write spaces without end.
WHITESPACE = r"( |\r?\n[ \t]{0,64})"
MAX_REASON_CHARS = 300
PICTURE = re.compile(r"\^|\d* \|")  # how lines of it begin
NUM_PROBED = 3
UNESCAPED_END = re.compile(r"(?<!\\)(?:\\\\)*\$$")


def compile_constraint(constraint: Constraint, vocabulary: Vocabulary, limits: ConstraintLimits) -> str:
    """The grammar of a constraint that has been shown to work. Raises InvalidParameter and SchemaTooComplex."""
    try:
        grammar = to_grammar(constraint, limits, vocabulary.special_tokens)
    except ValueError as error:  # how the library refuses text that it cannot take over
        raise _unusable(str(error)) from None
    matcher = vocabulary.matcher(grammar)
    # The first places of an output show a grammar that nothing can match, or that is too wide to follow.
    for _ in range(NUM_PROBED):
        if matcher.is_error():
            break
        matcher.compute_bitmask()
        matcher.consume_tokens(matcher.compute_ff_tokens())
    if matcher.is_error():
        raise _unusable(matcher.get_error())
    return grammar


def to_grammar(constraint: Constraint, limits: ConstraintLimits, special_tokens: Mapping[str, int]) -> str:
    """The grammar of a constraint.

    special_tokens   text -> id of tokens that cannot be spelled with ordinary ones
    Raises InvalidParameter and SchemaTooComplex.
    """
    value = constraint.value
    match constraint.kind:
        case "json_object":
            return _json_grammar({"type": "object"}, constraint.whitespace)
        case "json_schema":
            schema = parse_json(value, "the schema")
            if not isinstance(schema, dict):
                raise InvalidParameter("the schema must be a JSON object")
            check_schema(schema, limits)
            return _json_grammar(schema, constraint.whitespace)
        case "regex":
            _require(value, "the regular expression")
            check_repeats(value, limits)
            return LLMatcher.grammar_from_regex(without_anchors(value))
        case "choice":
            return _choice_grammar(parse_json(value, "the list of choices"), limits)
        case "grammar":
            _require(value.strip(), "the grammar")
            check_repeats(value, limits)
            return _from_any_syntax(value)
        case "structural_tag":
            tag = parse_json(value, "the structural tag")
            check_schema(tag, limits)
            return structural_tag_grammar(tag, json_options(constraint.whitespace), special_tokens)


def without_anchors(pattern: str) -> str:
    """A constraint always matches the whole output, so ^ at the beginning and $ at the end say nothing new."""
    pattern = pattern.removeprefix("^")
    return pattern[:-1] if UNESCAPED_END.search(pattern) else pattern


def json_options(whitespace: str | None) -> dict[str, Any]:
    """How JSON is written, for llguidance."""
    if whitespace == "":
        return {"whitespace_flexible": False}
    return {"whitespace_flexible": True, "whitespace_pattern": WHITESPACE if whitespace is None else whitespace}


def _json_grammar(schema: dict[str, Any], whitespace: str | None) -> str:
    return LLMatcher.grammar_from_json_schema(schema, overrides=json_options(whitespace))  # type: ignore[arg-type]


def _choice_grammar(choices: Any, limits: ConstraintLimits) -> str:
    if not isinstance(choices, list) or not choices or not all(isinstance(choice, str) for choice in choices):
        raise InvalidParameter("choices must be an array of at least one string")
    check_choices(choices, limits, "the list of choices")
    if not all(choices):
        raise InvalidParameter("a choice must not be empty")
    return LLMatcher.grammar_from_lark("start: " + " | ".join(json.dumps(choice) for choice in choices))


def _from_any_syntax(text: str) -> str:
    try:
        return llguidance.grammar_from("grammar", text)
    except Exception as error:  # the converter raises plain exceptions for what it cannot read
        raise InvalidParameter(f"the grammar can be read neither as Lark nor as GBNF: {error}") from None


def _unusable(message: str) -> InvalidParameter:
    """With what the library says, but without its picture of the grammar."""
    lines = [line.strip() for line in message.replace("<non-verbose/>", "").splitlines()]
    text = " ".join(line for line in lines if line and not PICTURE.match(line)).rpartition("error: ")[2]
    printable = "".join(char if char.isprintable() else " " for char in text)
    if len(printable) > MAX_REASON_CHARS:
        printable = printable[:MAX_REASON_CHARS] + "..."
    return InvalidParameter(f"the constraint cannot be used: {printable}")


def _require(text: str, what: str) -> None:
    if not text:
        raise InvalidParameter(f"{what} must not be empty")
