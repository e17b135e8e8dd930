"""The commands that measure our own engine and server give complete figures."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from loadtest import latency, speculation_budget, step_cost


def test_step_cost_tells_every_stage(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "cost.json"
    assert step_cost.main(["--rows", "1", "3", "--steps", "4", "--prompt-tokens", "20", "--json", str(out)]) == 0
    for stages in json.loads(out.read_text())["us"].values():
        inner = sum(us for stage, us in stages.items() if stage not in ("step", "outside the model"))
        assert 0 < stages["outside the model"] < stages["step"]
        assert inner <= 2 * stages["step"]  # medians of parts need not add up, but no part counts twice
        assert stages.keys() >= {"schedule", "build tensors", "forward", "logits", "sampler", "commit", "encode"}
    assert "share outside the model" in capsys.readouterr().out


def test_the_budget_is_measured_in_all_ways_and_rounds(capsys: pytest.CaptureFixture[str]) -> None:
    assert speculation_budget.main(["--rows", "2", "--kinds", "copy", "--tokens", "6", "--rounds", "2"]) == 0
    head, line = capsys.readouterr().out.splitlines()
    assert [way in head for way in ("fixed / off", "auto / off", "auto / fixed")] == [True] * 3
    assert line.startswith("ngram")
    assert line.count("-") == 3


def test_latency_sends_each_prompt_cold_and_warm(
    server_url: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    @contextlib.contextmanager
    def running(flags: list[str], **options: Any) -> Iterator[str]:
        yield server_url

    monkeypatch.setattr(latency, "own_server", running)
    monkeypatch.setattr(latency, "SERVED_NAME", "mimir")
    out = tmp_path / "latency.json"
    assert latency.main(["--prompt-tokens", "600", "--rounds", "2", "--json", str(out)]) == 0
    found = json.loads(out.read_text())
    assert len(found["rounds"]) == 2
    assert all(cold > 0 and warm > 0 for cold, warm in found["rounds"])
