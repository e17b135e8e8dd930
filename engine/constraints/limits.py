"""How large a constraint may be: bounds that hold before anything is compiled. Pure functions over text and JSON."""

from __future__ import annotations

import json
import re
from typing import Any

import msgspec

from engine.config import Limits
from engine.errors import InvalidParameter, SchemaTooComplex
from engine.types import Constraint

REPEAT = re.compile(r"\{\s*(\d*)\s*(?:,\s*(\d*)\s*)?\}")
REPEAT_DIGITS = 9  # longer numbers are too large without being read
CHOICE_NAMES = ("enum", "anyOf", "oneOf", "allOf")


class ConstraintLimits(msgspec.Struct, frozen=True):
    """The part of `engine.config.Limits` that crosses to the child process."""

    max_bytes: int
    max_depth: int
    max_nodes: int
    max_choices: int
    max_choice_bytes: int
    max_choices_bytes: int
    max_repeat: int

    @classmethod
    def of(cls, limits: Limits) -> ConstraintLimits:
        return cls(
            max_bytes=limits.max_constraint_bytes,
            max_depth=limits.max_schema_depth,
            max_nodes=limits.max_schema_nodes,
            max_choices=limits.max_schema_choices,
            max_choice_bytes=limits.max_choice_bytes,
            max_choices_bytes=limits.max_choices_bytes,
            max_repeat=limits.max_repeat,
        )


def check_size(constraint: Constraint, limits: ConstraintLimits) -> None:
    """Raises SchemaTooComplex. Cheap, whatever the text is."""
    num_bytes = len(constraint.value.encode("utf-8", "surrogatepass"))
    if num_bytes > limits.max_bytes:
        raise SchemaTooComplex(
            f"the constraint has {num_bytes} bytes; at most {limits.max_bytes} are allowed", param=constraint.param
        )


def parse_json(text: str, what: str) -> Any:
    """Raises InvalidParameter, also for nesting that the parser cannot follow."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise InvalidParameter(f"{what} is not valid JSON, or is nested too deeply") from None


def check_schema(schema: Any, limits: ConstraintLimits) -> None:
    """Raises SchemaTooComplex for a schema, or any JSON that holds schemas, beyond the limits."""
    num_nodes = 0
    pending = [(schema, 1)]
    while pending:
        node, depth = pending.pop()
        num_nodes += 1
        if depth > limits.max_depth and isinstance(node, dict | list):
            raise SchemaTooComplex(f"the schema is nested deeper than {limits.max_depth} levels; flatten it")
        if num_nodes > limits.max_nodes:
            raise SchemaTooComplex(f"the schema has more than {limits.max_nodes} nodes; split it")
        if isinstance(node, dict):
            for name in CHOICE_NAMES:
                check_choices(node.get(name), limits, name)
            if isinstance(pattern := node.get("pattern"), str):
                check_repeats(pattern, limits)
            pending += [(child, depth + 1) for child in node.values()]
        elif isinstance(node, list):
            # the members of a list of names are not places where a schema branches
            pending += [(child, depth + 1) for child in node if isinstance(child, dict | list)]


def check_choices(choices: Any, limits: ConstraintLimits, what: str) -> None:
    """Raises SchemaTooComplex for lists of alternatives that are too long or have too long members."""
    if not isinstance(choices, list):
        return
    if len(choices) > limits.max_choices:
        raise SchemaTooComplex(f"{what} has {len(choices)} entries; at most {limits.max_choices} are allowed")
    sizes = [len(choice.encode("utf-8", "surrogatepass")) for choice in choices if isinstance(choice, str)]
    if max(sizes, default=0) > limits.max_choice_bytes:
        raise SchemaTooComplex(f"an entry of {what} has more than {limits.max_choice_bytes} bytes")
    if sum(sizes) > limits.max_choices_bytes:
        raise SchemaTooComplex(f"the entries of {what} have more than {limits.max_choices_bytes} bytes in all")


def check_repeats(pattern: str, limits: ConstraintLimits) -> None:
    """Raises SchemaTooComplex for a counted repeat above the bound, in a pattern or a grammar."""
    for numbers in REPEAT.findall(pattern):
        for number in filter(None, numbers):
            if len(number) > REPEAT_DIGITS or int(number) > limits.max_repeat:
                raise SchemaTooComplex(f"a repeat count is above {limits.max_repeat}; use * or + with a shorter bound")
