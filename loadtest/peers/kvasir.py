"""Kvasir itself as a party of a comparison: started, measured and stopped like its peers."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from loadtest.peers.server import PeerServer, Settings, executable, loopback, running

REMEDY = "give the Python of an environment with Kvasir, or that environment"


@contextlib.contextmanager
def start(path: Path, folder: Path, settings: Settings) -> Iterator[PeerServer]:
    """`path`: the Python that runs it, or its environment. Default mode unless `settings.flags` say otherwise."""
    command = [str(executable(path, ("bin/python",), REMEDY)), "-m", "server"]
    port, flags = loopback()
    command += [*flags, "--model", str(folder), "--served-model-name", "own", "--threads", str(settings.threads)]
    command += ["--max-num-seqs", str(settings.slots), "--max-model-len", str(settings.context)]
    name = "kvasir"
    if not settings.prefix_cache:
        command.append("--no-enable-prefix-cache")
        name = "kvasir_without_cache"
    with running(name, [*command, *settings.flags], settings, port=port, model="own", ready_path="/readyz") as server:
        yield server
