"""Bodies of the Messages routes. Sampling fields are those of chat and are checked there."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Discriminator, Field, Tag

from engine.errors import InvalidParameter
from server.fields import (
    INT32_MAX,
    Body,
    Flag,
    Integer,
    Text,
    at_most,
    between,
    one_of,
    wrong_value,
)

MIN_THINKING_TOKENS = 1024
# Fields that would change the answer and are not done here, and chat's names for what has another name here.
REFUSED: dict[str, str] = {
    "mcp_servers": "are not called by this server; leave it out",
    "container": "is not offered by this server; leave it out",
    "context_management": "is not done here; leave it out",
    "stop": "is called stop_sequences here",
    "max_completion_tokens": "is called max_tokens here",
    "response_format": "is called output_config.format here",
    "reasoning_effort": "is called output_config.effort here",
    "thinking_token_budget": "is called thinking.budget_tokens here",
    "parallel_tool_calls": "is called tool_choice.disable_parallel_tool_use here",
    "functions": "is called tools here",
    "logprobs": "is not possible here; use /v1/chat/completions",
    "top_logprobs": "is not possible here; use /v1/chat/completions",
    "prompt_logprobs": "is not possible here; use /v1/chat/completions",
    "return_token_ids": "is not possible here; use /v1/chat/completions",
    "echo": "is not possible here; use /v1/chat/completions",
    "stream_options": "is not possible here: streams always tell the usage; leave it out",
    "continue_final_message": "is not needed here: a last assistant message is gone on from; leave it out",
    "add_generation_prompt": "is not needed here: a last assistant message is gone on from; leave it out",
    "n": "is always 1 here; leave it out",
}


class TextBlock(Body):
    type: Literal["text"]
    text: Text


class ThinkingBlock(Body):
    type: Literal["thinking"]
    thinking: Text
    signature: Text = ""  # not checked


class RedactedThinkingBlock(Body):
    """Thinking that only its writer can read; this server cannot."""

    type: Literal["redacted_thinking"]


class ToolUseBlock(Body):
    type: Literal["tool_use"]
    id: Text
    name: Text
    input: dict[str, Any]


def _document_type(value: Any) -> Any:
    if value not in ("text", "content"):
        raise wrong_value('must be "text" or "content": this server reads no files')
    return value


class DocumentSource(Body):
    type: Annotated[str, BeforeValidator(_document_type)]
    data: Text | None = None
    content: Text | Annotated[list[TextBlock], Field(fail_fast=True), at_most("max_content_parts")] | None = None


class DocumentBlock(Body):
    type: Literal["document"]
    source: DocumentSource
    title: Text | None = None
    context: Text | None = None


def _kind(value: Any) -> str | None:
    kind = value.get("type") if isinstance(value, dict) else None
    return f"#{kind}" if isinstance(kind, str) else None


def _text_or_list(value: Any) -> str | None:
    if isinstance(value, str):
        return "#string"
    return "#blocks" if isinstance(value, list) else None


def _either(problem: str) -> Discriminator:
    return Discriminator(_text_or_list, custom_error_type="invalid_type", custom_error_message=problem)


ResultBlock = Annotated[
    Annotated[TextBlock, Tag("#text")] | Annotated[DocumentBlock, Tag("#document")],
    Discriminator(
        _kind,
        custom_error_type="invalid_value",
        custom_error_message="must be a block of type text or document: this model reads text only",
    ),
]
ResultContent = Annotated[
    Annotated[Text, Tag("#string")]
    | Annotated[list[ResultBlock], Field(fail_fast=True), at_most("max_content_parts"), Tag("#blocks")],
    _either("must be a string or an array of blocks"),
]


class ToolResultBlock(Body):
    type: Literal["tool_result"]
    tool_use_id: Text
    content: ResultContent = ""
    is_error: Flag = False


Block = Annotated[
    Annotated[TextBlock, Tag("#text")]
    | Annotated[ThinkingBlock, Tag("#thinking")]
    | Annotated[RedactedThinkingBlock, Tag("#redacted_thinking")]
    | Annotated[ToolUseBlock, Tag("#tool_use")]
    | Annotated[ToolResultBlock, Tag("#tool_result")]
    | Annotated[DocumentBlock, Tag("#document")],
    Discriminator(
        _kind,
        custom_error_type="invalid_value",
        custom_error_message=(
            "must be a block of type text, thinking, redacted_thinking, tool_use, tool_result or document: this model "
            "reads text only"
        ),
    ),
]
Content = Annotated[
    Annotated[Text, Tag("#string")]
    | Annotated[list[Block], Field(fail_fast=True), at_most("max_content_parts"), Tag("#blocks")],
    _either("must be a string or an array of blocks"),
]
System = Annotated[
    Annotated[Text, Tag("#string")]
    | Annotated[list[TextBlock], Field(fail_fast=True), at_most("max_content_parts"), Tag("#blocks")],
    _either("must be a string or an array of text blocks"),
]


class Message(Body):
    role: Annotated[str, one_of("user", "assistant", "system")]
    content: Content


def _tool_type(value: Any) -> Any:
    if value != "custom":
        raise wrong_value('must be "custom": this server has no built-in tools')
    return value


class Tool(Body):
    """A function. Its name and schema are checked where chat's are."""

    type: Annotated[str, BeforeValidator(_tool_type)] = "custom"
    name: Text
    description: Text | None = None
    input_schema: dict[str, Any]
    strict: Flag | None = None


