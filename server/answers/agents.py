"""Answers of the Responses and Messages APIs."""

from __future__ import annotations

from typing import Literal

from msgspec import UNSET, Struct, UnsetType

from server.answers.generation import ChosenTokenLogprob, CompletionTokensDetails, Object, PromptTokensDetails

# ---- responses


class OutputText(Struct, tag_field="type", tag="output_text"):
    text: str
    annotations: list[Object]
    logprobs: list[ChosenTokenLogprob]


class ReasoningText(Struct, tag_field="type", tag="reasoning_text"):
    text: str


class OutputMessage(Struct, tag_field="type", tag="message"):
    id: str
    status: Literal["completed", "incomplete"]
    role: Literal["assistant"]
    content: list[OutputText]


class Reasoning(Struct, tag_field="type", tag="reasoning"):
    id: str
    summary: list[Object]
    content: list[ReasoningText]
    status: Literal["completed", "incomplete"]


class FunctionCall(Struct, tag_field="type", tag="function_call"):
    id: str
    call_id: str
    name: str
    arguments: str
    status: Literal["completed", "incomplete"]


class ResponseError(Struct):
    code: str
    message: str


class IncompleteDetails(Struct):
    reason: Literal["max_output_tokens"]


class ReasoningOptions(Struct):
    effort: str | None
    summary: None


class TextOptions(Struct):
    format: Object
    verbosity: Literal["low", "medium", "high"]


class ResponseTool(Struct):
    type: Literal["function"]
    name: str
    description: str | None
    parameters: Object | None
    strict: bool | None


class InputTokensDetails(PromptTokensDetails):
    cache_write_tokens: int | UnsetType = UNSET


class TokenUsage(Struct):
    """Of a response or a batch."""

    input_tokens: int
    input_tokens_details: InputTokensDetails
    output_tokens: int
    output_tokens_details: CompletionTokensDetails
    total_tokens: int


class ResponseObject(Struct):
    id: str
    object: Literal["response"]
    created_at: int
    status: Literal["queued", "in_progress", "completed", "incomplete", "failed", "cancelled"]
    background: bool
    completed_at: int | None
    error: ResponseError | None
    incomplete_details: IncompleteDetails | None
    instructions: str | None
    max_output_tokens: int | None
    max_tool_calls: int | None
    metadata: Object
    model: str
    output: list[OutputMessage | Reasoning | FunctionCall]
    parallel_tool_calls: bool
    previous_response_id: str | None
    reasoning: ReasoningOptions
    service_tier: Literal["default"]
    store: bool
    temperature: float
    text: TextOptions
    tool_choice: str | Object
    tools: list[ResponseTool]
    top_logprobs: int
    top_p: float
    truncation: str
    usage: TokenUsage | None
    user: str | UnsetType = UNSET
    safety_identifier: str | UnsetType = UNSET
    prompt_cache_key: str | UnsetType = UNSET


class DeletedResponse(Struct):
    id: str
    object: Literal["response"]
    deleted: Literal[True]


class ResponseInputTokens(Struct):
    object: Literal["response.input_tokens"]
    input_tokens: int


class ResponseInputItems(Struct):
    object: Literal["list"]
    data: list[Object]  # items of `input`, each with an id and a status
    first_id: str | None
    last_id: str | None
    has_more: bool


# ---- messages


class TextBlock(Struct, tag_field="type", tag="text"):
    text: str


class ThinkingBlock(Struct, tag_field="type", tag="thinking"):
    thinking: str
    signature: str


class ToolUseBlock(Struct, tag_field="type", tag="tool_use"):
    id: str
    name: str
    input: Object


class ThinkingTokens(Struct):
    thinking_tokens: int


class MessageUsage(Struct):
    input_tokens: int
    cache_creation_input_tokens: int
    cache_read_input_tokens: int
    output_tokens: int
    output_tokens_details: ThinkingTokens


class Message(Struct):
    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    model: str
    content: list[TextBlock | ThinkingBlock | ToolUseBlock]
    stop_reason: Literal["end_turn", "max_tokens", "stop_sequence", "tool_use"]
    stop_sequence: str | None
    usage: MessageUsage


class MessageTokens(Struct):
    input_tokens: int
