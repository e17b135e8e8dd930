"""Bodies of the generation routes: which fields exist, their types, ranges and defaults."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Discriminator, Field, Tag, ValidationInfo

from engine.errors import InvalidParameter
from server.constraints import ConstraintFields
from server.fields import (
    INT32_MAX,
    AllowedTokenIds,
    BadWords,
    Body,
    Flag,
    Integer,
    Label,
    LogitBias,
    Metadata,
    NamedChoice,
    Number,
    Seed,
    ShortText,
    Speculative,
    StopStrings,
    StopTokenIds,
    TemplateKwargs,
    Text,
    at_most,
    between,
    limit_of,
    one_of,
    token_ids,
    wrong_type,
    wrong_value,
)
from server.tool_schemas import Choice, Tools

ROLES = ("system", "developer", "user", "assistant", "tool", "function")
EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh", "max")
DEFAULT_COMPLETION_TOKENS = 16


class StreamOptions(Body):
    include_usage: Flag = False
    continuous_usage_stats: Flag = False
    include_obfuscation: Flag = False  # accepted, has no meaning here


class SamplingFields(ConstraintFields):
    """What chat and text completions have in common. None: not given, so the model's own default applies."""

    model: Text | None = None
    max_tokens: Annotated[Integer, between(0, INT32_MAX)] | None = None
    min_tokens: Annotated[Integer, between(0, INT32_MAX)] = 0
    temperature: Annotated[Number, between(0, 2)] | None = None
    top_p: Annotated[Number, between(0, 1)] | None = None  # 0: only the best token
    top_k: Annotated[Integer, between(-1, INT32_MAX)] | None = None
    min_p: Annotated[Number, between(0, 1)] | None = None
    typical_p: Annotated[Number, between(0, 1, above=True)] | None = None
    presence_penalty: Annotated[Number, between(-2, 2)] = 0.0
    frequency_penalty: Annotated[Number, between(-2, 2)] = 0.0
    repetition_penalty: Annotated[Number, between(0, 100, above=True)] | None = None
    seed: Seed | None = None
    n: Annotated[Integer, between(1, "max_choices")] = 1
    stop: StopStrings = ()
    stop_token_ids: StopTokenIds = ()
    include_stop_str_in_output: Flag = False
    no_stop_trim: Flag = False  # SGLang's name for it
    ignore_eos: Flag = False
    skip_special_tokens: Flag = True
    spaces_between_special_tokens: Flag = True
    logit_bias: LogitBias = Field(default_factory=dict)
    allowed_token_ids: AllowedTokenIds = ()
    bad_words: BadWords = ()
    prompt_logprobs: Annotated[Integer, between(0, "max_top_logprobs")] | None = None
    truncate_prompt_tokens: Annotated[Integer, between(-1, INT32_MAX)] | None = None
    truncation_side: Annotated[Literal["left", "right"], one_of("left", "right")] = "left"  # where tokens are dropped
    priority: Annotated[Integer, between(-INT32_MAX, INT32_MAX)] = 0
    speculative: Speculative | None = None  # who guesses tokens ahead; None: the server's default
    kv_policy: NamedChoice | None = None  # how the KV cache is kept; None: the server's default
    cache_salt: Label | None = None
    extra_key: Label | None = None  # SGLang's name for it; both together are a salt of their own
    request_id: Label | None = None  # instead of the X-Request-Id header, for operators' aborts
    rid: Label | None = None  # SGLang's name for it
    timeout: Annotated[Number, between(0, 86400, above=True)] | None = None
    echo: Flag = False
    stream: Flag = False
    stream_options: StreamOptions | None = None
    return_token_ids: Flag = False
    return_tokens_as_token_ids: Flag = False
    # accepted because clients send them; they change nothing
    user: ShortText | None = None
    safety_identifier: ShortText | None = None
    prompt_cache_key: ShortText | None = None
    metadata: Metadata | None = None
    store: Flag | None = None
    service_tier: Text | None = None
    session_id: ShortText | None = None
    prompt_cache_retention: Text | None = None
    stream_interval: Annotated[Integer, between(1, INT32_MAX)] | None = None  # chunks follow the reader's speed

    @property
    def salt(self) -> str:
        return ":".join(part for part in (self.cache_salt, self.extra_key) if part)

    def check(self) -> None:
        """Rules between fields. Raises InvalidParameter."""
        if self.stream_options is not None and not self.stream:
            raise InvalidParameter("stream_options needs stream: true", param="stream_options")
        if self.stream and self.prompt_logprobs is not None:
            raise InvalidParameter(
                "prompt_logprobs cannot be streamed; leave out stream or prompt_logprobs", param="prompt_logprobs"
            )
        if self.truncate_prompt_tokens == 0:
            raise InvalidParameter("truncate_prompt_tokens must be -1 or at least 1", param="truncate_prompt_tokens")


