"""The cost of checking guesses is measured for the sizes that were asked for."""

from __future__ import annotations

import pytest

from loadtest import verification


def test_every_size_has_its_time_and_parts(capsys: pytest.CaptureFixture[str]) -> None:
    assert verification.main(["--rows", "1", "3", "--steps", "2"]) == 0
    head, *lines = [line.split() for line in capsys.readouterr().out.splitlines() if line.strip()]
    assert head[0] == "rows"
    assert [line[0] for line in lines] == ["1", "3"]
    assert all(float(number) > 0.0 for line in lines for number in line[1:-1])
