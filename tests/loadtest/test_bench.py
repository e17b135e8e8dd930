"""`kvasir bench` against a real server: what it prints and writes is what the server counted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from loadtest import result_file
from loadtest.own_server import free_port
from loadtest.run import main

SMALL = ["--num-requests", "4", "--prompt-tokens", "20", "--output-tokens", "5", "--warmup", "1"]


def bench(url: str, out: Path, *flags: str) -> dict[str, Any]:
    assert main(["--url", url, *flags, "--metrics-interval-s", "0.05", "--out", str(out)]) == 0
    found: dict[str, Any] = json.loads((out / "results.json").read_text())
    return found


def test_bench_reports_the_tokens_that_were_made(
    server_url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = bench(server_url, tmp_path, *SMALL, "--concurrency", "1", "2")
    assert found["schema"] == result_file.SCHEMA
    assert [cell["level"]["concurrency"] for cell in found["cells"]] == [1, 2]
    for cell in found["cells"]:
        figures = cell["figures"]
        assert (figures["output_tokens"], figures["prompt_tokens"], figures["failed"]) == (20, 80, 0)
        assert figures["suspicious"] == 0, figures["first_suspicion"]
        assert 0 < figures["events"] <= 20
    assert {"running", "waiting", "blocks in use"} <= found["cells"][0]["timelines"][0]["series"].keys()
    assert "output tok/s" in capsys.readouterr().out
    html = (tmp_path / "report.html").read_text()
    assert all(title in html for title in ("Time to first token", "Goodput", "Batch and queue", "2 in flight"))


def test_open_loop_and_shared_prefix_hit_the_cache(server_url: str, tmp_path: Path) -> None:
    flags = ["--num-requests", "4", "--prompt-tokens", "8", "--shared-prefix-tokens", "64", "--output-tokens", "2"]
    for _ in range(2):
        found = bench(server_url, tmp_path, *flags, "--rate", "50", "--arrivals", "gamma", "--seed", "5")
    figures = found["cells"][0]["figures"]
    assert figures["cached_tokens"] >= 4 * 64
    assert figures["late_ms"]["max"] > 0


@pytest.mark.parametrize("workload", ["chat", "agent"])
def test_conversations_go_on_with_the_real_answers(server_url: str, tmp_path: Path, workload: str) -> None:
    flags = ["--workload", workload, "--prompt-tokens", "900", "--output-tokens", "8", "--context", "2000"]
    found = bench(server_url, tmp_path, *flags, "--num-requests", "6", "--concurrency", "2", "--warmup", "0")
    figures = found["cells"][0]["figures"]
    assert (figures["requests"], figures["unsent"], figures["suspicious"]) == (6, 0, 0)
    assert figures["cached_tokens"] > 0  # later turns begin as the ones before did


def test_a_sweep_ends_and_says_why(server_url: str, tmp_path: Path) -> None:
    found = bench(server_url, tmp_path, *SMALL, "--sweep", "concurrency", "--max-levels", "2")
    assert len(found["cells"]) == 2
    (reason,) = found["stopped"].values()
    assert "highest goodput" in reason


def test_two_endpoints_take_turns_and_files_can_be_compared(
    server_url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    urls = ["--url", f"one={server_url}", f"two={server_url}/v1"]
    out = tmp_path / "both"
    assert main([*urls, *SMALL, "--concurrency", "2", "--rounds", "2", "--out", str(out)]) == 0
    found = json.loads((out / "results.json").read_text())
    assert [len(cell["rounds"]) for cell in found["cells"]] == [2, 2]
    speeds = [[one["output_tokens_per_s"] for one in cell["rounds"]] for cell in found["cells"]]
    ratio = next(ratio for ratio in found["ratios"] if ratio["figure"] == "output tok/s")
    wanted = sorted(other / first for first, other in zip(*speeds, strict=True))
    assert (ratio["least"], ratio["most"]) == pytest.approx((wanted[0], wanted[1]))
    assert ratio["median"] == pytest.approx(sum(wanted) / 2)
    files = [str(out / "results.json")] * 2
    assert main(["--compare", *files, "--out", str(tmp_path / "compared")]) == 0
    assert "multiples of" in capsys.readouterr().out
    assert "<svg" in (tmp_path / "compared" / "report.html").read_text()


def test_a_trace_is_replayed(server_url: str, tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    lines: list[dict[str, Any]] = [
        {"timestamp": 3.0, "prompt": "Once", "max_tokens": 3},
        {"timestamp": 3.1, "prompt_tokens": 12, "max_tokens": 4},
    ]
    path.write_text("\n".join(json.dumps(line) for line in lines))
    found = bench(server_url, tmp_path, "--trace", str(path), "--warmup", "0")
    assert found["cells"][0]["level"]["label"] == "trace"
    assert found["cells"][0]["figures"]["output_tokens"] == 7


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--url", "http://127.0.0.1:{port}"], "start a server first"),
        (["--compare", "none.json"], "cannot read none.json"),
        (["--peer", "nobody=here"], "give NAME=PATH with one of"),
        (["--trace", "none.jsonl"], "cannot read the trace"),
    ],
)
def test_what_cannot_begin_is_one_clear_line(
    flags: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [flag.format(port=free_port()) for flag in flags]
    assert main([*given, "--out", str(tmp_path / "out")]) == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_prompt_beyond_the_context_is_refused(
    server_url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--workload", "rag", "--prompt-tokens", "100000"]
    assert main(["--url", server_url, *flags, "--out", str(tmp_path)]) == 2
    assert "exceed the context of 4096" in capsys.readouterr().err
