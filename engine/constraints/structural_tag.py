"""Structural tags: free text in which marked parts, usually tool calls, follow a schema; as one Lark grammar.

Two JSON forms: `{"structures": [{begin, schema, end}], "triggers": [...]}`, and `{"format": {...}}` with nested formats
(const_string, json_schema, regex, grammar, any_text, sequence, or, tag, triggered_tags, tags_with_separator).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

import llguidance

from engine.errors import InvalidParameter

ANY_TEXT = r"/(.|\n)*/"


def structural_tag_grammar(tag: Any, json_options: Mapping[str, Any], special_tokens: Mapping[str, int]) -> str:
    """llguidance's grammar of a structural tag.

    json_options     how JSON inside of tags is written
    special_tokens   text -> id of tokens that cannot be spelled with ordinary ones
    Raises InvalidParameter.
    """
    if not isinstance(tag, dict):
        raise InvalidParameter("a structural tag must be an object")
    writer = _Writer(json_options, special_tokens)
    if "structures" in tag:
        start = writer.expression(_from_structures(tag))
    elif "format" in tag:
        start = writer.expression(tag["format"])
    else:
        raise InvalidParameter("a structural tag needs format, or structures and triggers")
    return writer.grammar(start)


def _from_structures(tag: dict[str, Any]) -> dict[str, Any]:
    structures = _list(tag, "structures")
    return {
        "type": "triggered_tags",
        "triggers": _list(tag, "triggers"),
        "tags": [
            {
                "begin": _text(structure, "begin"),
                "content": {"type": "json_schema", "json_schema": structure.get("schema", {})},
                "end": _text(structure, "end"),
            }
            for structure in map(_object, structures)
        ],
    }


class _Writer:
    """Collects the rules of one Lark grammar."""

    def __init__(self, json_options: Mapping[str, Any], special_tokens: Mapping[str, int]) -> None:
        self._json_options = dict(json_options)
        self._special_tokens = special_tokens
        alternatives = "|".join(re.escape(text) for text in sorted(special_tokens, key=len, reverse=True))
        self._special = re.compile(f"({alternatives})") if alternatives else None
        self._rules: list[str] = []
        self._side_grammars: list[dict[str, str]] = []

    def grammar(self, start: str) -> str:
        text = "\n".join(("%llguidance {}", f"start: {start}", *self._rules)) + "\n"
        return json.dumps({"grammars": [{"name": "structural_tag", "lark_grammar": text}, *self._side_grammars]})

    def expression(self, form: Any) -> str:
        """One nested format as a Lark expression."""
        form = _object(form)
        kind = form.get("type")
        match kind:
            case "const_string":
                return self._literal(_text(form, "value"))
            case "json_schema":
                return self._json(form.get("json_schema"))
            case "regex":
                return self._side_grammar(llguidance.LLMatcher.grammar_from_regex(_text(form, "pattern")))
            case "grammar":
                return self._side_grammar(llguidance.grammar_from("grammar", _text(form, "grammar")))
            case "any_text":
                return self._rule(ANY_TEXT)
            case "sequence":
                return self._group(" ", map(self.expression, _list(form, "elements")))
            case "or":
                return self._group(" | ", map(self.expression, _list(form, "elements")))
            case "tag":
                return self._tag(form)
            case "triggered_tags":
                return self._triggered_tags(form)
            case "tags_with_separator":
                return self._separated_tags(form)
        raise InvalidParameter(
            "a format of the structural tag has a type that is not supported; known are const_string, json_schema, "
            "regex, grammar, any_text, sequence, or, tag, triggered_tags and tags_with_separator"
        )

    def _tag(self, form: dict[str, Any], *, already: str = "") -> str:
        """begin, content, end. `already` is the part of `begin` that has been written."""
        begin, end = _text(form, "begin")[len(already) :], _text(form, "end")
        content = _object(form.get("content"))
        parts = [self._literal(begin)] if begin else []
        if content.get("type") == "any_text" and end:
            parts.append(self._text_until(end))
        else:
            parts.append(self.expression(content))
            parts += [self._literal(end)] if end else []
        return self._group(" ", parts)

    def _triggered_tags(self, form: dict[str, Any]) -> str:
        """Text, and where a trigger appears in it one of its tags; text again after it."""
        triggers, tags = _list(form, "triggers"), [_object(tag) for tag in _list(form, "tags")]
        if not triggers or not tags or not all(isinstance(trigger, str) and trigger for trigger in triggers):
            raise InvalidParameter("triggers and tags of a structural tag must not be empty")
        options = []
        for tag in tags:
            begin = _text(tag, "begin")
            matching = [trigger for trigger in triggers if begin.startswith(trigger)]
            if not matching:
                raise InvalidParameter("the begin of every structural tag must start with one of the triggers")
            trigger = max(matching, key=len)
            options.append((trigger, self._tag(tag, already=trigger)))
        by_trigger = [
            f"({self._text_until(trigger)} {self._group(' | ', [tag for own, tag in options if own == trigger])})"
            for trigger in dict.fromkeys(own for own, _ in options)
        ]
        tagged = self._group(" | ", by_trigger)
        is_needed, is_single = form.get("at_least_one") is True, form.get("stop_after_first") is True
        count = {(False, False): "*", (True, False): "+", (False, True): "?", (True, True): ""}[is_needed, is_single]
        return f"{tagged}{count}" if is_single and is_needed else f"{tagged}{count} {self._rule(ANY_TEXT)}"

    def _separated_tags(self, form: dict[str, Any]) -> str:
        tag = self._group(" | ", [self._tag(_object(tag)) for tag in _list(form, "tags")])
        separator = self._literal(text) if (text := _text(form, "separator")) else ""
        if form.get("stop_after_first") is not True:
            tag = f"({tag} ({separator} {tag})*)"
        return tag if form.get("at_least_one") is True else f"({tag})?"

    def _text_until(self, end: str) -> str:
        """Text up to and with the first `end`."""
        if end in self._special_tokens:
            return f"({self._rule(ANY_TEXT)} {self._literal(end)})"
        return self._rule(f"{ANY_TEXT} {json.dumps(end)}", "[lazy]")

    def _literal(self, text: str) -> str:
        """Exactly this text; the special tokens in it are those tokens."""
        parts = [part for part in (self._special.split(text) if self._special else [text]) if part]
        return self._group(
            " ",
            [
                f"<[{self._special_tokens[part]}]>" if part in self._special_tokens else json.dumps(part)
                for part in parts
            ],
        )

    def _json(self, schema: Any) -> str:
        if not isinstance(schema, dict | bool):
            raise InvalidParameter("json_schema of a structural tag must be an object")
        if schema is True:
            schema = {}
        if schema is False:
            raise InvalidParameter("json_schema false allows nothing")
        return self._rule("%json " + json.dumps({**schema, "x-guidance": self._json_options}))

    def _side_grammar(self, grammar: str) -> str:
        """A grammar of its own, by name."""
        name = f"part_{len(self._side_grammars)}"
        is_json = grammar.startswith("{")  # else it is the text of a Lark grammar
        parts = json.loads(grammar)["grammars"] if is_json else [{"lark_grammar": grammar}]
        self._side_grammars += [{**part, "name": name} for part in parts]
        return f"@{name}"

    def _rule(self, body: str, attribute: str = "") -> str:
        name = f"rule_{len(self._rules)}"
        self._rules.append(f"{name}{attribute}: {body}")
        return name

    def _group(self, separator: str, parts: Iterable[str]) -> str:
        parts = list(parts)
        if not parts:
            raise InvalidParameter("a list in the structural tag must not be empty")
        return parts[0] if len(parts) == 1 else f"({separator.join(parts)})"


def _object(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise InvalidParameter("the parts of a structural tag must be objects")
    return value


def _list(form: dict[str, Any], name: str) -> list[Any]:
    value = form.get(name)
    if not isinstance(value, list):
        raise InvalidParameter(f"{name} of a structural tag must be an array")
    return value


def _text(form: dict[str, Any], name: str) -> str:
    value = form.get(name)
    if not isinstance(value, str):
        raise InvalidParameter(f"{name} of a structural tag must be a string")
    return value
