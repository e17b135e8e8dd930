"""The command behind `make gpu`: parts in processes of their own, JSON as it goes, a table, an exit code."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from loadtest.gpu import __main__ as command
from loadtest.gpu.parts import chosen

OPTIONS = ["--device", "cpu", "--tiny"]


class Children:
    """Stands in for subprocess.run: what each part writes, and how it ends."""

    def __init__(self, outcomes: dict[str, dict[str, Any] | int | None]) -> None:
        self.outcomes = outcomes
        self.commands: list[list[str]] = []

    def __call__(self, line: Sequence[str], **options: Any) -> Any:
        if line[0] == "git":
            return subprocess.CompletedProcess(line, 0, stdout="abc\n")
        self.commands.append(list(line))
        values = dict(pairwise(line))
        outcome = self.outcomes[values["--part"]]
        if outcome is None:
            raise subprocess.TimeoutExpired(line, options["timeout"])
        if isinstance(outcome, dict):
            Path(values["--out"]).write_text(json.dumps(outcome))
        return subprocess.CompletedProcess(line, outcome if isinstance(outcome, int) else 0)


def run(monkeypatch: pytest.MonkeyPatch, out: Path, names: list[str], outcomes: dict[str, Any]) -> tuple[int, Any, Any]:
    children = Children({"limits": {"limits": {"copy_gb_per_s": 7.0}, "cases": []}, **outcomes})
    monkeypatch.setattr(subprocess, "run", children)
    code = command.main([*OPTIONS, "--out", str(out), "--only", *names])
    return code, json.loads(out.read_text()), children


def test_one_real_part_in_a_real_process(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "new" / "gpu.json"
    assert command.main([*OPTIONS, "--out", str(out), "--only", "limits"]) == 0
    found = json.loads(out.read_text())
    assert found["parts"]["limits"]["status"] == "done"
    assert found["parts"]["limits"]["cases"][0]["copy_gb_per_s"] > 0
    assert found["environment"]["torch"] == torch.__version__
    assert "copy_gb_per_s" in capfd.readouterr().out


def test_limits_reach_the_parts_and_targets_the_table(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = {"measure": "share", "bound": 0.85, "at_least": True}
    case = {"case": "64 rows", "share": 0.5, "target": target, "hit": False}
    code, found, children = run(monkeypatch, tmp_path / "gpu.json", ["decode"], {"decode": {"cases": [case]}})
    assert code == 0  # a miss is a result, not an error
    assert found["parts"]["decode"]["cases"] == [case]
    assert '{"copy_gb_per_s": 7.0}' in children.commands[1]
    text = capsys.readouterr().out
    assert "share >= 0.85" in text
    assert "0.500 MISS" in text


@pytest.mark.parametrize(
    ("outcome", "status"),
    [(3, "exit code 3"), (None, "ended after 75 s"), ({"cases": [{"case": "x", "error": "boom"}]}, "done")],
)
def test_a_part_that_fails_does_not_stop_the_others_but_shows_in_the_exit_code(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, outcome: Any, status: str
) -> None:
    outcomes = {"decode": outcome, "quest": {"cases": [{"case": "q"}]}}
    code, found, _ = run(monkeypatch, tmp_path / "gpu.json", ["quest", "decode"], outcomes)
    assert code == 1
    assert found["parts"]["decode"]["status"] == status
    assert found["parts"]["quest"]["cases"] == [{"case": "q"}]


def test_a_part_without_time_left_is_left_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    children = Children({"limits": {"limits": {}, "cases": []}, "decode": {"cases": []}})
    monkeypatch.setattr(subprocess, "run", children)
    out = tmp_path / "gpu.json"
    command.main([*OPTIONS, "--out", str(out), "--only", "decode", "--total", "4"])
    assert {part: found["status"] for part, found in json.loads(out.read_text())["parts"].items()} == {
        "limits": "left out",
        "decode": "left out",
    }


def test_an_unknown_part_is_refused_with_the_known_ones(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        command.main([*OPTIONS, "--only", "prefil"])
    assert "unknown part 'prefil'; known: limits, checks, decode, prefill" in capsys.readouterr().err


def test_without_a_gpu_it_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert command.main([]) == 2
    assert "finds no CUDA device" in capsys.readouterr().err


def test_parts_run_in_their_order_and_limits_come_along() -> None:
    assert [part.name for part in chosen(["quest", "decode"])] == ["limits", "decode", "quest"]
