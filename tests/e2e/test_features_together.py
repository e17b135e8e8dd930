"""Every feature of the API with speculation and a compressed cache, on a real server: speculation changes nothing."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

TEXT = " ".join(f"Item {i} lies in room {i * 7 % 31}." for i in range(24)) + " Item 3 lies in"
SCHEMA = {
    "type": "object",
    "properties": {"room": {"type": "integer"}, "name": {"type": "string", "maxLength": 12}},
    "required": ["room", "name"],
    "additionalProperties": False,
}
TOOL = {"type": "function", "function": {"name": "find_item", "description": "Finds it", "parameters": SCHEMA}}
COMPLETIONS: dict[str, dict[str, Any]] = {
    "plain": {"ignore_eos": True},
    "seeded": {"temperature": 0.9, "top_p": 0.95, "seed": 11, "ignore_eos": True},
    "choices": {"temperature": 0.8, "seed": 3, "n": 3, "ignore_eos": True},
    "logprobs": {"logprobs": 3, "ignore_eos": True},
    "stop": {"stop": [" 2", "room 1"]},
    "penalties": {"repetition_penalty": 1.3, "frequency_penalty": 0.5, "ignore_eos": True},
    "bias": {"logit_bias": {"300": -100, "301": 5}, "ignore_eos": True},
    "regex": {"guided_regex": r" room [0-9]{1,2}\. Item [0-9] lies in room [0-9]"},
}
CHATS: dict[str, dict[str, Any]] = {
    "schema": {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": SCHEMA}}},
    "tool": {"tools": [TOOL], "tool_choice": "required"},
    "thinking": {"chat_template_kwargs": {"enable_thinking": True}},
}
POLICIES: list[dict[str, Any] | None] = [
    None,
    {"name": "snapkv", "budget": 64, "window": 8},
    {"name": "h2o", "budget": 64},
    {"name": "streaming_llm", "budget": 64},
    {"name": "pyramidkv", "budget": 64, "window": 8},
    {"name": "int8"},
]
NAMES = ["full" if policy is None else policy["name"] for policy in POLICIES]
SPECULATIVE = {"drafters": ["ngram", "goose"], "max_nodes": 8}


def ask(server_url: str, path: str, **fields: Any) -> dict[str, Any]:
    answer = httpx.post(f"{server_url}{path}", json={"model": "mimir", "temperature": 0, **fields}, timeout=60)
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


def without_ids(choices: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Calls have random ids."""
    for choice in choices:
        for call in choice.get("message", {}).get("tool_calls") or []:
            call["id"] = ""
    return choices


@pytest.mark.parametrize("policy", POLICIES, ids=NAMES)
@pytest.mark.parametrize("feature", sorted(COMPLETIONS))
def test_a_completion_is_the_same_with_speculation(
    server_url: str, feature: str, policy: dict[str, Any] | None
) -> None:
    fields = {"prompt": TEXT, "max_tokens": 24, **COMPLETIONS[feature]}
    if policy is not None:
        fields["kv_policy"] = policy
    expected = ask(server_url, "/v1/completions", **fields, speculative={"off": True})
    found = ask(server_url, "/v1/completions", **fields, speculative=SPECULATIVE)
    assert found["choices"] == expected["choices"]
    assert ("kv" in found["usage"]) == (policy is not None)


@pytest.mark.parametrize("policy", POLICIES, ids=NAMES)
@pytest.mark.parametrize("feature", sorted(CHATS))
def test_a_chat_is_the_same_with_speculation(server_url: str, feature: str, policy: dict[str, Any] | None) -> None:
    messages = [{"role": "user", "content": f"{TEXT} which room? Answer shortly."}]
    fields = {"messages": messages, "max_tokens": 60, **CHATS[feature]}
    if policy is not None:
        fields["kv_policy"] = policy
    expected = ask(server_url, "/v1/chat/completions", **fields, speculative={"off": True})
    found = ask(server_url, "/v1/chat/completions", **fields, speculative=SPECULATIVE)
    assert without_ids(found["choices"]) == without_ids(expected["choices"])
