"""Many open streams at once: whether every event came, in order, and how much later than the engine made it.

The stub engine makes a token for every stream at each multiple of the step's length on the machine's monotonic
clock, which is the client's too. A token that shares an event with the one before it came late, and none is missing.
"""

from __future__ import annotations

import re
import resource
import selectors
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import psutil

RECEIVE_BYTES = 1 << 18
SPARE_FILES = 64
TEXT = re.compile(rb'"delta":\{"content":("(?:[^"\\]|\\.)*")')
DONE = b"data: [DONE]"
OK = b"HTTP/1.1 200"
STALL_S = 60.0


@dataclass
class Stream:
    """`arrivals[i]` is when the i-th piece of text was read, in seconds of the monotonic clock."""

    pieces: list[bytes] = field(default_factory=list)
    arrivals: list[float] = field(default_factory=list)
    rest: bytes = b""
    is_done: bool = False
    is_refused: bool = False

    def read(self, data: bytes, now: float) -> None:
        if not self.rest and not self.pieces and data.startswith(b"HTTP/1.1 ") and not data.startswith(OK):
            self.is_refused = True
        *events, self.rest = (self.rest + data).split(b"\n\n")
        for event in events:
            found = TEXT.search(event)
            if found and len(found[1]) > 2:
                self.pieces.append(found[1][1:-1])
                self.arrivals.append(now)
            self.is_done = self.is_done or DONE in event

    @property
    def text(self) -> bytes:
        return b"".join(self.pieces)


@dataclass(frozen=True)
class StreamsFigures:
    """Times in milliseconds; lateness is from the engine's step to the client."""

    streams: int
    tokens: int
    incomplete: int  # streams that were refused or ended without [DONE]
    wrong: int  # streams whose text is not the expected one: an event lost, doubled or out of order
    merged: int  # tokens that shared an event with the one before
    after_next_step: int  # events that came after the step that followed theirs
    lateness_p50_ms: float
    lateness_p99_ms: float
    lateness_max_ms: float
    core_busy: float  # CPU time of the front end by wall time
    tokens_per_s: float

    @property
    def is_faultless(self) -> bool:
        return not (self.incomplete or self.wrong)


def lateness_s(arrivals: list[float], step_s: float) -> list[float]:
    """Of each event but the first, which does not wait for a step, when no event was merged.

    The step of the first is the latest that lets none of the events come before its own step.
    """
    phases = [at - i * step_s for i, at in enumerate(arrivals)][1:]
    if not phases:
        return []
    base = min(phases) // step_s * step_s
    return [phase - base for phase in phases]


def figures(
    streams: list[Stream], expected: bytes, output_tokens: int, step_s: float, wall_s: float, cpu_s: float
) -> StreamsFigures:
    late = sorted(
        late_s * 1000
        for stream in streams
        if len(stream.arrivals) == output_tokens
        for late_s in lateness_s(stream.arrivals, step_s)
    )
    tokens = output_tokens * len(streams)
    return StreamsFigures(
        streams=len(streams),
        tokens=tokens,
        incomplete=sum(not stream.is_done for stream in streams),
        wrong=sum(stream.text != expected for stream in streams),
        merged=sum(max(0, output_tokens - len(stream.pieces)) for stream in streams),
        after_next_step=sum(late_ms > step_s * 1000 for late_ms in late),
        lateness_p50_ms=late[len(late) // 2] if late else 0.0,
        lateness_p99_ms=late[int(len(late) * 0.99)] if late else 0.0,
        lateness_max_ms=late[-1] if late else 0.0,
        core_busy=cpu_s / wall_s,
        tokens_per_s=tokens / wall_s,
    )


def read_streams(connections: list[socket.socket], request: bytes) -> list[Stream]:
    """Sends the request on every connection and reads all to their ends. Raises TimeoutError when nothing comes."""
    streams = [Stream() for _ in connections]
    with selectors.DefaultSelector() as selector:
        for connection, stream in zip(connections, streams, strict=True):
            connection.sendall(request)
            connection.setblocking(False)
            selector.register(connection, selectors.EVENT_READ, stream)
        num_open = len(streams)
        while num_open:
            ready = selector.select(STALL_S)
            if not ready:
                raise TimeoutError(f"{num_open} of {len(streams)} streams are open and silent for {STALL_S:g} s")
            for key, _ in ready:
                peer, stream = key.fileobj, key.data
                assert isinstance(peer, socket.socket)
                data = peer.recv(RECEIVE_BYTES)
                stream.read(data, time.monotonic())
                if stream.is_done or stream.is_refused or not data:
                    selector.unregister(peer)
                    num_open -= 1
    return streams


def measure(
    connect: Callable[[], socket.socket],
    request: bytes,
    process: psutil.Process,
    num_streams: int,
    output_tokens: int,
    step_s: float,
) -> StreamsFigures:
    """`process` is the front end; the request asks for `output_tokens`."""
    allow_files(num_streams)
    (expected,) = _all([connect()], request)
    connections = [connect() for _ in range(num_streams)]
    before, began_at = cpu_s(process), time.perf_counter()
    streams = _all(connections, request)
    wall_s = time.perf_counter() - began_at
    return figures(streams, expected.text, output_tokens, step_s, wall_s, cpu_s(process) - before)


def _all(connections: list[socket.socket], request: bytes) -> list[Stream]:
    try:
        return read_streams(connections, request)
    finally:
        for connection in connections:
            connection.close()


def allow_files(num_streams: int) -> None:
    """Raises OSError when the system does not let this process open as many."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = num_streams + SPARE_FILES
    if soft < wanted:
        if hard != resource.RLIM_INFINITY and hard < wanted:
            raise OSError(f"{num_streams} streams need {wanted} open files and {hard} are allowed; raise `ulimit -Hn`")
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def cpu_s(process: psutil.Process) -> float:
    """User and system time so far."""
    times = process.cpu_times()
    return float(times.user + times.system)
