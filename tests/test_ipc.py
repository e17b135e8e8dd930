"""Frames and messages: round trips in any chunking, large messages, and a reader that no bytes can hurt."""

from __future__ import annotations

import os
import random
import socket
import sys

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine import ipc
from engine.types import EngineRequest, EngineStats, SamplingParams, TokenLogprob, TokenOutput

REQUEST = EngineRequest(
    request_id="r1",
    prompt_token_ids=[1, 2, 3],
    sampling=SamplingParams(temperature=0.5, logit_bias={7: -1.5}, bad_words_ids=((1, 2), (3,)), seed=2**63 - 1),
    kv_policy={"name": "x", "budget": 4},
)
TO_ENGINE = [
    ipc.AddRequest(REQUEST),
    ipc.Abort("r1"),
    ipc.Abort("r1", 3),
    ipc.Control(4, "cache.pin", {"ids": [1, 2], "ttl_s": 1.5, "all": None}),
    ipc.Shutdown(),
]
FROM_ENGINE = [
    ipc.Phase("loading", "weights", 0.5),
    ipc.Outputs(
        [TokenOutput(request_id="r1", token_ids=[5], logprobs=[TokenLogprob(5, -0.1, 1, [5, 6], [-0.1, -2.0])])],
        EngineStats(num_running=1, step_seconds=[("decode", 0.1, 1, 1)]),
        7,
    ),
    ipc.Heartbeat(3, 0.25),
    ipc.Rejected("r2", "queue_full", "full", 5),
    ipc.ControlReply(4, {"pinned": 3}),
    ipc.ControlReply(5, code="invalid_value", message="no", param="ids"),
    ipc.Fatal("no memory", True),
]


def decode_all(decoder: ipc.Decoder[msgspec.Struct], data: bytes, sizes: list[int]) -> list[msgspec.Struct]:
    messages: list[msgspec.Struct] = []
    position = 0
    for size in [*sizes, len(data)]:
        messages += decoder.feed(data[position : position + size])
        position += size
    return messages


@settings(max_examples=50, deadline=None)
@given(
    order=st.lists(st.integers(0, len(TO_ENGINE) - 1), max_size=8),
    sizes=st.lists(st.integers(1, 40), max_size=60),
    max_frame_bytes=st.integers(1, 64),
)
def test_messages_arrive_whole_however_they_are_cut(order: list[int], sizes: list[int], max_frame_bytes: int) -> None:
    messages = [TO_ENGINE[index] for index in order]
    data = b"".join(ipc.encode(message, max_frame_bytes=max_frame_bytes) for message in messages)
    assert decode_all(ipc.Decoder(ipc.ToEngine), data, sizes) == messages


@pytest.mark.parametrize("message", FROM_ENGINE, ids=lambda message: type(message).__name__)
def test_every_message_of_the_engine_round_trips(message: msgspec.Struct) -> None:
    assert list(ipc.Decoder(ipc.FromEngine).feed(ipc.encode(message))) == [message]


def test_a_message_larger_than_a_frame_is_split_and_put_together() -> None:
    ids = list(range(100_000, 100_000 + 4_000_000))
    data = ipc.encode(ipc.AddRequest(msgspec.structs.replace(REQUEST, prompt_token_ids=ids)))
    assert len(data) > ipc.MAX_FRAME_BYTES
    (message,) = decode_all(ipc.Decoder(ipc.ToEngine), data, [ipc.MAX_FRAME_BYTES, 100])
    assert isinstance(message, ipc.AddRequest)
    assert message.request.prompt_token_ids == ids


def test_messages_over_the_limit_are_refused_on_both_sides(monkeypatch: pytest.MonkeyPatch) -> None:
    data = ipc.encode(ipc.Abort("x" * 1000), max_frame_bytes=100)
    monkeypatch.setattr(ipc, "MAX_MESSAGE_BYTES", 500)
    with pytest.raises(ipc.ProtocolError, match="500"):
        ipc.encode(ipc.Abort("x" * 1000))
    with pytest.raises(ipc.ProtocolError, match="500"):
        list(ipc.Decoder(ipc.ToEngine).feed(data))


@pytest.mark.parametrize(
    "data",
    [
        ipc.HEADER.pack(2, 0, 0),  # version
        ipc.HEADER.pack(ipc.VERSION, 4, 0),  # flags
        ipc.HEADER.pack(ipc.VERSION, 0, ipc.MAX_FRAME_BYTES + 1),
        ipc.HEADER.pack(ipc.VERSION, 0, 0),  # no message
        ipc.HEADER.pack(ipc.VERSION, 0, 1) + b"\xc1",  # a byte that msgpack does not use
        ipc.HEADER.pack(ipc.VERSION, 0, 50_000) + b"\x91" * 50_000,  # nesting
        ipc.encode(FROM_ENGINE[0]),  # the wrong direction
        b"GET / HTTP/1.1\r\n\r\n",
        b"\x80\x04\x95" + b"cposix\nsystem\n" * 3,  # a pickle
    ],
)
def test_what_is_no_message_is_a_protocol_error(data: bytes) -> None:
    with pytest.raises(ipc.ProtocolError):
        list(ipc.Decoder(ipc.ToEngine).feed(data))


def fuzz(num_frames: int, seed: int) -> None:
    """Random payloads in valid frames, and valid messages with flipped bits."""
    rng = random.Random(seed)
    valid = [ipc.encode(message) for message in (*TO_ENGINE, *FROM_ENGINE)]
    for _ in range(num_frames):
        if rng.random() < 0.5:
            payload = rng.randbytes(rng.randrange(40))
            data = ipc.HEADER.pack(ipc.VERSION, rng.randrange(2), len(payload)) + payload
        else:
            mutable = bytearray(rng.choice(valid))
            for _ in range(rng.randrange(1, 4)):
                mutable[rng.randrange(len(mutable))] ^= 1 << rng.randrange(8)
            data = bytes(mutable)
        for message_type in (ipc.ToEngine, ipc.FromEngine):
            decoder: ipc.Decoder[msgspec.Struct] = ipc.Decoder(message_type)
            try:
                for message in decoder.feed(data):
                    assert isinstance(message, msgspec.Struct)
            except ipc.ProtocolError:
                continue


def test_random_frames_neither_crash_the_reader_nor_run_anything() -> None:
    seen: list[str] = []
    armed = True

    def watch(event: str, _: object) -> None:
        if armed and event in ("pickle.find_class", "exec", "compile", "os.system", "subprocess.Popen", "import"):
            seen.append(event)

    sys.addaudithook(watch)
    fuzz(3000, seed=1)
    armed = False
    assert seen == []


@pytest.mark.slow
def test_a_hundred_thousand_random_frames_do_not_crash_the_reader() -> None:
    fuzz(100_000, seed=2)


def test_the_other_end_of_a_socket_is_known_by_its_user() -> None:
    here, there = socket.socketpair()
    with here, there:
        assert ipc.peer_uid(here) == os.getuid()