class ToolCallFunction(Body):
    name: Text
    arguments: Any = None  # a string that holds JSON; the template gets the object


class ToolCall(Body):
    id: Text | None = None
    type: Annotated[str, one_of("function")] = "function"
    function: ToolCallFunction


def _content_kind(content: Any) -> str | None:
    if isinstance(content, str):
        return "#text"
    return "#parts" if isinstance(content, list) else None


def _check_part_type(value: Any) -> Any:
    if value not in ("text", "input_text", "output_text", "refusal"):
        raise wrong_value('must be "text": this model reads text only')
    return value


class ContentPart(Body):
    type: Annotated[str, BeforeValidator(_check_part_type)]
    text: Text | None = None
    refusal: Text | None = None


def _check_role(value: Any) -> Any:
    if value not in ROLES:
        raise wrong_value(f"must be one of {', '.join(ROLES)}")
    return value


def _refuse_function_call(value: Any) -> Any:
    raise wrong_value("was replaced by tool_calls; send those")


Parts = Annotated[list[ContentPart], Field(fail_fast=True), at_most("max_content_parts")]
Content = Annotated[
    Annotated[Text, Tag("#text")] | Annotated[Parts, Tag("#parts")],
    Discriminator(
        _content_kind,
        custom_error_type="invalid_type",
        custom_error_message="must be a string or an array of parts",
    ),
]


class Message(Body):
    role: Annotated[str, BeforeValidator(_check_role)]
    content: Content | None = None
    name: Text | None = None
    tool_call_id: Text | None = None
    tool_calls: Annotated[list[ToolCall], Field(fail_fast=True), at_most("max_tools")] | None = None
    reasoning: Text | None = None
    reasoning_content: Text | None = None
    refusal: Text | None = None
    function_call: Annotated[None, BeforeValidator(_refuse_function_call)] = None

    def for_template(self) -> dict[str, Any]:
        """As a plain dict without absent fields; `content` is always there."""
        return {"content": None, **self.model_dump(exclude_none=True)}

    @property
    def text(self) -> str:
        """The content as one string."""
        if isinstance(self.content, list):
            return "\n".join(part.text or part.refusal or "" for part in self.content)
        return self.content or ""


def _check_effort(value: Any) -> Any:
    if value not in EFFORTS:
        raise wrong_value(f"must be one of {', '.join(EFFORTS)}")
    return value


def _documents(value: Any) -> Any:
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        raise wrong_type("an array of objects, for instance with title and text")
    return value


def _check_modalities(value: Any) -> Any:
    if value != ["text"]:
        raise wrong_value('must be ["text"]: this model writes text only')
    return value


class ChatFields(Body):
    """The part of a chat request that says what the model reads; /tokenize takes it too."""

    messages: Annotated[list[Message], Field(fail_fast=True), at_most("max_messages", low=1)]
    add_generation_prompt: Flag | None = None
    continue_final_message: Flag = False
    chat_template_kwargs: TemplateKwargs = Field(default_factory=dict)
    reasoning_effort: Annotated[str, BeforeValidator(_check_effort)] | None = None
    verbosity: Annotated[str, one_of("low", "medium", "high")] | None = None  # for templates that know it
    chat_template: Text | None = None
    documents: Annotated[list[dict[str, Any]], BeforeValidator(_documents), at_most("max_tools")] | None = None
    tools: Tools | None = None
    tool_choice: Choice | None = None

    def check_prompt(self) -> None:
        """Raises InvalidParameter."""
        if self.continue_final_message and self.add_generation_prompt:
            raise InvalidParameter(
                "continue_final_message and add_generation_prompt exclude each other; leave one out",
                param="continue_final_message",
            )
        if self.continue_final_message and self.messages[-1].role != "assistant":
            raise InvalidParameter(
                "continue_final_message needs a last message with role assistant", param="continue_final_message"
            )


