"""Scenes are decided by their seed, keep to their lengths, and grow by what the server really said."""

from __future__ import annotations

import itertools
import json
from typing import Any

import pytest

from loadtest.client import Answer, Request
from loadtest.scenes import SCENES, Sizes, conversations, mean_turns, num_chars
from loadtest.workloads import Conversation

SIZES = Sizes(prompt_tokens=600, output_tokens=32, seed=4)


def played(conversation: Conversation, text: str = "an answer") -> list[Request]:
    requests = [next(conversation.turns)]
    requests += [conversation.turns.send(Answer(text)) for _ in range(conversation.num_turns - 1)]
    return requests


def first(name: str, count: int, sizes: Sizes = SIZES) -> list[list[Request]]:
    return [played(conversation) for conversation in itertools.islice(conversations(name, sizes), count)]


@pytest.mark.parametrize("name", SCENES)
def test_the_seed_decides_a_scene(name: str) -> None:
    assert first(name, 3) == first(name, 3)
    assert first(name, 3) != first(name, 3, Sizes(prompt_tokens=600, output_tokens=32, seed=5))
    assert len({repr(requests) for requests in first(name, 5)}) == 5


@pytest.mark.parametrize("name", SCENES)
def test_no_prompt_is_longer_than_asked_for(name: str) -> None:
    answer_chars = int(SIZES.output_tokens * SIZES.chars_per_token)
    for conversation in itertools.islice(conversations(name, SIZES), 12):
        for request in played(conversation, "x" * answer_chars):
            own = num_chars(request) - len(json.dumps(request.fields.get("tools", "")))
            assert own <= SIZES.prompt_tokens * SIZES.chars_per_token * 1.3, name  # whole sentences
            assert request.max_tokens == SIZES.output_tokens


def test_chats_have_turns_whose_history_is_what_was_answered() -> None:
    for requests in first("chat", 10):
        for number, request in enumerate(requests):
            assert request.messages is not None
            assert [message["role"] for message in request.messages[1:]] == ["user", "assistant"] * number + ["user"]
            assert all(m["content"] == "an answer" for m in request.messages if m["role"] == "assistant")
    assert 1.5 < mean_turns(conversations("chat", SIZES)) < 6


def test_a_shared_system_prompt_is_the_same_for_all_and_other_scenes_share_none() -> None:
    assert len({_head(requests[0]) for requests in first("shared-system", 8)}) == 1
    assert len({_head(requests[0]) for requests in first("chat", 8)}) == 8


def test_documents_repeat_between_questions() -> None:
    shown = [set(_last(requests[0]).split("\n\n")[:-1]) for requests in first("rag", 8)]
    assert any(one & other for one, other in itertools.combinations(shown, 2))


def test_an_agent_answers_calls_with_results_and_talk_with_a_remark() -> None:
    conversation = next(conversations("agent", SIZES))
    assert conversation.num_turns > 1
    assert next(conversation.turns).fields["tools"]
    call = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
    called = conversation.turns.send(Answer("", [call]))
    assert called.messages is not None
    assert called.messages[-2]["tool_calls"] == [call]
    assert (called.messages[-1]["role"], called.messages[-1]["tool_call_id"]) == ("tool", "c1")
    cut: dict[str, Any] = {"id": "c2", "type": "function", "function": {"name": "add", "arguments": '{"a'}}
    talked = conversation.turns.send(Answer("well", [cut]))
    assert talked.messages is not None
    assert [message["role"] for message in talked.messages[-2:]] == ["assistant", "user"]


def test_an_edit_begins_to_write_its_source_again() -> None:
    for (request,) in first("edit", 5):
        assert isinstance(request.prompt, str)
        before, after = request.prompt.removeprefix("# before\n").split("\n\n# after\n")
        same = sum(one == other for one, other in zip(before.split(), after.split(), strict=False))
        assert same >= 0.5 * len(after.split()[:-1])


def test_lengths_follow_the_context_and_what_does_not_fit_is_refused() -> None:
    scene = SCENES["rag"]
    small, large = scene.sizes(2048), scene.sizes(1_000_000)
    assert small.prompt_tokens + small.output_tokens <= 2048
    assert large.prompt_tokens == scene.longest_prompt
    assert scene.sizes(2048, prompt_tokens=100, output_tokens=7).output_tokens == 7
    with pytest.raises(ValueError, match="exceed the context of 2048"):
        scene.sizes(2048, prompt_tokens=2040, output_tokens=64)


def _head(request: Request) -> str:
    assert request.messages is not None
    return str(request.messages[0]["content"])


def _last(request: Request) -> str:
    assert request.messages is not None
    return str(request.messages[-1]["content"])
