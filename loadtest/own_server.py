"""Starts a Kvasir server on a free loopback port and stops it again, for benchmarks and end-to-end tests."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import httpx

READY_TIMEOUT_S = 120.0
STOP_TIMEOUT_S = 40.0


class ServerStartError(RuntimeError):
    """A server ended or was not ready in time."""


@contextlib.contextmanager
def own_server(
    arguments: Sequence[str] = (), *, log: Path | None = None, env: dict[str, str] | None = None
) -> Iterator[str]:
    """Yields the URL of a ready server started with these `kvasir serve` flags. Raises ServerStartError if it dies."""
    port = free_port()
    command = [sys.executable, "-m", "server", "--port", str(port), *arguments]
    with contextlib.ExitStack() as stack:
        output = stack.enter_context(log.open("wb")) if log is not None else subprocess.DEVNULL
        process = subprocess.Popen(command, stdout=output, stderr=output, env={**os.environ, **(env or {})})
        stack.callback(stop, process)
        url = f"http://127.0.0.1:{port}"
        wait_ready(url, process)
        yield url


def wait_ready(url: str, process: subprocess.Popen[bytes], timeout_s: float = READY_TIMEOUT_S) -> None:
    """Polls /readyz. Raises ServerStartError when the process ends or the time is over."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise ServerStartError(f"the server ended with exit code {process.returncode} before it was ready")
        with contextlib.suppress(httpx.HTTPError):
            if httpx.get(f"{url}/readyz", timeout=2.0).status_code == httpx.codes.OK:
                return
        time.sleep(0.05)
    raise ServerStartError(f"the server was not ready within {timeout_s:.0f} s")


def stop(process: subprocess.Popen[bytes]) -> int:
    """SIGTERM, then SIGKILL when it does not drain; returns the exit code."""
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    return process.returncode


def free_port() -> int:
    """A loopback port that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
