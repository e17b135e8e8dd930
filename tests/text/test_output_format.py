"""Which parsers a chat template leads to, and what constrained calls look like."""

from __future__ import annotations

import dataclasses
import json

import pytest

from engine.client import AsyncEngine
from engine.config import Config, Limits, ModelConfig
from engine.constraints.grammar import compile_constraint
from engine.constraints.limits import ConstraintLimits
from engine.constraints.vocabulary import Vocabulary
from engine.errors import ConfigError, UnsupportedParameter
from engine.launch import resolve_model_path
from engine.text.output_format import OutputFormat
from engine.text.parsers import REASONING_PARSERS, TOOL_PARSERS
from engine.text.parsers.call_forms import call_form
from engine.text.tokenizer import Tokenizer
from engine.types import ChatPrompt, Constraint, Delta, GenerationRequest, OutputParsing, SamplingParams
from tests.text.parsers.samples import TOOLS

TEMPLATES = [
    ("<|im_start|>{{ m }}<tool_call>\n</tool_call>", "hermes", "none"),
    ("<|im_start|><tool_call><think></think>", "hermes", "qwen3"),
    ("<tool_call><function=a><parameter=b>", "qwen3_coder", "none"),
    ("[INST][AVAILABLE_TOOLS][TOOL_CALLS]", "mistral", "none"),
    ("[TOOL_CALLS][THINK]", "mistral", "mistral"),
    ("<｜Assistant｜><｜tool▁calls▁begin｜>```json</think>", "deepseek_v3", "deepseek_r1"),
    ("<｜Assistant｜><｜tool▁calls▁begin｜></think>", "deepseek_v31", "deepseek_r1"),
    ("<|start_of_role|><|tool_call|>", "granite", "none"),
    ("<|tool|><|/tool|><|tool_call|><|/tool_call|>", "phi4", "none"),
    ('<|start_header_id|><|python_tag|>"parameters"', "llama3_json", "none"),
    ("<|header_start|><|python_start|>", "pythonic", "none"),
    ("<|start|><|channel|>analysis<|message|>", "harmony", "harmony"),
    ("{{ messages }}", "none", "none"),
]


STRICT = [{"type": "function", "function": {**tool["function"], "strict": True}} for tool in TOOLS[:1]]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_folder(resolve_model_path("mimir"))


@pytest.fixture(scope="module")
def vocabulary(tokenizer: Tokenizer) -> Vocabulary:
    return Vocabulary(tokenizer.files.definition, tokenizer.eos_token_ids)


def format_of(tokenizer: Tokenizer, template: str, **names: str) -> OutputFormat:
    class WithTemplate:
        files = dataclasses.replace(tokenizer.files, chat_template=template)
        special_ids = tokenizer.special_ids
        token_text = staticmethod(tokenizer.token_text)
        decode = staticmethod(tokenizer.decode)

    return OutputFormat(WithTemplate(), **names)  # type: ignore[arg-type]


@pytest.mark.parametrize(("template", "tools", "reasoning"), TEMPLATES)
def test_parsers_are_chosen_by_the_template(tokenizer: Tokenizer, template: str, tools: str, reasoning: str) -> None:
    found = format_of(tokenizer, template)
    assert (found.tool_parser, found.reasoning_parser) == (tools, reasoning)
    named = format_of(tokenizer, template, tool_parser="phi4", reasoning_parser="none")
    assert (named.tool_parser, named.reasoning_parser) == ("phi4", "none")


