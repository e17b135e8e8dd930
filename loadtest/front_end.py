"""What the HTTP front end costs by itself: a real server process in front of a stub engine that answers at once.

    python -m loadtest.front_end

Paced rounds give every connection one token per step and raise the rate until one core no longer keeps up: there,
every token is an event of its own. The saturated round emits without a pause: what waits is merged, as for any slow
reader. Figures are per second of CPU time of the front-end process, so that a busy machine does not change them.

    python -m loadtest.front_end --streams 1000

checks instead that so many open streams get every event, in order, and tells how late.
"""

from __future__ import annotations

import argparse
import json
import os
import selectors
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

from engine.config import Config, ModelConfig, SchedulerConfig, ServerConfig
from loadtest.many_streams import StreamsFigures, cpu_s
from loadtest.many_streams import measure as measure_streams
from loadtest.own_server import free_port, stop, wait_ready

STUB_ENGINE = (sys.executable, "-m", "loadtest.stub_engine")
RECEIVE_BYTES = 1 << 18
MAX_WAITING = 1 << 16  # many streams that begin at once all wait for their first token
PATH = "/v1/chat/completions"
Fields = Mapping[str, Any]
STUB: Fields = {"model": "stub"}
CONTENT = b'"delta":{"content"'


@dataclass(frozen=True)
class Round:
    """One measured round. Times in seconds; `cpu_s` is user and system time of the front-end process."""

    connections: int
    offered_tokens_s: float  # what the engine was asked to emit; 0 is as much as it can
    tokens: int
    events: int
    wall_s: float
    cpu_s: float

    @property
    def tokens_s(self) -> float:
        return self.tokens / self.wall_s

    @property
    def tokens_per_core_s(self) -> float:
        return self.tokens / self.cpu_s

    @property
    def events_per_token(self) -> float:
        return self.events / self.tokens


def serve(port: int) -> int:
    """The server under test, in this process. Returns its exit code."""
    from engine.client import AsyncEngine
    from server.lifecycle import prepare, run_loop

    config = Config(
        model=ModelConfig(served_model_name=("stub",)),
        scheduler=SchedulerConfig(max_waiting_requests=MAX_WAITING),
        server=ServerConfig(port=port, log_level="warning"),
    )

    async def main() -> int:
        return await prepare(AsyncEngine(config, command=STUB_ENGINE), config).serve_to_end()

    return run_loop(main())


@contextmanager
def stub_server(step_s: float) -> Iterator[tuple[str, psutil.Process]]:
    """A server of its own whose engine makes a step every `step_s` seconds. Yields the URL and the front end."""
    port = free_port()
    command = [sys.executable, "-m", "loadtest.front_end", "--serve", str(port)]
    process = subprocess.Popen(command, env={**os.environ, "KVASIR_STUB_STEP_S": str(step_s)})
    try:
        url = f"http://127.0.0.1:{port}"
        wait_ready(url, process)
        yield url, psutil.Process(process.pid)
    finally:
        stop(process)


def stream_round(
    url: str, process: psutil.Process, connections: int, output_tokens: int, rate: float, fields: Fields = STUB
) -> Round:
    """All connections stream at once; the clock runs from the first request to the end of the last answer."""
    sockets = [_connected(url) for _ in range(connections)]
    request = _request(output_tokens, fields)
    tails = dict.fromkeys(sockets, b"")
    events = 0
    before, began_at = cpu_s(process), time.perf_counter()
    with selectors.DefaultSelector() as selector:
        for connection in sockets:
            connection.sendall(request)
            connection.setblocking(False)
            selector.register(connection, selectors.EVENT_READ)
        left = connections
        while left:
            for key, _ in selector.select():
                peer = key.fileobj
                assert isinstance(peer, socket.socket)
                data = peer.recv(RECEIVE_BYTES)
                if not data:
                    raise RuntimeError("the server closed a connection in the middle of an answer")
                events += data.count(CONTENT)  # hardly ever cut: an event is written in one piece
                tails[peer] = (tails[peer] + data)[-64:]
                if b"data: [DONE]" in tails[peer]:
                    left -= 1
                    selector.unregister(peer)
    wall_s, used_s = time.perf_counter() - began_at, cpu_s(process) - before
    for connection in sockets:
        connection.close()
    return Round(connections, rate, connections * output_tokens, events, wall_s, used_s)


