"""The chat template writes the same text that the corpus was trained on, and supports tools, thinking, continuation."""

import json

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from engine.mimir import model_path
from engine.mimir.corpus.structured import schema, tool_call, tool_system
from engine.mimir.tasks import MAKERS, make_chat

CALL = {"type": "function", "function": {"name": "get_time", "arguments": {"city": "Oslo"}}}


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(model_path())


def render(tokenizer: PreTrainedTokenizerFast, messages: list[dict], **options: object) -> str:
    return tokenizer.apply_chat_template(messages, tokenize=False, **options)


@pytest.mark.parametrize("name", sorted(set(MAKERS) - {"thinking", "tool_use"}))
def test_template_writes_what_the_corpus_trains(tokenizer: PreTrainedTokenizerFast, name: str) -> None:
    for seed in range(3):
        chat = make_chat(name, seed, 80)
        messages = [{"role": turn.role, "content": turn.text} for turn in chat.turns]
        assert render(tokenizer, messages) == "".join(text for text, _ in chat.segments())
        assert render(tokenizer, messages[:-1], add_generation_prompt=True) == chat.prompt()


def test_thinking_is_opened_on_request_and_dropped_from_history(tokenizer: PreTrainedTokenizerFast) -> None:
    messages = [{"role": "user", "content": "Add 1, 2."}]
    opened = render(tokenizer, messages, add_generation_prompt=True, enable_thinking=True)
    assert opened == "<|im_start|>user\nAdd 1, 2.<|im_end|>\n<|im_start|>assistant\n<think>\n"
    messages += [
        {"role": "assistant", "content": "<think>\n1 + 2 = 3.\n</think>\nThe total is 3."},
        {"role": "user", "content": "Thanks"},
    ]
    assert "<think>" not in render(tokenizer, messages, add_generation_prompt=True)


def test_thinking_task_opens_the_thought_in_its_prompt() -> None:
    chat = make_chat("thinking", 0, 60)
    assert chat.prompt().endswith("<|im_start|>assistant\n<think>\n")


def test_tools_calls_and_results_render_as_trained(tokenizer: PreTrainedTokenizerFast) -> None:
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Time in Oslo?"},
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "content": '{"time": "12:00"}'},
    ]
    text = render(tokenizer, messages, tools=[schema("get_time")], add_generation_prompt=True)
    assert text == (
        f"<|im_start|>system\n{tool_system(['get_time'], 'Be brief.')}<|im_end|>\n"
        "<|im_start|>user\nTime in Oslo?<|im_end|>\n"
        f"<|im_start|>assistant\n{tool_call('get_time', {'city': 'Oslo'})}<|im_end|>\n"
        '<|im_start|>user\n<tool_response>\n{"time": "12:00"}\n</tool_response><|im_end|>\n<|im_start|>assistant\n'
    )


def test_arguments_may_come_as_json_text(tokenizer: PreTrainedTokenizerFast) -> None:
    as_text = {"function": {"name": "get_time", "arguments": json.dumps(CALL["function"]["arguments"])}}
    both = [
        render(tokenizer, [{"role": "assistant", "content": None, "tool_calls": [call]}]) for call in (CALL, as_text)
    ]
    assert both[0] == both[1]


def test_final_message_can_be_continued(tokenizer: PreTrainedTokenizerFast) -> None:
    messages = [{"role": "user", "content": "Count."}, {"role": "assistant", "content": "1, 2"}]
    assert render(tokenizer, messages, continue_final_message=True).endswith("<|im_start|>assistant\n1, 2")
