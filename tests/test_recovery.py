"""Recovery: who runs again after a crash, and who is given up."""

from __future__ import annotations

from pathlib import Path

import pytest

from engine.errors import EngineDead
from engine.faults import Faults
from engine.recovery import Recovery
from engine.stream import RequestStream
from engine.types import EngineRequest, GenerationRequest, SamplingParams, TokenOutput
from tests.text import vocabularies


def make_streams(tmp_path: Path, *names: str) -> list[RequestStream]:
    tokenizer = vocabularies.load(tmp_path, "byte_level")
    params = SamplingParams(max_tokens=10)
    return [
        RequestStream(
            tokenizer,
            GenerationRequest(prompt=[1], sampling=params),
            EngineRequest(request_id=name, prompt_token_ids=[1], sampling=params),
            eos_token_ids=frozenset(),
            faults=Faults({}),
            abort=lambda request_id, choice: None,
        )
        for name in names
    ]


def progress(stream: RequestStream, *token_ids: int) -> None:
    stream.push(TokenOutput(request_id=stream.request.request_id, token_ids=list(token_ids), num_cached_tokens=0))


def test_after_one_crash_all_run_again_together(tmp_path: Path) -> None:
    sent: list[str] = []
    recovery = Recovery(lambda stream: sent.append(stream.request.request_id))
    streams = make_streams(tmp_path, "a", "b", "c")
    recovery.lost(streams)
    recovery.ready(streams)
    assert sent == ["a", "b", "c"]


def test_after_two_crashes_suspects_run_one_at_a_time_and_the_culprit_ends_alone(tmp_path: Path) -> None:
    sent: list[str] = []
    recovery = Recovery(lambda stream: sent.append(stream.request.request_id))
    streams = make_streams(tmp_path, "a", "b", "c")
    a, b, c = streams
    progress(a, 7)
    for _ in range(2):
        recovery.lost(streams)
        sent.clear()
        recovery.ready(streams)
    assert sent == ["a"]
    progress(a, 7)
    recovery.noticed(a)
    assert sent == ["a"], "tokens that were known before prove nothing"
    progress(a, 8)
    recovery.noticed(a)
    assert sent == ["a", "b"]
    recovery.lost(streams)
    assert b.is_done
    assert not a.is_done
    sent.clear()
    recovery.ready([a, c])
    assert sent == ["a", "c"], "the one that passed has company, the other suspect is on trial"
    c.close()
    recovery.noticed(c)
    recovery.lost([a])
    assert not a.is_done, "closing ended the trial, so nobody is blamed"


def test_tokens_that_differ_after_a_restart_end_the_request(tmp_path: Path) -> None:
    for replayed in ([7, 9], [9]):
        (stream,) = make_streams(tmp_path, "a")
        progress(stream, 7, 8)
        stream.restart()
        progress(stream, *replayed)
        assert stream.is_done
        output = stream.take()
        assert output is not None
        assert output.token_ids == [7, 8]
        with pytest.raises(EngineDead, match="could not be resumed"):
            stream.take()


def test_replayed_tokens_are_neither_shown_nor_counted_twice(tmp_path: Path) -> None:
    (stream,) = make_streams(tmp_path, "a")
    progress(stream, 300)
    progress(stream, 301, 302)
    first = stream.take()
    stream.restart()
    for token_ids in ([300, 301], [302, 303], [304]):
        progress(stream, *token_ids)
    second = stream.take()
    assert first is not None
    assert second is not None
    assert (first.token_ids, second.token_ids) == ([300, 301, 302], [303, 304])
    assert second.num_output_tokens == 5
