"""Tools in request bodies: their shape, and what the request says about calling them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field

from engine.errors import InvalidParameter
from server.fields import Body, Flag, Text, at_most, wrong_type, wrong_value

FUNCTION_NAME = re.compile(r"[A-Za-z0-9_.-]{1,128}")
CHOICES = ("none", "auto", "required")


def _check_name(name: str) -> str:
    if not FUNCTION_NAME.fullmatch(name):
        raise wrong_value("must be 1 to 128 characters of A-Z a-z 0-9 _ . -")
    return name


def _check_parameters(value: Any) -> Any:
    """A schema whose values are objects. What is inside is checked where it constrains the output."""
    if not isinstance(value, dict):
        raise wrong_type("an object: the JSON schema of the arguments")
    if value.get("type", "object") != "object":
        raise wrong_value('must have the type "object": arguments have names')
    if not isinstance(value.get("properties", {}), dict):
        raise wrong_value("must have an object as properties")
    return value


def _check_type(value: Any) -> Any:
    if value != "function":
        raise wrong_value('must be "function": this server runs no tools of its own')
    return value


Kind = Annotated[str, BeforeValidator(_check_type)]


class FunctionTool(Body):
    """Further keys stay: the chat template writes the tool as it was sent."""

    model_config = ConfigDict(extra="allow", frozen=True, protected_namespaces=())

    name: Annotated[Text, AfterValidator(_check_name)]
    description: Text | None = None
    parameters: Annotated[dict[str, Any], BeforeValidator(_check_parameters)] | None = None
    strict: Flag | None = None


class Tool(Body):
    model_config = ConfigDict(extra="allow", frozen=True, protected_namespaces=())

    type: Kind
    function: FunctionTool

    def for_template(self) -> dict[str, Any]:
        return self.model_dump(exclude_unset=True)


Tools = Annotated[list[Tool], Field(fail_fast=True), at_most("max_tools", low=1)]


@dataclass(frozen=True)
class ToolChoice:
    """Which functions may be called, and whether one must be."""

    mode: Literal["none", "auto", "required"]
    names: tuple[str, ...] | None = None  # None: all
    is_named: bool = False  # exactly one function was asked for


def _choice(value: Any) -> ToolChoice:
    """The forms of tool_choice: a word, a function, a list of allowed functions."""
    if isinstance(value, ToolChoice):
        return value
    if isinstance(value, str):
        if value not in CHOICES:
            raise wrong_value(f"must be one of {', '.join(CHOICES)}, or an object that names a function")
        return ToolChoice(value)  # type: ignore[arg-type]
    if not isinstance(value, dict):
        raise wrong_type("a string or an object")
    if value.get("type") == "function":
        return ToolChoice("required", (_function_name(value),), is_named=True)
    if value.get("type") == "allowed_tools":
        allowed = value.get("allowed_tools", value)
        mode = allowed.get("mode") if isinstance(allowed, dict) else None
        tools = allowed.get("tools") if isinstance(allowed, dict) else None
        if mode not in ("auto", "required") or not isinstance(tools, list) or not tools:
            raise wrong_value('must have a mode ("auto" or "required") and tools, an array of at least one function')
        return ToolChoice(mode, tuple(_function_name(tool) for tool in tools))
    raise wrong_value('must have the type "function" or "allowed_tools"')


def _function_name(value: Any) -> str:
    function = value.get("function") if isinstance(value, dict) else None
    name = function.get("name") if isinstance(function, dict) else None
    if not isinstance(name, str):
        raise wrong_value('must name functions as {"type": "function", "function": {"name": "..."}}')
    return name


Choice = Annotated[Any, BeforeValidator(_choice)]


def chosen(tools: list[Tool] | None, choice: ToolChoice | None) -> tuple[list[Tool], ToolChoice]:
    """The tools that may be called. Raises InvalidParameter when the two fields contradict each other."""
    if not tools:
        if choice is not None and choice.mode != "none":
            raise InvalidParameter("tool_choice needs tools; give at least one, or leave it out", param="tool_choice")
        return [], ToolChoice("none")
    names = [tool.function.name for tool in tools]
    for index, name in enumerate(names):
        if name in names[:index]:
            param = f"tools.{index}.function.name"
            raise InvalidParameter(f"{param} appears twice; names of functions must differ", param=param)
    choice = choice or ToolChoice("auto")
    if choice.mode == "none":
        return [], choice
    if choice.names is None:
        return tools, choice
    if not set(choice.names) <= set(names):
        raise InvalidParameter("tool_choice names a function that is not among tools", param="tool_choice")
    return [tool for tool in tools if tool.function.name in choice.names], choice
