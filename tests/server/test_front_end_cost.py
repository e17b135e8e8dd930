"""What a request and a streamed token cost the front end, in calls of Python functions: a count, so no clock is needed.

`python -m loadtest.front_end` measures the same path in seconds, over real sockets and with a real engine process.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import uvicorn
from uvicorn.server import ServerState

from engine import ipc
from engine.client import AsyncEngine
from engine.config import Config, ModelConfig
from engine.types import ModelInfo, TokenOutput
from server.app import create_app, make_context
from server.http_protocol import protocol_class
from tests.server.support import CHAT, eventually

FIRST_TOKEN = 300
MAX_CALLS_PER_TOKEN = 75  # resumed frames of the waiting application count too: about 12 of them
MAX_CALLS_PER_REQUEST = 1200


class Transport(asyncio.Transport):
    """Takes everything at once."""

    def __init__(self) -> None:
        super().__init__()
        self.written: list[bytes] = []

    def write(self, data: Any) -> None:
        self.written.append(bytes(data))

    def is_closing(self) -> bool:
        return False

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return {"peername": ("127.0.0.1", 1), "sockname": ("127.0.0.1", 2)}.get(name, default)

    def get_write_buffer_size(self) -> int:
        return 0

    def close(self) -> None: ...

    def abort(self) -> None: ...

    def pause_reading(self) -> None: ...

    def resume_reading(self) -> None: ...


class FrontEnd:
    """Everything between the engine's socket and the clients', without the sockets."""

    def __init__(self) -> None:
        config = Config(model=ModelConfig(served_model_name=("stub",)))
        self.engine = AsyncEngine(config)
        self.sent: list[ipc.AddRequest] = []
        self.engine._supervisor.send = self._send  # type: ignore[method-assign]
        context = make_context(self.engine, config)
        app: Any = create_app(self.engine, config, context)
        self.settings = uvicorn.Config(app, http=protocol_class(config.limits), log_config=None, access_log=False)
        self.settings.load()
        self.transports: list[Transport] = []

    async def start(self) -> None:
        await self.engine._load_text()
        info = ModelInfo(
            architecture="Stub",
            dtype="float32",
            device="cpu",
            vocab_size=4096,
            logits_size=4096,
            max_model_len=10_000,
            num_layers=1,
            block_size=16,
            num_blocks=10_000,
            kv_cache_bytes=0,
            weight_bytes=0,
            eos_token_ids=[4],
        )
        self.engine.engine_ready(ipc.Ready(info))

    async def connect(self, num_streams: int) -> None:
        body = json.dumps(
            {"messages": [{"role": "user", "content": "hi"}], "stream": True, "max_tokens": 9000}
        ).encode()
        head = (
            f"POST {CHAT} HTTP/1.1\r\nHost: t\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        for _ in range(num_streams):
            protocol: Any = self.settings.http_protocol_class
            connection = protocol(config=self.settings, server_state=ServerState(), app_state={})
            self.transports.append(Transport())
            connection.connection_made(self.transports[-1])
            connection.data_received(head.encode() + body)
        await eventually(lambda: len(self.sent) == num_streams)
        await self.step(0)
        await asyncio.sleep(0.02)

    async def step(self, number: int, *, is_seen: bool = True) -> None:
        """One token for everybody, as the engine process sends it."""
        first = number == 0
        outputs = [
            TokenOutput(
                request_id=add.request.request_id,
                token_ids=[FIRST_TOKEN + number],
                num_cached_tokens=0 if first else None,
                queued_s=0.0 if first else None,
            )
            for add in self.sent
        ]
        self.engine.engine_message(ipc.Outputs(outputs))
        for _ in range(4 if is_seen else 0):
            await asyncio.sleep(0)

    def _send(self, message: Any) -> bool:
        if isinstance(message, ipc.AddRequest):
            self.sent.append(message)
        return True


@contextmanager
def counted_calls() -> Iterator[list[int]]:
    """Counts calls of functions written in Python."""
    count = [0]

    def profile(frame: FrameType, event: str, argument: object) -> None:
        count[0] += event == "call"

    sys.setprofile(profile)
    try:
        yield count
    finally:
        sys.setprofile(None)


async def test_a_token_costs_few_calls_however_many_streams_there_are() -> None:
    per_token = {}
    for num_streams in (4, 32):
        front_end = FrontEnd()
        await front_end.start()
        await front_end.connect(num_streams)
        with counted_calls() as count:
            for number in range(1, 21):
                await front_end.step(number)
        per_token[num_streams] = count[0] / (20 * num_streams)
        assert all(len(transport.written) >= 22 for transport in front_end.transports), "each token is an event"
        await front_end.engine.stop(0)
    assert per_token[32] < MAX_CALLS_PER_TOKEN
    assert per_token[32] <= per_token[4]


async def test_a_request_costs_few_calls_to_its_first_token() -> None:
    front_end = FrontEnd()
    await front_end.start()
    await front_end.connect(1)  # what is made once is made now
    front_end.sent.clear()
    with counted_calls() as count:
        await front_end.connect(32)
    assert all(b'"delta":{"content"' in b"".join(transport.written) for transport in front_end.transports)
    await front_end.engine.stop(0)
    assert count[0] / 32 < MAX_CALLS_PER_REQUEST


async def test_tokens_that_wait_share_an_event_and_none_is_held_back() -> None:
    front_end = FrontEnd()
    await front_end.start()
    await front_end.connect(1)
    (transport,) = front_end.transports
    await front_end.step(1)
    num_alone = len(transport.written)
    await front_end.step(2, is_seen=False)
    await front_end.step(3, is_seen=False)
    assert len(transport.written) == num_alone
    await front_end.step(4)
    assert len(transport.written) == num_alone + 1
    text = front_end.engine._text().tokenizer.decode([FIRST_TOKEN + number for number in (2, 3, 4)])
    size, _, frame = transport.written[-1].partition(b"\r\n")
    assert int(size, 16) == len(frame) - 2
    assert json.loads(frame[len("data: ") :])["choices"][0]["delta"] == {"content": text}
    await front_end.engine.stop(0)
