"""The shipped dashboards and rules speak only of metrics that the server exports."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from prometheus_client import generate_latest

from engine.metrics import Metrics

ROOT = Path(__file__).resolve().parent.parent
NAME = re.compile(r"\b(?:kvasir|process)_[a-z0-9_]+")


def exported_names() -> set[str]:
    text = generate_latest(Metrics("m").registry).decode()
    names = {line.split("{")[0].split(" ")[0] for line in text.splitlines() if not line.startswith("#")}
    assert "kvasir_ready" in names
    return names


@pytest.mark.parametrize("file", ["configs/grafana_dashboard.json", "configs/prometheus_alerts.yml"])
def test_every_metric_of_a_shipped_file_exists(file: str) -> None:
    used = set(NAME.findall((ROOT / file).read_text()))
    assert len(used) > 3
    # info metrics appear with the first model, not before
    late = {"kvasir_engine_config_info"}
    assert used - exported_names() - late == set()


def test_the_dashboard_has_no_overlapping_panels() -> None:
    panels = json.loads((ROOT / "configs/grafana_dashboard.json").read_text())["panels"]
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        box = panel["gridPos"]
        cells = {(x, y) for x in range(box["x"], box["x"] + box["w"]) for y in range(box["y"], box["y"] + box["h"])}
        assert not cells & taken, panel["title"]
        taken |= cells