def test_an_unknown_parser_ends_the_start_with_the_known_names() -> None:
    for option in ("tool_call_parser", "reasoning_parser"):
        with pytest.raises(ConfigError, match=rf"{option} is 'nope'.*none or one of .*mistral") as caught:
            AsyncEngine(Config(model=ModelConfig(**{option: "nope"})))  # type: ignore[arg-type]
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", sorted(name for name, kind in TOOL_PARSERS.items() if kind.shape is not None))
def test_constrained_calls_are_what_the_parser_reads(name: str, tokenizer: Tokenizer, vocabulary: Vocabulary) -> None:
    kind, limits = TOOL_PARSERS[name], ConstraintLimits.of(Limits())
    shape = kind.shape
    assert shape is not None
    calls = [f"{shape.begin.replace('NAME', 'weather')}{text}{shape.end}" for text in ('{"city": "x"}', '{"days": 3}')]
    text = shape.prefix + shape.separator.join(calls) + shape.suffix
    for must_call, answer in ((True, None), (False, None), (False, {"type": "regex", "pattern": "[0-9]+"})):
        form = call_form(kind, STRICT, must_call=must_call, is_parallel=True, answer=answer)
        constraint = Constraint("structural_tag", json.dumps({"format": form}))
        grammar = compile_constraint(constraint, vocabulary, limits)
        assert accepts(vocabulary, grammar, tokenizer.encode(text, add_special_tokens=False))
        wrong = tokenizer.encode(text.replace('{"days": 3}', '{"days": "many"}'), add_special_tokens=False)
        assert not accepts(vocabulary, grammar, wrong)
        plain = tokenizer.encode(f"{shape.answer_begin}No call at all.", add_special_tokens=False)
        assert accepts(vocabulary, grammar, plain) == (not must_call and answer is None)
    parser = kind(TOOLS)
    delta = Delta.join([parser.feed(text), parser.finish()])
    assert [(call.name, call.arguments) for call in delta.tool_calls] == [
        ("weather", '{"city": "x"}'),
        ("weather", '{"days": 3}'),
    ]


def accepts(vocabulary: Vocabulary, grammar: str, token_ids: list[int]) -> bool:
    """Whether the text is a whole output."""
    matcher = vocabulary.matcher(grammar)
    return (
        matcher.validate_tokens(token_ids) == len(token_ids)
        and matcher.consume_tokens(token_ids)
        and (matcher.is_accepting())
    )


def test_formats_without_json_arguments_are_forced_into_one_that_has_them() -> None:
    for kind in set(TOOL_PARSERS.values()):
        if kind.shape is None:
            assert kind.forced_form is not None
            assert TOOL_PARSERS[kind.forced_form].shape is not None


def test_mimir_thinks_between_single_tokens_and_so_has_a_budget(tokenizer: Tokenizer) -> None:
    mimir = OutputFormat(tokenizer)
    assert (mimir.tool_parser, mimir.reasoning_parser) == ("hermes", "qwen3")
    budget = mimir.thinking_budget(5, is_open=True)
    assert budget.start_ids == ()
    assert tokenizer.decode([budget.end_id]) == "</think>"
    assert budget.end_id in budget.forced_ids
    closed = mimir.thinking_budget(5, is_open=False)
    assert tokenizer.decode(closed.start_ids) == "<think>"
    for name in ("none", "granite"):
        with pytest.raises(UnsupportedParameter, match="cannot be bounded"):
            OutputFormat(tokenizer, reasoning_parser=name).thinking_budget(5, is_open=True)


def test_a_request_gets_what_depends_on_its_prompt(tokenizer: Tokenizer) -> None:
    mimir = OutputFormat(tokenizer)
    given = GenerationRequest(
        prompt=ChatPrompt(messages=[]), sampling=SamplingParams(), parsing=OutputParsing(), max_thinking_tokens=3
    )
    opened = tokenizer.encode("assistant\n<think>\n", add_special_tokens=False)
    budget = mimir.prepared(given, opened).sampling.thinking
    assert budget is not None
    assert budget.start_ids == ()
    closed = mimir.prepared(given, tokenizer.encode("assistant\n", add_special_tokens=False)).sampling.thinking
    assert closed is not None
    assert closed.start_ids
    assert mimir.parser_options(given, opened)["new_parser"]().is_thinking  # type: ignore[union-attr]


def test_names_of_parsers_are_documented() -> None:
    text = (resolve_model_path("mimir").parents[3] / "docs" / "api.md").read_text()
    for name in (*TOOL_PARSERS, *REASONING_PARSERS):
        assert f"`{name}`" in text, name
