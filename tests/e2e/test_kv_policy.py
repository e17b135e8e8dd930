"""Cache policies over HTTP, on a real server process: chosen per request, reported, refused with a reason."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest

TEXT = " ".join(f"Item {i} lies in room {i * 7 % 31}." for i in range(30))


def ask(server_url: str, **fields: Any) -> httpx.Response:
    body = {"model": "mimir", "prompt": TEXT, "max_tokens": 12, "temperature": 0, "ignore_eos": True, **fields}
    return httpx.post(f"{server_url}/v1/completions", json=body, timeout=60)


@pytest.mark.parametrize("name", ["snapkv", "h2o", "tova", "streaming_llm", "a2sf", "ems", "random", "pyramidkv"])
def test_a_request_chooses_its_policy_and_is_told_what_it_took(server_url: str, name: str) -> None:
    options = {"window": 8} if name in ("snapkv", "ems", "pyramidkv") else {}
    answer = ask(server_url, kv_policy={"name": name, "budget": 64, **options})
    assert answer.status_code == 200, answer.text
    usage = answer.json()["usage"]
    kv = usage["kv"]
    assert kv["policy"] == name
    assert kv["peak_slots"] >= usage["prompt_tokens"] > 200
    assert kv["steady_slots"] < 140
    assert kv["evicted_tokens"] >= usage["prompt_tokens"] - 140
    assert kv["released_bytes"] > kv["private_bytes"] > 0
    assert kv["bits_per_value"] == 32
    assert usage["completion_tokens"] == 12


def test_a_policy_with_a_format_is_reported_as_both(server_url: str) -> None:
    kv = ask(server_url, kv_policy={"name": "snapkv", "budget": 64, "format": "int8"}).json()["usage"]["kv"]
    assert (kv["policy"], kv["format"], kv["bits_per_value"], kv["rungs"]) == ("snapkv", "int8", 8, [])
    assert kv["evicted_tokens"] > 100


def test_a_name_alone_is_a_choice_too(server_url: str) -> None:
    assert ask(server_url, kv_policy="snapkv").json()["usage"]["kv"]["policy"] == "snapkv"
    assert "kv" not in ask(server_url, kv_policy="full").json()["usage"]
    assert "kv" not in ask(server_url).json()["usage"]


def test_a_budget_that_holds_everything_gives_the_same_text(server_url: str) -> None:
    whole = ask(server_url).json()["choices"]
    for name in ("snapkv", "h2o", "keyformer", "raas"):
        assert ask(server_url, kv_policy={"name": name, "budget": 4000}).json()["choices"] == whole


def test_a_stream_ends_with_the_same_report(server_url: str) -> None:
    body = {
        "model": "mimir",
        "messages": [{"role": "user", "content": TEXT}],
        "max_tokens": 8,
        "stream": True,
        "stream_options": {"include_usage": True},
        "kv_policy": {"name": "h2o", "budget": 64},
    }
    with httpx.stream("POST", f"{server_url}/v1/chat/completions", json=body, timeout=60) as answer:
        assert answer.status_code == 200
        lines = [line for line in answer.iter_lines() if line.startswith("data: {")]
    kv = json.loads(lines[-1].removeprefix("data: "))["usage"]["kv"]
    assert kv["policy"] == "h2o"
    assert kv["evicted_tokens"] > 100


@pytest.mark.parametrize(
    ("choice", "words"),
    [
        ({"name": "squeeze"}, ("squeeze", "snapkv", "h2o", "quest", "kivi")),
        ({"name": "snapkv", "budget": 0}, ("budget", "at least 1")),
        ({"name": "snapkv", "budget": 10, "ratio": 0.5}, ("budget", "ratio")),
        ({"name": "snapkv", "colour": "red"}, ("colour", "window")),
        ({"name": "h2o", "format": "int8"}, ("h2o", "set period to 0")),
        ({"budget": 10}, ("name",)),
        (17, ("name",)),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_what_cannot_be_honoured_is_a_400_that_says_why(
    server_url: str, choice: Any, words: tuple[str, ...], stream: bool
) -> None:
    answer = ask(server_url, kv_policy=choice, stream=stream)
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert error["param"].startswith("kv_policy")
    assert all(word in error["message"] for word in words), error


def test_metrics_count_what_policies_did(server_url: str) -> None:
    ask(server_url, kv_policy={"name": "tova", "budget": 64})
    for _ in range(50):
        text = httpx.get(f"{server_url}/metrics").text
        lines = [line for line in text.splitlines() if 'policy="tova"' in line]
        counts = {line.split("{")[0]: float(line.rsplit(" ", 1)[1]) for line in lines}
        if counts.get("kvasir_kv_evicted_tokens_total", 0) > 0:
            break
    assert counts["kvasir_requests_compressed_total"] >= 1
    assert counts["kvasir_kv_compactions_total"] >= 1
    assert counts["kvasir_kv_evicted_tokens_total"] > 100
    assert counts["kvasir_kv_bytes_saved_total"] > 0
