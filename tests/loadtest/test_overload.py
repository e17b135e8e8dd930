"""The measurement under overload: every way does the same work, and with the ladder more requests run at once."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from loadtest import overload


@pytest.mark.slow
def test_every_way_is_measured_on_the_same_requests(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "overload.json"
    flags = ["--requests", "6", "--blocks", "100", "--outputs", "96", "--rounds", "1", "--rate", "50"]
    assert overload.main([*flags, "--clock", "steps", "--json", str(out)]) == 0
    found = json.loads(out.read_text())["medians"]
    assert set(found) == set(overload.WAYS)
    assert found["preemption"]["rungs"] == 0 < found["ladder"]["rungs"]
    assert found["ladder"]["steps"] < found["preemption"]["steps"], "more run at once"
    for one in found.values():
        assert 0 < one["peak_blocks"] <= 100
        assert 0 <= one["quality"] <= 1
    assert "peak_blocks" in capsys.readouterr().out
