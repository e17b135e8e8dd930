"""Body of POST /v1/responses: fields, input items, tools. Sampling fields are those of chat and are checked there."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BeforeValidator, Field, ValidationInfo

from engine.errors import InvalidParameter
from server.fields import (
    INT32_MAX,
    Body,
    Flag,
    Integer,
    ShortText,
    Text,
    at_most,
    between,
    limit_of,
    one_of,
    wrong_type,
    wrong_value,
)
from server.responses.input import Input
from server.schemas import EFFORTS

MAX_METADATA_KEY_CHARS = 64
MAX_METADATA_VALUE_CHARS = 512
LOGPROBS = "message.output_text.logprobs"
# the others ask for details of built-in tools, which never run here: there is nothing to leave out
INCLUDABLE = (
    LOGPROBS,
    "reasoning.encrypted_content",
    "file_search_call.results",
    "web_search_call.results",
    "web_search_call.action.sources",
    "message.input_image.image_url",
    "computer_call_output.output.image_url",
    "code_interpreter_call.outputs",
)
# Fields that would change the answer and are not done here, and chat's names for what has another name here.
REFUSED: dict[str, str] = {
    "conversation": "is not kept here; chain answers with previous_response_id",
    "prompt": "templates are not stored here; send instructions and input",
    "context_management": "is not done here; leave it out",
    "moderation": "is not done here; leave it out",
    "messages": "is called input here",
    "max_tokens": "is called max_output_tokens here",
    "max_completion_tokens": "is called max_output_tokens here",
    "response_format": "is called text.format here",
    "reasoning_effort": "is called reasoning.effort here",
    "verbosity": "is called text.verbosity here",
    "logprobs": f'is asked for with include: ["{LOGPROBS}"] here',
    "functions": "is called tools here",
    "continue_final_message": "is not possible here; use /v1/chat/completions",
    "add_generation_prompt": "is not possible here; use /v1/chat/completions",
    "echo": "is not possible here; use /v1/chat/completions",
    "prompt_logprobs": "is not possible here; use /v1/chat/completions",
    "return_token_ids": "is not possible here; use /v1/chat/completions",
    "n": "is always 1 here; leave it out",
}


def _tool_type(value: Any) -> Any:
    if value != "function":
        raise wrong_value('must be "function": this server has no built-in tools')
    return value


class FunctionTool(Body):
    """A function, flat. Its name and parameters are checked where chat's are."""

    type: Annotated[str, BeforeValidator(_tool_type)]
    name: Text
    description: Text | None = None
    parameters: dict[str, Any] | None = None
    strict: Flag | None = None


class TextFormat(Body):
    type: Annotated[str, one_of("text", "json_object", "json_schema")]
    name: Text | None = None
    description: Text | None = None
    json_schema: dict[str, Any] | None = Field(default=None, alias="schema")
    strict: Flag | None = None


class TextOptions(Body):
    format: TextFormat | None = None
    verbosity: Annotated[str, one_of("low", "medium", "high")] | None = None


class Reasoning(Body):
    effort: Annotated[str, one_of(*EFFORTS)] | None = None
    summary: Annotated[str, one_of("auto", "concise", "detailed")] | None = None
    generate_summary: Annotated[str, one_of("auto", "concise", "detailed")] | None = None


class StreamOptions(Body):
    include_obfuscation: Flag = False  # accepted, has no meaning here


def _metadata(value: Any, info: ValidationInfo) -> dict[str, str]:
    limit = limit_of(info, "max_metadata")
    if not isinstance(value, dict):
        raise wrong_type("an object")
    if len(value) > limit:
        raise wrong_value(f"must have at most {limit} entries")
    for key, text in value.items():
        if not isinstance(text, str):
            raise wrong_type("an object from strings to strings")
        if len(key) > MAX_METADATA_KEY_CHARS or len(text) > MAX_METADATA_VALUE_CHARS:
            raise wrong_value(
                f"must have keys of at most {MAX_METADATA_KEY_CHARS} and values of at most "
                f"{MAX_METADATA_VALUE_CHARS} characters"
            )
    return value


