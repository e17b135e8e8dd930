"""What all tests share: Triton's interpreter where there is no GPU, and one real server with the bundled model."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from loadtest.own_server import own_server

if not torch.cuda.is_available():
    # must stand before triton's first import, which transformers' model classes do too
    os.environ.setdefault("TRITON_INTERPRET", "1")

SERVE_FLAGS = ("--threads", "1", "--max-num-seqs", "8", "--num-blocks", "512", "--log-level", "warning")


@pytest.fixture(scope="session")
def server_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    log: Path = tmp_path_factory.mktemp("server") / "server.log"
    with own_server(SERVE_FLAGS, log=log) as url:
        yield url
    text = log.read_text()
    assert "Traceback" not in text, text[-3000:]