def first_token_times(url: str, num_requests: int, fields: Fields = STUB) -> list[float]:
    """Seconds from sending a request to its first content, one request after the other."""
    request = _request(2, fields)
    times = []
    with _connected(url) as connection:
        for _ in range(num_requests):
            began_at = time.perf_counter()
            connection.sendall(request)
            received = b""
            while CONTENT not in received:
                received += connection.recv(RECEIVE_BYTES)
            times.append(time.perf_counter() - began_at)
            while b"data: [DONE]\n\n\r\n0\r\n\r\n" not in received:
                received += connection.recv(RECEIVE_BYTES)
    return times


def _connected(url: str) -> socket.socket:
    host, _, port = url.removeprefix("http://").partition(":")
    connection = socket.create_connection((host, int(port)), timeout=60.0)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return connection


def _request(output_tokens: int, fields: Fields) -> bytes:
    body = json.dumps(
        {
            "messages": [{"role": "user", "content": "Tell me something."}],
            "max_tokens": output_tokens,
            "stream": True,
            **fields,
        }
    ).encode()
    head = f"POST {PATH} HTTP/1.1\r\nHost: t\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    return head.encode() + body


def measure(rates: Sequence[float], connections: int, seconds: float) -> dict[str, object]:
    """All rounds; prints them as they come."""
    rounds = []
    print(f"{'offered/s':>10} {'tokens/s':>9} {'per core':>9} {'us/token':>9} {'events/token':>13} {'core busy':>10}")
    for rate in rates:
        step_s = connections / rate if rate else 0.0
        output_tokens = int(seconds * rate / connections) if rate else 4000
        with stub_server(step_s) as (url, process):
            stream_round(url, process, 4, 20, rate)  # first calls
            result = stream_round(url, process, connections, output_tokens, rate)
        rounds.append(result)
        print(
            f"{rate or 'no pause':>10} {result.tokens_s:9,.0f} {result.tokens_per_core_s:9,.0f} "
            f"{1e6 / result.tokens_per_core_s:9.1f} {result.events_per_token:13.2f} "
            f"{result.cpu_s / result.wall_s:10.0%}",
            flush=True,
        )
    with stub_server(0.0) as (url, _):
        first_token_times(url, 20)
        times = sorted(first_token_times(url, 200))
    p50, p95 = statistics.median(times), times[int(len(times) * 0.95)]
    print(f"time to first token behind a stub engine: p50 {p50 * 1e3:.2f} ms, p95 {p95 * 1e3:.2f} ms")
    return {"rounds": [asdict(result) for result in rounds], "ttft_p50_s": p50, "ttft_p95_s": p95}


def check_streams(num_streams: int, rate: float, seconds: float) -> StreamsFigures:
    """`rate`: tokens per second of each stream. Prints what came."""
    step_s, output_tokens = 1 / rate, int(seconds * rate)
    with stub_server(step_s) as (url, process):
        request = _request(output_tokens, STUB)
        found = measure_streams(lambda: _connected(url), request, process, num_streams, output_tokens, step_s)
    print(
        f"{found.streams} streams of {output_tokens} tokens, {rate:g} a second each: {found.tokens_per_s:,.0f} tok/s, "
        f"core busy {found.core_busy:.0%}\n"
        f"incomplete {found.incomplete}, wrong {found.wrong}, merged tokens {found.merged}, "
        f"events after the next step {found.after_next_step}\n"
        f"lateness p50 {found.lateness_p50_ms:.1f} ms, p99 {found.lateness_p99_ms:.1f} ms, "
        f"max {found.lateness_max_ms:.1f} ms"
    )
    return found


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="loadtest.front_end", description=__doc__)
    parser.add_argument("--connections", type=int, default=64, help="streams at once (default: %(default)s)")
    parser.add_argument(
        "--rates", type=float, nargs="*", default=[5000, 10000, 20000, 0], help="tokens/s to offer; 0 is no pause"
    )
    parser.add_argument("--seconds", type=float, default=5.0, help="of each paced round (default: %(default)s)")
    parser.add_argument("--streams", type=int, metavar="N", help="instead: check that N open streams get every event")
    parser.add_argument("--stream-rate", type=float, default=5.0, help="tokens/s of each such stream (%(default)s)")
    parser.add_argument("--json", metavar="FILE", help="write all figures there")
    parser.add_argument("--serve", type=int, metavar="PORT", help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.serve is not None:
        return serve(arguments.serve)
    is_faultless = True
    if arguments.streams is not None:
        found = check_streams(arguments.streams, arguments.stream_rate, arguments.seconds)
        figures, is_faultless = asdict(found), found.is_faultless
    else:
        figures = measure(arguments.rates, arguments.connections, arguments.seconds)
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(figures, indent=2) + "\n")
    return 0 if is_faultless else 1


if __name__ == "__main__":
    sys.exit(main())