class ToolChoice(Body):
    type: Annotated[str, one_of("auto", "any", "tool", "none")]
    name: Text | None = None
    disable_parallel_tool_use: Flag = False


class Thinking(Body):
    type: Annotated[str, one_of("enabled", "disabled", "adaptive")]
    budget_tokens: Annotated[Integer, between(MIN_THINKING_TOKENS, INT32_MAX)] | None = None
    display: Annotated[str, one_of("summarized", "omitted")] | None = None


class OutputFormat(Body):
    type: Annotated[str, one_of("json_schema")]
    json_schema: dict[str, Any] = Field(alias="schema")


class OutputConfig(Body):
    effort: Annotated[str, one_of("low", "medium", "high", "xhigh", "max")] | None = None
    format: OutputFormat | None = None


class CountTokensRequest(Body):
    """What the model reads, worded differently from chat. Everything else in the body goes to chat's schema."""

    model: Text | None = None
    messages: Annotated[list[Message], Field(fail_fast=True), at_most("max_messages", low=1)]
    system: System = ""
    tools: Annotated[list[Tool], Field(fail_fast=True), at_most("max_tools")] = Field(default_factory=list)
    tool_choice: ToolChoice | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None

    def check(self) -> None:
        """Rules between fields. Raises InvalidParameter."""
        choice = self.tool_choice
        if choice is not None and choice.type in ("any", "tool") and not self.tools:
            raise InvalidParameter("tool_choice needs tools", param="tool_choice")
        if choice is not None and choice.type == "tool" and choice.name not in {tool.name for tool in self.tools}:
            raise InvalidParameter("tool_choice.name must be the name of one of the tools", param="tool_choice.name")
        if self.thinking is not None and self.thinking.type == "enabled" and self.thinking.budget_tokens is None:
            raise InvalidParameter(
                "thinking.budget_tokens is required when thinking is enabled",
                param="thinking.budget_tokens",
                code="missing_required_parameter",
            )


class MessagesRequest(CountTokensRequest):
    max_tokens: Annotated[Integer, between(1, INT32_MAX)]
    stop_sequences: list[Text] | None = None
    stream: Flag = False
    # accepted because clients send them; they change nothing
    metadata: dict[str, Any] | None = None
    service_tier: Text | None = None
    cache_control: dict[str, Any] | None = None
    inference_geo: Text | None = None
    speed: Text | None = None

    def check(self) -> None:
        super().check()
        budget = None if self.thinking is None else self.thinking.budget_tokens
        if budget is not None and budget >= self.max_tokens:
            raise InvalidParameter(
                f"thinking.budget_tokens must be below max_tokens, which is {self.max_tokens}",
                param="thinking.budget_tokens",
            )
