"""What measures how costs grow: it runs, counts what it says, and draws it."""

from __future__ import annotations

import json
from pathlib import Path

from loadtest import growth
from loadtest.growth import Point


def test_the_control_plane_is_measured_alone(tmp_path: Path) -> None:
    points = growth.control(requests=[1, 3], contexts=[40], prefix_blocks=[128])
    assert [(point.axis, point.value) for point in points] == [
        ("requests", 1), ("requests", 3), ("context", 40), ("prefix blocks", 128)
    ]  # fmt: skip
    assert all(point.us > 0 for point in points)


def test_an_admission_finds_its_prefix_in_the_cache() -> None:
    scheduler = growth._scheduler(1, num_blocks=300)
    for name in ("first", "second"):
        scheduler.add(growth._request(name, growth._prompt(3), 1))
        plan = scheduler.schedule()
        scheduler.commit(plan, growth.answer(plan))
    assert [chunk.num_tokens for chunk in plan.chunks] == [1]


def test_pictures_and_figures_are_written(tmp_path: Path) -> None:
    points = [Point("control", "requests", 1, 10.0), Point("control", "requests", 64, 100.0)]
    growth.write(points, tmp_path)
    assert json.loads((tmp_path / "growth.json").read_text())[1]["us"] == 100.0
    assert "polyline" in (tmp_path / "requests.svg").read_text()
    assert "no data" in (tmp_path / "context.svg").read_text()
