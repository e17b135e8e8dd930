"""Outputs of models in every known format, with what they mean."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

CITY = {"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}}}
TOOLS: list[dict[str, Any]] = [
    {"type": "function", "function": {"name": "weather", "parameters": CITY}},
    {"type": "function", "function": {"name": "find_user", "parameters": {"type": "object"}}},
]
ARGUMENTS = {"city": 'Århus "north" 東京 😀', "days": 3}
OTHER_ARGUMENTS = {"query": {"tags": ["a]", "b}", "</tool_call>"], "deep": {"x": None, "y": [True, 1.5e3]}}}
FIRST, SECOND = (json.dumps(value, ensure_ascii=False) for value in (ARGUMENTS, OTHER_ARGUMENTS))


@dataclass(frozen=True)
class Sample:
    """calls: names and arguments (the exact text, or the value when the format is not JSON)."""

    parser: str
    text: str
    content: str = ""
    calls: list[tuple[str, Any]] = field(default_factory=list)
    reasoning: str = ""


def one(key: str = "arguments", arguments: str = FIRST, name: str = "weather") -> str:
    return f'{{"name": "{name}", "{key}": {arguments}}}'


BOTH = [("weather", FIRST), ("find_user", SECOND)]
ARRAY = f"[{one()}, {one(arguments=SECOND, name='find_user')}]"
V3_BEGIN, V3_END = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"
V3 = "<｜tool▁call▁begin｜>function<｜tool▁sep｜>{}\n```json\n{}\n```<｜tool▁call▁end｜>"
V31 = "<｜tool▁call▁begin｜>{}<｜tool▁sep｜>{}<｜tool▁call▁end｜>"
CODER = "<tool_call>\n<function={}>\n{}</function>\n</tool_call>"
PARAMETER = "<parameter={}>\n{}\n</parameter>\n"

SAMPLES = [
    Sample("hermes", f"<tool_call>\n{one()}\n</tool_call>", calls=BOTH[:1]),
    Sample(
        "hermes",
        f"Let me look.\n<tool_call>\n{one()}\n</tool_call>\n"
        f"<tool_call>{one('arguments', SECOND, 'find_user')}</tool_call>\n",
        content="Let me look.\n",
        calls=BOTH,
    ),
    Sample(
        "hermes",
        f"before <tool_call>{one()}</tool_call> between <tool_call>{one()}</tool_call> after",
        content="before  between  after",
        calls=[BOTH[0], BOTH[0]],
    ),
    Sample("hermes", '<tool_call>{"arguments": {"a": 1}, "name": "f"}</tool_call>', calls=[("f", '{"a": 1}')]),
    Sample("hermes", '<tool_call>{"name": "f", "arguments": "{\\"a\\": 1}"}</tool_call>', calls=[("f", '{"a": 1}')]),
    Sample("hermes", '<tool_call>{"name": "f"}</tool_call>', calls=[("f", "{}")]),
    Sample("hermes", '<tool_call>{"name": "f", "arguments": null, "x": [1]}</tool_call>', calls=[("f", "{}")]),
    Sample("hermes", "  No call here: <tool", content="  No call here: <tool"),
    Sample("llama3_json", one("parameters"), calls=BOTH[:1]),
    Sample("llama3_json", f"<|python_tag|>{one('parameters')}; {one('parameters', SECOND, 'find_user')}", calls=BOTH),
    Sample("llama3_json", f'{{"type": "function", {one("parameters")[1:]}', calls=BOTH[:1]),
    Sample("llama3_json", '{"name": "Bob", "age": 3}', content='{"name": "Bob", "age": 3}'),
    Sample("llama3_json", '{"answer": [1, 2]}', content='{"answer": [1, 2]}'),
    Sample("pythonic", "[weather(city='Århus', days=3)]", calls=[("weather", {"city": "Århus", "days": 3})]),
    Sample(
        "pythonic",
        '<|python_start|>[weather(city="a, b)]", days=-1), '
        'find_user(q={"a": [1, (2, 3)], "b": None}, r=True)]<|python_end|>',
        calls=[
            ("weather", {"city": "a, b)]", "days": -1}),
            ("find_user", {"q": {"a": [1, [2, 3]], "b": None}, "r": True}),
        ],
    ),
    Sample("pythonic", "[find_user()]", calls=[("find_user", {})]),
    Sample("pythonic", "[1, 2, 3] is a list", content="[1, 2, 3] is a list"),
    Sample("pythonic", "[unknown(x=1)]", content="[unknown(x=1)]"),
    Sample("mistral", f"[TOOL_CALLS] {ARRAY}", calls=BOTH),
    Sample("mistral", f"Sure. [TOOL_CALLS]weather[ARGS]{FIRST}[TOOL_CALLS]find_user{SECOND}", "Sure. ", BOTH),
    Sample("mistral", f"[TOOL_CALLS]weather[CALL_ID]abc123DEF[ARGS]{FIRST}", calls=BOTH[:1]),
    Sample(
        "deepseek_v3",
        "Hm.<｜tool▁calls▁begin｜>"
        + V3.format("weather", FIRST)
        + "\n"
        + V3.format("find_user", SECOND)
        + "<｜tool▁calls▁end｜>",
        content="Hm.",
        calls=BOTH,
    ),
    Sample(
        "deepseek_v31",
        "<｜tool▁calls▁begin｜>"
        + V31.format("weather", FIRST)
        + V31.format("find_user", SECOND)
        + "<｜tool▁calls▁end｜>",
        calls=BOTH,
    ),
    Sample("granite", f"<|tool_call|>{ARRAY}", calls=BOTH),
    Sample("granite", f"<tool_call>{ARRAY}\nDone.", content="\nDone.", calls=BOTH),
    Sample("phi4", f"functools{ARRAY}", calls=BOTH),
    Sample("phi4", f"<|tool_call|>{ARRAY}<|/tool_call|>", calls=BOTH),
    Sample(
        "harmony",
        "<|channel|>analysis<|message|>They ask.<|end|><|start|>assistant<|channel|>commentary to=functions.weather "
        f"<|constrain|>json<|message|>{FIRST}<|call|>",
        calls=BOTH[:1],
        reasoning="They ask.",
    ),
    Sample(
        "harmony",
        "<|channel|>analysis<|message|>Easy.<|end|><|start|>assistant<|channel|>final<|message|>It is 4.<|return|>",
        content="It is 4.",
        reasoning="Easy.",
    ),
    Sample(
        "harmony",
        "<|channel|>commentary<|message|>I will look. <|end|>"
        f"<|start|>assistant to=functions.weather<|channel|>commentary json<|message|>{FIRST}<|call|>"
        f"<|start|>assistant<|channel|>commentary to=functions.find_user<|message|>{SECOND}",
        content="I will look. ",
        calls=BOTH,
    ),
    Sample("harmony", "No channel at all.", content="No channel at all."),
    Sample(
        "qwen3_coder",
        "I see. " + CODER.format("weather", PARAMETER.format("city", "a\n<b>") + PARAMETER.format("days", "3")),
        content="I see. ",
        calls=[("weather", {"city": "a\n<b>", "days": 3})],
    ),
    Sample(
        "qwen3_coder",
        CODER.format("weather", PARAMETER.format("days", "many")) + "\n" + CODER.format("find_user", ""),
        calls=[("weather", {"days": "many"}), ("find_user", {})],
    ),
]

# What is no complete call: content, or a call with the arguments so far.
BROKEN = [
    Sample("hermes", "<tool_call>\nnot json\n</tool_call>", "<tool_call>\nnot json\n</tool_call>"),
    Sample("hermes", '<tool_call>{"name": 3}</tool_call>', '<tool_call>{"name": 3}</tool_call>'),
    Sample(
        "hermes", '<tool_call>{"name": "f", "arguments": {"a": 1}</tool_call> more', " more", calls=[("f", '{"a": 1}')]
    ),
    Sample("hermes", '<tool_call>{"name": "f", "arguments": {"a": 1</tool_call>', calls=[("f", '{"a": 1')]),
    Sample(
        "hermes", '<tool_call>{"name": "f", "arguments": {}} trailing</tool_call>', " trailing", calls=[("f", "{}")]
    ),
    Sample(
        "hermes", "<tool_call><tool_call>{}</tool_call></tool_call>", "<tool_call><tool_call>{}</tool_call></tool_call>"
    ),
    Sample("hermes", "<tool_call>[]</tool_call>", "<tool_call>[]</tool_call>"),
    Sample("llama3_json", "{", "{"),
    Sample("llama3_json", '{"name": ', '{"name": '),
    Sample("llama3_json", '{"name": "weather", "parameters": {"a": ', calls=[("weather", '{"a": ')]),
    Sample("llama3_json", "<|python_tag|>print(1)", "<|python_tag|>print(1)"),
    Sample("llama3_json", '{"name"; 1}', '{"name"; 1}'),
    Sample("pythonic", "[weather(", calls=[("weather", "")]),
    Sample("pythonic", "[weather(city=", "city=", calls=[("weather", "")]),
    Sample("pythonic", "[weather('x')]", "'x')]", calls=[("weather", "")]),
    Sample("pythonic", "[weather(city=open('x'))]", "city=open('x'))]", calls=[("weather", "")]),
    Sample("pythonic", "[weather(city='a'", "city='a'", calls=[("weather", "")]),
    Sample("mistral", "[TOOL_CALLS]", "[TOOL_CALLS]"),
    Sample("mistral", "[TOOL_CALLS][{]", "[TOOL_CALLS][{]"),
    Sample("mistral", "[TOOL_CALLS]two words{}", "[TOOL_CALLS]two words{}"),
    Sample("mistral", '[TOOL_CALLS]f{"a": ', calls=[("f", '{"a": ')]),
    Sample("mistral", "[TOOL_CALLS]f", "[TOOL_CALLS]f"),
    Sample("deepseek_v3", "<｜tool▁calls▁begin｜>and now?", "<｜tool▁calls▁begin｜>and now?"),
    Sample(
        "deepseek_v3", "<｜tool▁call▁begin｜>function<｜tool▁sep｜>f", "<｜tool▁call▁begin｜>function<｜tool▁sep｜>f"
    ),
    Sample("deepseek_v3", "<｜tool▁call▁begin｜>{}<｜tool▁call▁end｜>", "<｜tool▁call▁begin｜>{}<｜tool▁call▁end｜>"),
    Sample("deepseek_v3", "<｜tool▁call▁end｜><｜tool▁calls▁end｜>", "<｜tool▁call▁end｜><｜tool▁calls▁end｜>"),
    Sample("granite", "<|tool_call|>", "<|tool_call|>"),
    Sample("granite", "<|tool_call|>[", "<|tool_call|>["),
    Sample("granite", "<|tool_call|>[1]", "<|tool_call|>[1]"),
    Sample("granite", '<|tool_call|>[{"name": "f"}, 2]', "2]", calls=[("f", "{}")]),
    Sample("phi4", "functools", "functools"),
    Sample("phi4", "functools are tools", "functools are tools"),
    Sample("phi4", 'functools[{"name": "f", "arguments": {', calls=[("f", "{")]),
    Sample("harmony", "<|channel|>", "<|channel|>"),
    Sample("harmony", "<|channel|>final", "<|channel|>final"),
    Sample("harmony", "<|start|>assistant<|message|>x", "x"),
    Sample("harmony", " to=", " to="),
    Sample("harmony", "<|end|>a<|end|>", "a"),
    Sample("harmony", "<|message|>", "<|message|>"),
    Sample("qwen3_coder", "<tool_call>plain</tool_call>", "<tool_call>plain</tool_call>"),
    Sample("qwen3_coder", "<tool_call><function=", "<tool_call><function="),
    Sample("qwen3_coder", "<tool_call><function=weather><parameter=city>\nHal", calls=[("weather", '{"city": "Hal')]),
    Sample("qwen3_coder", "<function=weather>?</function>", "?</function>", calls=[("weather", "{}")]),
    Sample("qwen3_coder", "<tool_call><function=weather><parameter=city", "<parameter=city", calls=[("weather", "")]),
]
