"""The measurement of what cache policies buy gives complete ratios, and memory behaves as it should at any size."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from loadtest import kv_policies


def test_every_ratio_is_told_and_smaller_caches_admit_more(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "kv.json"
    flags = ["--contexts", "256", "--rows", "2", "--policies", "snapkv", "--steps", "4", "--rounds", "1"]
    flags += ["--pool", "3", "--pool-context", "256", "--offered", "10", "--outputs", "24", "--admitted", "snapkv"]
    assert kv_policies.main([*flags, "--json", str(out)]) == 0
    found = json.loads(out.read_text())
    assert set(found["decode"]["256 x 2"]) == {"full", "snapkv"}
    assert found["decode"]["256 x 2"]["full"] == 1.0
    assert found["admitted"]["snapkv"] > 1.5 * found["admitted"]["full"]
    assert set(found["overhead"]) == set(kv_policies.OVERHEAD)
    assert "requests admitted" in capsys.readouterr().out
