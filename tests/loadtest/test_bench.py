"""`kvasir bench` against a real server: what it prints is what the server counted."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from loadtest.own_server import free_port
from loadtest.run import main


def test_bench_reports_the_tokens_that_were_made(
    server_url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "bench.json"
    flags = ["--num-requests", "4", "--prompt-tokens", "20", "--output-tokens", "5", "--concurrency", "2"]
    assert main(["--url", server_url, *flags, "--json", str(out)]) == 0
    figures = json.loads(out.read_text())
    assert (figures["output_tokens"], figures["prompt_tokens"], figures["failed"]) == (20, 80, 0)
    assert "output tok/s" in capsys.readouterr().out


def test_open_loop_and_shared_prefix_hit_the_cache(server_url: str, tmp_path: Path) -> None:
    out = tmp_path / "bench.json"
    flags = ["--num-requests", "4", "--prompt-tokens", "8", "--shared-prefix-tokens", "64", "--output-tokens", "2"]
    assert main(["--url", server_url, *flags, "--rate", "50", "--seed", "5", "--json", str(out)]) == 0
    main(["--url", server_url, *flags, "--rate", "50", "--seed", "5", "--json", str(out)])
    assert json.loads(out.read_text())["cached_tokens"] >= 4 * 64


def test_a_server_that_is_not_there_is_one_clear_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--url", f"http://127.0.0.1:{free_port()}"]) == 2
    assert "start a server first" in capsys.readouterr().err