ThinkingBudget = Annotated[Integer, between(-1, INT32_MAX)]


class ChatRequest(SamplingFields, ChatFields):
    max_completion_tokens: Annotated[Integer, between(1, INT32_MAX)] | None = None
    logprobs: Flag = False
    top_logprobs: Annotated[Integer, between(0, "max_top_logprobs")] | None = None
    add_special_tokens: Flag = False  # templates bring their own
    modalities: Annotated[list[str], BeforeValidator(_check_modalities)] | None = None
    parallel_tool_calls: Flag = True
    include_reasoning: Flag = True  # False: the thinking is left out of the answer
    separate_reasoning: Flag = True  # False: the thinking stays in the content
    stream_reasoning: Flag = True  # False: the thinking comes in one piece
    thinking_budget: ThinkingBudget | None = None
    thinking_token_budget: ThinkingBudget | None = None  # vLLM's name
    thinking_budget_tokens: ThinkingBudget | None = None  # llama.cpp's name
    prediction: Any = None  # a hint that could only change speed

    @property
    def max_thinking_tokens(self) -> int | None:
        """Of the names for the thinking budget the one that was given; None: no bound."""
        given = (self.thinking_budget, self.thinking_token_budget, self.thinking_budget_tokens)
        budget = next((value for value in given if value is not None), -1)
        return None if budget < 0 else budget

    def check(self) -> None:
        super().check()
        self.check_prompt()
        if self.top_logprobs and not self.logprobs:
            raise InvalidParameter("top_logprobs needs logprobs: true", param="top_logprobs")
        if self.max_tokens == 0:
            raise InvalidParameter("max_tokens must be at least 1", param="max_tokens")


Prompt = str | list[int]


def _prompts(value: Any, info: ValidationInfo) -> tuple[Prompt, ...]:
    """The four shapes of a prompt as a tuple of texts or of token id lists."""
    if isinstance(value, str):
        value = [value]
    if not isinstance(value, list):
        raise wrong_type("a string, an array of strings, an array of token ids or an array of such arrays")
    if not value:
        raise wrong_value("must not be empty")
    kinds = {bool if isinstance(item, bool) else type(item) for item in value}
    if kinds <= {int, float}:
        return (token_ids(value),)
    limit = limit_of(info, "max_prompts")
    if len(value) > limit:
        raise wrong_value(f"must have at most {limit} prompts")
    if kinds == {str}:
        prompts: tuple[Prompt, ...] = tuple(value)
    elif kinds == {list}:
        prompts = tuple(token_ids(item) for item in value)
    else:
        raise wrong_type("all strings, or all token ids, or all arrays of token ids")
    if not all(prompts):
        raise wrong_value("must not hold an empty prompt")
    return prompts


class CompletionRequest(SamplingFields):
    prompt: Annotated[tuple[Any, ...], BeforeValidator(_prompts)]
    best_of: Annotated[Integer, between(1, "max_choices")] | None = None
    logprobs: Annotated[Integer, between(0, "max_completion_logprobs")] | None = None
    suffix: Text | None = None  # empty: nothing follows, an ordinary completion
    add_special_tokens: Flag = True

    @property
    def prompts(self) -> tuple[Prompt, ...]:
        return self.prompt

    @property
    def num_generated(self) -> int:
        """Choices generated per prompt; with best_of more than are returned."""
        return max(self.n, self.best_of or 0)

    def check(self) -> None:
        super().check()
        if self.best_of is not None and self.best_of < self.n:
            raise InvalidParameter(f"best_of must be at least n, which is {self.n}", param="best_of")
        if self.stream and self.num_generated > self.n:
            raise InvalidParameter("best_of above n cannot be streamed; leave out stream or best_of", param="best_of")
        if self.max_tokens == 0 and not self.echo:
            raise InvalidParameter("max_tokens must be at least 1; 0 needs echo: true", param="max_tokens")
        for name in ("echo", "truncate_prompt_tokens"):
            if self.suffix and getattr(self, name):
                raise InvalidParameter(f"suffix and {name} exclude each other; leave one out", param="suffix")
