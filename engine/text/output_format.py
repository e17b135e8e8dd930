"""The formats in which one model writes thinking and tool calls: chosen once, from its chat template or by name.

Everything here follows from the tokenizer's files; knows no requests' lives and no ids of streams.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypedDict

import msgspec

from engine.errors import UnsupportedParameter
from engine.text.parsers import REASONING_PARSERS, TOOL_PARSERS, OutputParser, ToolParser
from engine.text.parsers.call_forms import Form, call_form
from engine.text.parsers.harmony import FINAL, Harmony
from engine.text.parsers.registry import check_name
from engine.text.parsers.thinking import TAIL_CHARS, PlainContent, Thinking, ThinkingParser
from engine.text.rendered import RenderedText
from engine.text.tokenizer import Tokenizer
from engine.types import ChatPrompt, Constraint, GenerationRequest, OutputParsing, ThinkingBudget

# A parser is chosen when the template contains all texts of a line; the first line that fits decides.
TOOL_SIGNS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("harmony", ("<|channel|>", "<|message|>")),
    ("deepseek_v3", ("<｜tool▁calls▁begin｜>", "```json")),
    ("deepseek_v31", ("<｜tool▁calls▁begin｜>",)),
    ("mistral", ("[TOOL_CALLS]",)),
    ("qwen3_coder", ("<function=", "<parameter=")),
    ("phi4", ("<|/tool_call|>",)),
    ("phi4", ("functools",)),
    ("granite", ("<|tool_call|>",)),
    ("pythonic", ("<|python_start|>",)),
    ("llama3_json", ("<|python_tag|>",)),
    ("llama3_json", ("<|start_header_id|>", '"parameters"')),
    ("hermes", ("<tool_call>",)),
)
REASONING_SIGNS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("harmony", ("<|channel|>", "<|message|>")),
    ("mistral", ("[THINK]",)),
    ("granite", ("Here is my thought process:",)),
    ("deepseek_r1", ("<｜Assistant｜>", "</think>")),
    ("qwen3", ("</think>",)),
)
MAX_PROMPT_TAIL_TOKENS = 64
NO_BOUND = 2**31 - 1


class ParserOptions(TypedDict, total=False):
    """The arguments of `engine.stream.RequestStream` that concern parsing."""

    new_parser: Callable[[], OutputParser | None]
    kept_ids: frozenset[int]


class OutputFormat:
    """Parsers, constraints and thinking budgets for one model."""

    def __init__(self, tokenizer: Tokenizer, tool_parser: str = "auto", reasoning_parser: str = "auto") -> None:
        """Raises ConfigError for a parser that does not exist."""
        check_names(tool_parser, reasoning_parser)
        template = tokenizer.files.chat_template or ""
        self.tool_parser = _resolve(tool_parser, TOOL_SIGNS, template)
        self.reasoning_parser = _resolve(reasoning_parser, REASONING_SIGNS, template)
        self._tokenizer = tokenizer
        self._thinking: Thinking | None = REASONING_PARSERS.get(self.reasoning_parser)
        self._special_ids = {tokenizer.token_text(token_id): token_id for token_id in tokenizer.special_ids}
        self._added_ids = {token["content"]: token["id"] for token in tokenizer.files.definition["added_tokens"]}

    def prepared(self, given: GenerationRequest, prompt_ids: Sequence[int]) -> GenerationRequest:
        """The request with what depends on whether its answer begins with thinking. Raises UnsupportedParameter."""
        if given.max_thinking_tokens is None and given.constraint is None:
            return given
        is_open = self._is_open(given, prompt_ids)
        if given.constraint is not None and given.constraint_after is None:
            given = msgspec.structs.replace(
                given, constraint_after=self.constraint_after(given.constraint, is_open=is_open)
            )
        # what is constrained stands behind the thinking: an output that ends before has nothing of it
        must_answer = is_open and given.constraint_after is not None
        budget = None
        if given.max_thinking_tokens is not None:
            budget = self.thinking_budget(given.max_thinking_tokens, is_open=is_open, must_answer=must_answer)
        elif must_answer and self._has_short_end():
            budget = self.thinking_budget(NO_BOUND, is_open=True, must_answer=True)
        if budget is None:
            return given
        return msgspec.structs.replace(given, sampling=msgspec.structs.replace(given.sampling, thinking=budget))

    def parser_options(self, given: GenerationRequest, prompt_ids: Sequence[int]) -> ParserOptions:
        """What a stream needs to tell thinking and calls from content."""
        parsing = given.parsing
        if parsing is None:
            return {}
        is_open = self._is_open(given, prompt_ids)
        return {
            "new_parser": lambda: self.new_parser(parsing, is_thinking_open=is_open),
            "kept_ids": self.kept_ids(parsing),
        }

    def _is_open(self, given: GenerationRequest, prompt_ids: Sequence[int]) -> bool:
        """Only a chat prompt ends with a template's own marker."""
        if not isinstance(given.prompt, ChatPrompt):
            return False
        return self.is_thinking_open(prompt_ids, is_continued=given.prompt.continue_final_message)

    def new_parser(self, parsing: OutputParsing, *, is_thinking_open: bool) -> OutputParser | None:
        """A parser for one choice; None when all text is content."""
        kind = self._tool_class(parsing)
        if self._is_harmony(parsing):
            return Harmony(parsing.tools, has_reasoning=parsing.has_reasoning)
        content = PlainContent() if kind is None else kind(parsing.tools)
        if self._thinking is not None and parsing.has_reasoning:
            return ThinkingParser(self._thinking, content, is_open=is_thinking_open)
        return content if isinstance(content, ToolParser) else None

    def kept_ids(self, parsing: OutputParsing) -> frozenset[int]:
        """Special tokens that a parser has to see."""
        kind = Harmony if self._is_harmony(parsing) else self._tool_class(parsing)
        texts = set(() if kind is None else kind.markers)
        if self._thinking is not None and parsing.has_reasoning:
            texts.update((*self._thinking.starts, *self._thinking.ends))
        return frozenset(self._special_ids[text] for text in texts & self._special_ids.keys())

    def is_thinking_open(self, prompt_ids: Sequence[int], *, is_continued: bool) -> bool:
        """Whether an answer to this prompt begins inside of thinking. is_continued: it goes on with a message."""
        if self._thinking is None:
            return False
        tail = prompt_ids if is_continued else prompt_ids[-MAX_PROMPT_TAIL_TOKENS:]
        text = self._tokenizer.decode(tail)
        return self._thinking.is_open(text if is_continued else text[-TAIL_CHARS:], is_continued=is_continued)

    def constraint_after(self, constraint: Constraint, *, is_open: bool) -> str | None:
        """The text behind which a constraint begins to apply, for an output that may begin with thinking."""
        if self.reasoning_parser == "harmony" or self.tool_parser == "harmony":
            # calls are constrained together with the channels in which they stand
            return None if constraint.param == "tools" else FINAL
        return self._thinking.ends[0] if self._thinking is not None and is_open else None

    def thinking_budget(self, max_tokens: int, *, is_open: bool, must_answer: bool = False) -> ThinkingBudget:
        """must_answer: a constrained answer has to follow. Raises UnsupportedParameter where nothing can be bounded."""
        if self._thinking is None:
            raise UnsupportedParameter(
                "this model marks no thinking that is known here, so it cannot be bounded; leave the budget out, or "
                "start the server with --reasoning-parser NAME",
                param="thinking_budget",
            )
        if not self._has_short_end():
            raise UnsupportedParameter(
                "this model ends its thinking with ordinary words, so it cannot be bounded; leave the budget out",
                param="thinking_budget",
            )
        end_id = self._ids(self._thinking.ends[0])[0]
        forced_ids = tuple(self._ids(self._thinking.forced_end))
        if must_answer:  # what follows the end is the constraint's from its first token on
            forced_ids = forced_ids[: forced_ids.index(end_id) + 1]
        return ThinkingBudget(
            max_tokens=max_tokens,
            start_ids=() if is_open else tuple(self._ids(self._thinking.starts[0])),
            end_id=end_id,
            forced_ids=forced_ids,
            must_answer=must_answer,
        )

    def _has_short_end(self) -> bool:
        """Whether one token ends the thinking, which the engine can look for."""
        return self._thinking is not None and len(self._ids(self._thinking.ends[0])) == 1

    def call_constraint(
        self, tools: Sequence[Mapping[str, Any]], *, must_call: bool, is_parallel: bool, answer: Form | None
    ) -> tuple[Constraint, str]:
        """What makes calls well-formed, and the parser that reads them.

        must_call     the output is at least one call; otherwise text, with calls where their marker appears
        is_parallel   there may be several
        answer        the form of an answer without calls, as a format of a structural tag; None: any text
        Raises UnsupportedParameter when the model has no known way of calling.
        """
        kind = TOOL_PARSERS.get(self.tool_parser)
        if kind is None:
            raise UnsupportedParameter(
                "this model has no known format of tool calls; start the server with --tool-call-parser NAME",
                param="tools",
            )
        name = kind.forced_form or self.tool_parser
        form = call_form(TOOL_PARSERS[name], tools, must_call=must_call, is_parallel=is_parallel, answer=answer)
        return Constraint("structural_tag", json.dumps({"format": form}), param="tools"), name

    def _tool_class(self, parsing: OutputParsing) -> type[ToolParser] | None:
        return TOOL_PARSERS.get(parsing.tool_parser or self.tool_parser) if parsing.tools else None

    def _is_harmony(self, parsing: OutputParsing) -> bool:
        """One parser for both: channels cannot be told apart one by one."""
        return "harmony" in (self.reasoning_parser, parsing.tool_parser or self.tool_parser)

    def _ids(self, text: str) -> list[int]:
        """Text of the template's kind: markers in it are control tokens."""
        if text in self._added_ids:
            return [self._added_ids[text]]
        return self._tokenizer.encode_rendered(RenderedText(text))


def check_names(tool_parser: str, reasoning_parser: str) -> None:
    """Raises ConfigError that lists the known names."""
    check_name("tool_call_parser", tool_parser, TOOL_PARSERS)
    check_name("reasoning_parser", reasoning_parser, REASONING_PARSERS)


def _resolve(name: str, signs: Iterable[tuple[str, tuple[str, ...]]], template: str) -> str:
    if name != "auto":
        return name
    return next((found for found, texts in signs if all(text in template for text in texts)), "none")
