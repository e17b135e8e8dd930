"""What the tools of a chat request mean for its prompt, its output and how the output is read."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from engine.errors import InvalidParameter, UnsupportedParameter
from engine.types import Constraint
from server.engine_api import OutputFormat
from server.schemas import ChatRequest
from server.tool_schemas import Tool, ToolChoice, chosen

NO_CALLS = ToolChoice("none")


@dataclass(frozen=True)
class CallPlan:
    """The functions that may be called, and what follows from that."""

    tools: tuple[dict[str, Any], ...] = ()  # as the template gets them
    choice: ToolChoice = NO_CALLS
    constraint: Constraint | None = None
    parser: str = ""  # in place of the model's own, see OutputParsing


def plan_calls(fields: ChatRequest, output_format: OutputFormat, answer: Constraint | None) -> CallPlan:
    """
    answer   what the request wants an answer without calls to look like
    Raises InvalidParameter for contradictions, UnsupportedParameter for a model that cannot call.
    """
    tools, choice = chosen(fields.tools, fields.tool_choice)
    if not tools:
        return CallPlan(constraint=answer)
    if output_format.tool_parser == "none":
        raise UnsupportedParameter(
            "this model has no format of tool calls that is known here; leave tools out, or start the server with "
            "--tool-call-parser NAME",
            param="tools",
        )
    shown = tuple(tool.for_template() for tool in tools)
    must_call = choice.mode == "required"
    if must_call and answer is not None:
        raise InvalidParameter(
            f"tool_choice makes a call of the output and {answer.param} something else; leave one out",
            param=answer.param,
        )
    if not must_call and answer is None and not _is_strict(tools):
        return CallPlan(shown, choice)
    constraint, parser = output_format.call_constraint(
        shown,
        must_call=must_call,
        is_parallel=fields.parallel_tool_calls and not choice.is_named,
        answer=None if answer is None else _as_form(answer),
    )
    return CallPlan(shown, choice, constraint, parser)


def _is_strict(tools: list[Tool]) -> bool:
    return any(tool.function.strict for tool in tools)


def _as_form(answer: Constraint) -> dict[str, Any]:
    """A constraint as a format of a structural tag, so that calls can stand beside it."""
    match answer.kind:
        case "json_object":
            return {"type": "json_schema", "json_schema": {"type": "object"}}
        case "json_schema":
            return {"type": "json_schema", "json_schema": _parsed(answer)}
        case "regex":
            return {"type": "regex", "pattern": answer.value}
        case "grammar":
            return {"type": "grammar", "grammar": answer.value}
        case "choice":
            choices = [{"type": "const_string", "value": choice} for choice in _parsed(answer)]
            return {"type": "or", "elements": choices}
    raise InvalidParameter(f"{answer.param} cannot be combined with tools; leave one out", param=answer.param)


def _parsed(answer: Constraint) -> Any:
    try:
        return json.loads(answer.value)
    except (ValueError, RecursionError):
        raise InvalidParameter(f"{answer.param} is not valid JSON", param=answer.param) from None