def _tool_choice(value: Any) -> Any:
    """none, auto, required, {"type": "function", "name"} or {"type": "allowed_tools", "mode", "tools"}."""
    if isinstance(value, str):
        if value not in ("none", "auto", "required"):
            raise wrong_value("must be none, auto, required or an object that names a function")
        return value
    if not isinstance(value, dict):
        raise wrong_type("a string or an object")
    kind = value.get("type")
    if kind == "function" and isinstance(value.get("name"), str):
        return {"type": "function", "name": value["name"]}
    if kind == "allowed_tools" and value.get("mode") in ("auto", "required") and isinstance(value.get("tools"), list):
        if not all(
            isinstance(tool, dict) and tool.get("type") == "function" and isinstance(tool.get("name"), str)
            for tool in value["tools"]
        ):
            raise wrong_value('must list tools as {"type": "function", "name": ...}')
        return value
    raise wrong_value('must be {"type": "function", "name"} or {"type": "allowed_tools", "mode", "tools"}')


class ResponsesRequest(Body):
    """What is worded differently from chat. Everything else in the body goes to chat's schema as it is."""

    model: Text | None = None
    input: Input
    instructions: Text | None = None
    previous_response_id: ShortText | None = None
    max_output_tokens: Annotated[Integer, between(1, INT32_MAX)] | None = None
    tools: Annotated[list[FunctionTool], Field(fail_fast=True), at_most("max_tools")] = Field(default_factory=list)
    tool_choice: Annotated[Any, BeforeValidator(_tool_choice)] = None
    text: TextOptions = Field(default_factory=TextOptions)
    reasoning: Reasoning | None = None
    include: Annotated[list[Annotated[str, one_of(*INCLUDABLE)]], at_most("max_metadata")] = Field(default_factory=list)
    top_logprobs: Annotated[Integer, between(0, "max_top_logprobs")] | None = None
    truncation: Annotated[str, one_of("auto", "disabled")] = "disabled"
    metadata: Annotated[dict[str, str], BeforeValidator(_metadata)] = Field(default_factory=dict)
    store: Flag | None = None
    background: Flag = False
    stream: Flag = False
    stream_options: StreamOptions | None = None
    service_tier: Text | None = None
    user: ShortText | None = None
    safety_identifier: ShortText | None = None
    prompt_cache_key: ShortText | None = None
    max_tool_calls: Annotated[Integer, between(0, INT32_MAX)] | None = None  # of built-in tools, which there are not
    prompt_cache_retention: Text | None = None  # accepted because clients send it; it changes nothing

    @property
    def has_logprobs(self) -> bool:
        return LOGPROBS in self.include or bool(self.top_logprobs)

    @property
    def effort(self) -> str | None:
        return None if self.reasoning is None else self.reasoning.effort

    def check(self) -> None:
        """Rules between fields. Raises InvalidParameter."""
        if self.stream_options is not None and not self.stream:
            raise InvalidParameter("stream_options needs stream: true", param="stream_options")
        if self.background and self.store is False:
            raise InvalidParameter("background needs store: true, else nobody could fetch the answer", param="store")
        if not self.tools and self.tool_choice not in (None, "none", "auto"):
            raise InvalidParameter("tool_choice needs tools", param="tool_choice")
        names = {tool.name for tool in self.tools}
        if isinstance(self.tool_choice, dict):
            named = [self.tool_choice] if "name" in self.tool_choice else self.tool_choice["tools"]
            if not named or any(tool["name"] not in names for tool in named):
                raise InvalidParameter("tool_choice names a function that is not in tools", param="tool_choice")
        shape = self.text.format
        if shape is not None and shape.type == "json_schema" and (shape.name is None or shape.json_schema is None):
            missing = "name" if shape.name is None else "schema"
            raise InvalidParameter(
                f"text.format.{missing} is required for json_schema",
                param=f"text.format.{missing}",
                code="missing_required_parameter",
            )
