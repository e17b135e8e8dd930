"""What all peers share: settings, the running server that callers get, start with a bounded wait, and errors that help.

Knows no peer; their commands are in the modules beside it.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from loadtest.client import Target
from loadtest.own_server import free_port
from loadtest.peers.process_tree import cpu_s, peak_rss_bytes, stop_tree

POLL_S = 0.1
LOG_TAIL_BYTES = 1500


class PeerError(RuntimeError):
    """A peer is missing or did not start; the message says what to do."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Equal for all parties of a comparison."""

    scratch: Path  # logs, and what a peer needs beside the checkpoint; kept between runs by whoever keeps the folder
    threads: int
    slots: int = 32  # requests at once
    context: int = 1536  # tokens of the longest request, answer included
    ready_timeout_s: float = 600.0
    prefix_cache: bool = True
    flags: tuple[str, ...] = ()  # further flags of the server


@dataclass(frozen=True, kw_only=True)
class PeerServer:
    """A server that is ready."""

    name: str
    url: str  # without /v1
    model: str
    pid: int
    start_s: float  # from start to ready
    takes_token_ids: bool = True
    takes_ignore_eos: bool = True
    sends_done: bool = True  # its streams end with [DONE]
    request_fields: Mapping[str, Any] = field(default_factory=dict)  # further fields that its requests need

    @property
    def target(self) -> Target:
        return Target(
            url=self.url,
            model=self.model,
            ignore_eos=self.takes_ignore_eos,
            sends_done=self.sends_done,
            extra=self.request_fields,
        )

    def peak_rss_bytes(self) -> int:
        """Highest resident memory so far, summed over its processes."""
        return peak_rss_bytes(self.pid)

    def cpu_s(self) -> float:
        """CPU time so far of the process that was started, without those that it started."""
        return cpu_s(self.pid)


# (path of its executable or environment, checkpoint folder, settings) -> the running server
StartPeer = Callable[[Path, Path, Settings], AbstractContextManager[PeerServer]]


@contextlib.contextmanager
def running(
    name: str,
    command: Sequence[str],
    settings: Settings,
    *,
    port: int,
    model: str,
    ready_path: str = "/health",
    env: Mapping[str, str] | None = None,
    **properties: Any,
) -> Iterator[PeerServer]:
    """Starts `command`, which must listen on `port`, and stops it and its children at the end.

    `properties` are further fields of PeerServer. Raises PeerError, with the end of the log, when the process ends or
    is not ready in time.
    """
    settings.scratch.mkdir(parents=True, exist_ok=True)
    log = settings.scratch / f"{name}.log"
    with log.open("wb") as output:
        started = time.perf_counter()
        process = subprocess.Popen(command, stdout=output, stderr=output, env={**os.environ, **(env or {})})
        try:
            _wait_ready(name, process, f"http://127.0.0.1:{port}{ready_path}", settings.ready_timeout_s, log)
            yield PeerServer(
                name=name,
                url=f"http://127.0.0.1:{port}",
                model=model,
                pid=process.pid,
                start_s=time.perf_counter() - started,
                **properties,
            )
        finally:
            stop_tree(process)


def executable(path: Path, names: Sequence[str], remedy: str) -> Path:
    """`path` itself, or the first of `names` below it; raises PeerError with the remedy when there is none."""
    candidates = [path, *(path / name for name in names)]
    for candidate in candidates:
        if candidate.is_file() and os.access(candidate, os.X_OK):
            # not resolved: an environment's program finds its environment by the path that it is called by
            return candidate.absolute()
    searched = ", ".join(str(candidate) for candidate in candidates)
    raise PeerError(f"no executable among {searched}; {remedy}")


def loopback() -> tuple[int, list[str]]:
    """A free port, and the flags by which most servers listen on it on the loopback interface."""
    port = free_port()
    return port, ["--host", "127.0.0.1", "--port", str(port)]


def _wait_ready(name: str, process: subprocess.Popen[bytes], url: str, timeout_s: float, log: Path) -> None:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise PeerError(f"{name} ended with exit code {process.returncode} before it was ready; {_tail(log)}")
        with contextlib.suppress(httpx.HTTPError):
            if httpx.get(url, timeout=2.0).status_code == httpx.codes.OK:
                return
        time.sleep(POLL_S)
    raise PeerError(f"{name} was not ready within {timeout_s:.0f} s; {_tail(log)}")


def _tail(log: Path) -> str:
    text = log.read_bytes()[-LOG_TAIL_BYTES:].decode(errors="replace").strip()
    return f"the end of {log}:\n{text}" if text else f"{log} is empty"
