"""One real server process with the bundled model, shared by all end-to-end tests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from loadtest.own_server import own_server

SERVE_FLAGS = ("--threads", "1", "--max-num-seqs", "8", "--num-blocks", "512", "--log-level", "warning")


@pytest.fixture(scope="session")
def server_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    log: Path = tmp_path_factory.mktemp("server") / "server.log"
    with own_server(SERVE_FLAGS, log=log) as url:
        yield url
    text = log.read_text()
    assert "Traceback" not in text, text[-3000:]
