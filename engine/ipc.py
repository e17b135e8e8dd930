"""What crosses the border between front end and engine process: typed msgpack messages in length-prefixed frames.

Frame: version byte, flag byte (1: more frames of this message follow), length as 4 bytes big-endian, payload. Nothing
is ever unpickled or evaluated; a frame that does not decode to a known message is a ProtocolError.
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterator
from typing import Any, Generic, TypeVar

import msgspec

from engine.errors import EngineError
from engine.types import EngineRequest, EngineStats, ModelInfo, TokenOutput

VERSION = 1
HEADER = struct.Struct(">BBI")
MORE_FOLLOWS = 1
MAX_FRAME_BYTES = 16 * 1024 * 1024
# Prompt logprobs of a long context are the largest message: about 320 bytes a token with 20 alternatives.
MAX_MESSAGE_BYTES = 256 * 1024 * 1024
PEER_CREDENTIALS = struct.Struct("3i")  # pid, uid, gid

# What encoding raises for values that JSON allows and a message cannot carry: lone surrogates, integers beyond 64 bits,
# endless nesting.
ENCODE_ERRORS = (UnicodeEncodeError, OverflowError, RecursionError)

T = TypeVar("T")


class ProtocolError(EngineError):
    """The peer sent something that is not one of our messages."""

    code = "protocol_error"


class AddRequest(msgspec.Struct, frozen=True, tag=True):
    request: EngineRequest


class Abort(msgspec.Struct, frozen=True, tag=True):
    """End a request, or one choice of it. Unknown ids are ignored: they may just have finished."""

    request_id: str
    choice: int | None = None


class Shutdown(msgspec.Struct, frozen=True, tag=True):
    """Leave the loop after the current step."""


class Control(msgspec.Struct, frozen=True, tag=True):
    """An operator's action, to be done between two steps and answered with a ControlReply of the same `call_id`."""

    call_id: int
    name: str
    payload: dict[str, Any] = {}


class ControlReply(msgspec.Struct, frozen=True, tag=True):
    """What became of an action: `payload`, or the error with `code` of engine.errors."""

    call_id: int
    payload: dict[str, Any] = {}
    code: str | None = None
    message: str = ""
    param: str | None = None
    retry_after_s: int = 1


class Phase(msgspec.Struct, frozen=True, tag=True):
    """Progress of starting up: "loading" or "warming", what, and the share done in [0, 1]."""

    phase: str
    detail: str
    share: float


class Ready(msgspec.Struct, frozen=True, tag=True):
    info: ModelInfo


class Outputs(msgspec.Struct, frozen=True, tag=True):
    """What one step produced.

    stats         at most once per heartbeat interval, and whenever the engine becomes idle
    num_received  requests taken from the socket so far: tells the client which of its requests `stats` counts
    started       requests of which this step computed the first tokens
    """

    outputs: list[TokenOutput]
    stats: EngineStats | None = None
    num_received: int = 0
    started: list[str] = []


class Heartbeat(msgspec.Struct, frozen=True, tag=True):
    """Sent by a thread of its own, so also during a long step.

    num_steps  finished steps
    step_s     seconds that the current step has taken so far; 0 between steps
    """

    num_steps: int
    step_s: float


class Rejected(msgspec.Struct, frozen=True, tag=True):
    """The core refused a request: `code` of engine.errors, message for the client."""

    request_id: str
    code: str
    message: str
    retry_after_s: int = 1
    param: str | None = None


class Fatal(msgspec.Struct, frozen=True, tag=True):
    """The engine cannot go on. `is_config`: a restart would fail in the same way."""

    message: str
    is_config: bool


ToEngine = AddRequest | Abort | Control | Shutdown
FromEngine = Phase | Ready | Outputs | Heartbeat | Rejected | ControlReply | Fatal

_encoder = msgspec.msgpack.Encoder()


def encode(message: msgspec.Struct, *, max_frame_bytes: int = MAX_FRAME_BYTES) -> bytes:
    """The message as one frame, or several when it is larger than a frame. Raises ProtocolError over the limit.

    Raises one of ENCODE_ERRORS for values that cannot be carried.
    """
    payload = _encoder.encode(message)
    if len(payload) > MAX_MESSAGE_BYTES:
        raise ProtocolError(f"a message has {len(payload)} bytes, the limit is {MAX_MESSAGE_BYTES}")
    if len(payload) <= max_frame_bytes:
        return HEADER.pack(VERSION, 0, len(payload)) + payload
    frames = []
    for start in range(0, len(payload), max_frame_bytes):
        part = payload[start : start + max_frame_bytes]
        flag = MORE_FOLLOWS if start + max_frame_bytes < len(payload) else 0
        frames += [HEADER.pack(VERSION, flag, len(part)), part]
    return b"".join(frames)


class Decoder(Generic[T]):
    """Turns received bytes into messages of one type (a Struct or a union of them). Does no I/O."""

    def __init__(self, message_type: Any) -> None:
        self._decoder = msgspec.msgpack.Decoder(message_type)
        self._received = bytearray()
        self._parts: list[bytes] = []

    def feed(self, data: bytes) -> Iterator[T]:
        """Yields the messages that `data` completes. Raises ProtocolError; the connection must then be closed."""
        self._received += data
        while len(self._received) >= HEADER.size:
            version, flag, length = HEADER.unpack_from(self._received)
            if version != VERSION or flag not in (0, MORE_FOLLOWS) or length > MAX_FRAME_BYTES:
                raise ProtocolError(f"bad frame header: version {version}, flags {flag}, length {length}")
            end = HEADER.size + length
            if len(self._received) < end:
                return
            self._parts.append(bytes(memoryview(self._received)[HEADER.size : end]))
            del self._received[:end]
            if flag == MORE_FOLLOWS:
                if sum(map(len, self._parts)) > MAX_MESSAGE_BYTES:
                    raise ProtocolError(f"a message exceeds {MAX_MESSAGE_BYTES} bytes")
                continue
            payload, self._parts = b"".join(self._parts), []
            yield self._decode(payload)

    def _decode(self, payload: bytes) -> T:
        try:
            message: T = self._decoder.decode(payload)
        except (msgspec.DecodeError, ValueError, RecursionError, OverflowError) as error:
            raise ProtocolError(f"a frame holds no known message: {error}") from None
        return message


def peer_uid(connection: socket.socket) -> int:
    """User id of the process at the other end of a connected Unix socket."""
    raw = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, PEER_CREDENTIALS.size)
    _, uid, _ = PEER_CREDENTIALS.unpack(raw)
    return int(uid)
