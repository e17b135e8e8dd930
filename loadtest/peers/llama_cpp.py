"""llama.cpp's `llama-server`; the user builds it, for instance from the source distribution of `llama-cpp-python`."""

from __future__ import annotations

import contextlib
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import httpx

from loadtest.client import Target
from loadtest.own_server import free_port, stop

READY_TIMEOUT_S = 120.0


@contextlib.contextmanager
def llama_server(binary: Path, gguf: Path, *, threads: int, slots: int, context: int, log: Path) -> Iterator[Target]:
    """`slots` requests at a time share `context` tokens. Raises RuntimeError when it does not come up."""
    port = free_port()
    command = [str(binary), "-m", str(gguf), "-a", "peer", "--host", "127.0.0.1", "--port", str(port)]
    command += ["-t", str(threads), "-tb", str(threads), "-np", str(slots), "-c", str(context), "--no-webui"]
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output)
        try:
            _wait(port, process)
            yield Target(url=f"http://127.0.0.1:{port}", model="peer")
        finally:
            stop(process)


def _wait(port: int, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + READY_TIMEOUT_S
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise RuntimeError(f"llama-server ended with exit code {process.returncode}")
        with contextlib.suppress(httpx.HTTPError):
            if httpx.get(f"http://127.0.0.1:{port}/health", timeout=2.0).status_code == httpx.codes.OK:
                return
        time.sleep(0.1)
    raise RuntimeError(f"llama-server was not ready within {READY_TIMEOUT_S:.0f} s")
