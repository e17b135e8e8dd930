"""Speculation over HTTP: asked for, refused, reported; the answers are those without it."""

from __future__ import annotations

import json
import time
from typing import Any

import httpx
import pytest

TEXT = "Say the days again and again: Monday, Tuesday, Wednesday, Thursday, Friday. Monday, Tuesday, Wednesday,"


def complete(url: str, **fields: Any) -> dict[str, Any]:
    body = {"model": "mimir", "prompt": TEXT, "max_tokens": 48, "temperature": 0, "seed": 1, **fields}
    answer = httpx.post(f"{url}/v1/completions", json=body, timeout=60)
    assert answer.status_code == 200, answer.text
    return answer.json()  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"temperature": 1.0, "n": 3, "logprobs": 2},
        {"repetition_penalty": 1.2, "stop": ["day, F", "esd"]},
        {"response_format": {"type": "json_object"}, "max_tokens": 30},
    ],
)
def test_answers_are_the_same_and_usage_tells_of_it(server_url: str, fields: dict[str, Any]) -> None:
    plain = complete(server_url, **fields)
    fast = complete(server_url, speculative={"drafters": ["ngram", "suffix"], "max_nodes": 6}, **fields)
    assert fast["choices"] == plain["choices"]
    assert "speculative" not in plain["usage"]
    usage = fast["usage"].pop("speculative")
    assert fast["usage"] == plain["usage"] | {"prompt_tokens_details": fast["usage"]["prompt_tokens_details"]}
    assert usage["accepted"] <= usage["drafted"]
    assert usage["accepted"] == sum(source["accepted"] for source in usage["by_source"].values())
    assert set(usage["by_source"]) <= {"ngram", "suffix"}


def test_a_stream_tells_with_its_usage(server_url: str) -> None:
    body = {
        "model": "mimir",
        "messages": [{"role": "user", "content": TEXT}],
        "max_tokens": 40,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    texts = []
    for speculative in (None, "ngram"):
        with httpx.stream(
            "POST", f"{server_url}/v1/chat/completions", json=body | {"speculative": speculative}, timeout=60
        ) as answer:
            events = [json.loads(line[6:]) for line in answer.iter_lines() if line.startswith("data: {")]
        texts.append("".join(c["delta"].get("content") or "" for e in events for c in e["choices"]))
    assert texts[0] == texts[1]
    assert set(events[-1]["usage"]["speculative"]) == {"steps", "drafted", "accepted", "by_source"}


@pytest.mark.parametrize("off", [False, {"off": True}, {"off": True, "drafters": ["ngram"]}])
def test_it_can_be_turned_off(server_url: str, off: Any) -> None:
    assert "speculative" not in complete(server_url, speculative=off)["usage"]


@pytest.mark.parametrize(
    ("speculative", "text"),
    [
        ({"drafters": ["crystal_ball"]}, "crystal_ball"),
        ({"drafters": "crystal_ball"}, "choose from aded, "),
        ({"drafters": []}, "a name or a list of names"),
        ({"max_nodes": 4}, "needs drafters"),
        ({"drafters": "ngram", "max_nodes": 0}, "from 1 to 64"),
        ({"drafters": "ngram", "max_nodes": 65}, "from 1 to 64"),
        ({"drafters": "ngram", "max_nodes": True}, "from 1 to 64"),
        ({"drafters": "ngram", "verifier": "dice"}, "verifier must be one of walk, max_accept"),
        ({"drafters": "ngram", "depth": 3}, "no field 'depth'"),
        ({"drafters": "ngram", "off": "yes"}, "true or false"),
        (True, "must be"),
        (7, "must be"),
    ],
)
def test_what_cannot_be_is_refused_with_the_remedy(server_url: str, speculative: Any, text: str) -> None:
    body = {"model": "mimir", "prompt": "a", "max_tokens": 2, "speculative": speculative}
    answer = httpx.post(f"{server_url}/v1/completions", json=body, timeout=60)
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert error["param"] == "speculative"
    assert text in error["message"]


def test_metrics_count_what_was_checked(server_url: str) -> None:
    def counted() -> tuple[float, float]:
        """Steps with a draft, and tokens that n-grams guessed right, as /metrics has them."""
        text = httpx.get(f"{server_url}/metrics", timeout=60).text
        values = dict(line.rsplit(" ", 1) for line in text.splitlines() if line.startswith("kvasir_spec_"))
        steps = [float(value) for name, value in values.items() if name.startswith("kvasir_spec_steps_total")]
        accepted = [
            float(value)
            for name, value in values.items()
            if name.startswith("kvasir_spec_accepted_tokens_total") and 'drafter="ngram"' in name
        ]
        return sum(steps), sum(accepted)

    before = counted()
    usage = complete(server_url, speculative="ngram")["usage"]["speculative"]
    expected = before[0] + usage["steps"], before[1] + usage["accepted"]
    deadline = time.monotonic() + 10  # the core reports now and then
    while counted() != expected and time.monotonic() < deadline:
        time.sleep(0.05)
    assert counted() == expected
