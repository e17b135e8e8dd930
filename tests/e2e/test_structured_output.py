"""Structured output over HTTP with the real server: valid, streamed, refused in time, resumed after a crash."""

from __future__ import annotations

import concurrent.futures
import itertools
import json
import os
import re
import signal
import time
from pathlib import Path
from typing import Any

import httpx
import jsonschema
import openai
import pytest

from loadtest.own_server import own_server
from tests.e2e.test_server_process import engine_pid

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 10},
        "size": {"enum": ["small", "medium", "large"]},
        "count": {"type": "integer", "minimum": 1, "maximum": 99},
    },
    "required": ["name", "size", "count"],
    "additionalProperties": False,
}
FORMAT = {"type": "json_schema", "json_schema": {"name": "thing", "schema": SCHEMA, "strict": True}}
QUESTION = [{"role": "user", "content": "Describe a thing."}]
DEEP = "[" * 10_000 + "]" * 10_000
HOSTILE = {
    "bad schema": (
        {"response_format": {**FORMAT, "json_schema": {"name": "x", "schema": {"type": "strin"}}}},
        "response_format",
    ),
    "unsupported keyword": ({"guided_json": {"not": {}}}, "guided_json"),
    "catastrophic repeats": ({"regex": "((a{1,999}){1,999}){1,9999}"}, "regex"),
    "unclosed": ({"guided_regex": "(a+)+("}, "guided_regex"),
    "deep schema text": ({"json_schema": DEEP}, "json_schema"),
    "too large": ({"grammar": "start: " + "a" * 70_000}, "grammar"),
}


@pytest.fixture(scope="module")
def client(server_url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server_url}/v1", api_key="not-needed", max_retries=0, timeout=60)


def test_a_schema_holds_and_a_stream_is_the_whole_answer(client: openai.OpenAI) -> None:
    for extra in ({}, {"structured_outputs": {"json": SCHEMA, "disable_any_whitespace": True}}):
        options: dict[str, Any] = {
            "model": "mimir",
            "messages": QUESTION,
            "temperature": 1.0,
            "seed": 2,
            "max_tokens": 1000,  # more than the schema and 64 spaces in each of its gaps: any model ends
        }
        options |= {"extra_body": extra} if extra else {"response_format": FORMAT}
        whole = client.chat.completions.create(**options)
        text = whole.choices[0].message.content
        assert whole.choices[0].finish_reason == "stop"
        jsonschema.validate(json.loads(text), SCHEMA)
        pieces = list(client.chat.completions.create(stream=True, stream_options={"include_usage": True}, **options))
        assert "".join(piece.choices[0].delta.content or "" for piece in pieces if piece.choices) == text
        assert pieces[-1].usage.completion_tokens == whole.usage.completion_tokens


def test_choices_logprobs_and_stop_strings_work_with_a_constraint(client: openai.OpenAI) -> None:
    answer = client.completions.create(
        model="mimir",
        prompt="A number:",
        n=3,
        temperature=1.5,
        seed=1,
        max_tokens=40,
        logprobs=1,
        extra_body={"regex": "[0-9]{3}(-[0-9]{3}){2}"},
    )
    for choice in answer.choices:
        assert re.fullmatch("[0-9]{3}(-[0-9]{3}){2}", choice.text)
        assert "".join(choice.logprobs.tokens).startswith(choice.text)
    stopped = client.completions.create(
        model="mimir", prompt="A number:", max_tokens=40, stop=["-"], extra_body={"regex": "[0-9]{3}(-[0-9]{3}){2}"}
    )
    assert re.fullmatch("[0-9]{3}", stopped.choices[0].text)
    cut = client.completions.create(model="mimir", prompt="x", max_tokens=2, extra_body={"regex": "[0-9]{9}"})
    assert (cut.choices[0].finish_reason, cut.usage.completion_tokens) == ("length", 2)


def test_hostile_constraints_are_refused_in_time_while_other_streams_keep_their_pace(server_url: str) -> None:
    def gaps() -> list[float]:
        body = {"prompt": "Count:", "max_tokens": 900, "ignore_eos": True, "stream": True, "temperature": 0}
        with httpx.stream("POST", f"{server_url}/v1/completions", json=body, timeout=60) as stream:
            seen = [time.monotonic() for line in stream.iter_lines() if line.startswith("data: {")]
        return [later - earlier for earlier, later in itertools.pairwise(seen)]

    url = f"{server_url}/v1/chat/completions"
    httpx.post(url, json={"messages": QUESTION, "max_tokens": 4, "regex": "a"}, timeout=60)  # the child is there
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        streaming = pool.submit(gaps)
        slowest = {}
        for name, (fields, param) in HOSTILE.items():
            started = time.monotonic()
            response = httpx.post(url, json={"messages": QUESTION, **fields}, timeout=30)
            slowest[name] = time.monotonic() - started
            assert response.status_code == 400, (name, response.text)
            error = response.json()["error"]
            assert error["param"].startswith(param), name
            assert len(response.content) < 4096
        raw = b'{"messages": [{"role": "user", "content": "x"}], "guided_json": %b}' % DEEP.encode()
        started = time.monotonic()
        headers = {"content-type": "application/json"}
        assert httpx.post(url, content=raw, headers=headers, timeout=30).status_code == 400
        slowest["deep body"] = time.monotonic() - started
        found = streaming.result()
    assert max(slowest.values()) < 1.0, slowest
    assert len(found) > 50
    assert max(found) < 1.0


@pytest.mark.slow
def test_a_constrained_stream_survives_the_engine_process(server_url: str, tmp_path: Path) -> None:
    body = {
        "messages": QUESTION,
        "response_format": {
            "type": "json_schema",
            "json_schema": {"name": "x", "schema": {"type": "array", "items": SCHEMA, "minItems": 4, "maxItems": 4}},
        },
        "max_tokens": 1500,
        "temperature": 0.0,
    }
    expected = httpx.post(f"{server_url}/v1/chat/completions", json=body, timeout=60).json()
    flags = ("--threads", "1", "--max-num-seqs", "8", "--num-blocks", "512")
    text = ""
    with own_server(flags, log=tmp_path / "server.log") as url:
        victim: int | None = engine_pid(url)
        with httpx.stream("POST", f"{url}/v1/chat/completions", json={**body, "stream": True}, timeout=60) as stream:
            for line in stream.iter_lines():
                if line.startswith("data: {"):
                    choice = json.loads(line[6:])["choices"][0]
                    text += choice["delta"].get("content") or ""
                    if text and victim is not None:
                        os.kill(victim, signal.SIGKILL)
                        victim = None
    assert text == expected["choices"][0]["message"]["content"]
    assert len(json.loads(text)) == 4
