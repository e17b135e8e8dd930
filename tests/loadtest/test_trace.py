"""A trace is replayed as it is written, and a bad line is refused with its number, its field and a remedy."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from loadtest import trace
from loadtest.trace import TraceError

GOOD: dict[str, Any] = {"timestamp": 10, "prompt": "hello", "max_tokens": 3}


def written(folder: Path, *lines: Any) -> Path:
    path = folder / "trace.jsonl"
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    return path


def test_every_kind_of_content_is_sent_as_it_stands(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "hi"}]
    lines = trace.read(
        written(
            tmp_path,
            GOOD,
            "",
            {"timestamp": 10.5, "messages": messages, "max_tokens": 4, "fields": {"top_k": 1}},
            {"timestamp": 11, "prompt": [5, 6], "max_tokens": 5},
            {"timestamp": 12, "prompt_tokens": 9, "max_tokens": 6},
        ),
        vocab_size=500,
    )
    requests = [line.request for line in lines]
    assert [line.timestamp for line in lines] == [10.0, 10.5, 11.0, 12.0]
    assert [request.max_tokens for request in requests] == [3, 4, 5, 6]
    assert (requests[0].prompt, requests[1].messages, requests[2].prompt) == ("hello", messages, [5, 6])
    assert requests[1].fields == {"top_k": 1}
    assert isinstance(requests[3].prompt, list)
    assert len(requests[3].prompt) == 9
    assert len(list(trace.conversations(lines))) == 4


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", ["line 2", "no JSON"]),
        ("[1]", ["line 2", "list instead of an object"]),
        ({**GOOD, "user": "x"}, ["line 2", "'user'", "known: timestamp"]),
        ({**GOOD, "prompt_tokens": 4}, ["line 2", "prompt and prompt_tokens", "exactly one"]),
        ({"timestamp": 11, "max_tokens": 3}, ["line 2", "no content"]),
        ({**GOOD, "timestamp": "soon"}, ["line 2", "timestamp", "'soon'", "seconds"]),
        ({**GOOD, "timestamp": 9}, ["line 2", "9", "before", "sort"]),
        ({**GOOD, "max_tokens": 0}, ["line 2", "max_tokens", "at least 1"]),
        ({**GOOD, "max_tokens": True}, ["line 2", "max_tokens", "True"]),
        ({**GOOD, "prompt": [1, "a"]}, ["line 2", "prompt", "token ids"]),
        ({**GOOD, "prompt": []}, ["line 2", "prompt"]),
        ({**GOOD, "fields": 3}, ["line 2", "fields", "object"]),
        ({"timestamp": 11, "messages": ["hi"], "max_tokens": 3}, ["line 2", "messages", "role and content"]),
        ({"timestamp": 11, "prompt_tokens": -1, "max_tokens": 3}, ["line 2", "prompt_tokens", "-1"]),
    ],
)
def test_a_bad_line_is_refused(tmp_path: Path, line: Any, words: list[str]) -> None:
    with pytest.raises(TraceError) as caught:
        trace.read(written(tmp_path, GOOD, line), vocab_size=500)
    assert all(word in str(caught.value) for word in words)


def test_a_trace_without_lines_or_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match="has no line"):
        trace.read(written(tmp_path, ""), vocab_size=500)
    with pytest.raises(TraceError, match="cannot read"):
        trace.read(tmp_path / "none.jsonl", vocab_size=500)
