"""Ratios are taken within rounds, sweeps stop at saturation, pictures and pages hold what was measured."""

from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree

import pytest

from loadtest import page, result_file, sweep, terminal
from loadtest.chart import Line, cumulative, draw
from loadtest.client import Record, Run
from loadtest.environment import command
from loadtest.many_streams import Stream, figures, lateness_s
from loadtest.measure import Cell, Endpoint, Level, Plan, ratios
from loadtest.report import Goals, summarize
from loadtest.speculation_table import BEGIN, END, Gain, markdown, replaced
from loadtest.timeline import Timeline, read_gauges, read_rows


def run(latency_s: float, duration_s: float, count: int = 4, failed: int = 0) -> Run:
    done = [
        Record(sent=0.0, first=latency_s / 2, finished=latency_s, arrivals=[latency_s], output_tokens=10)
        for _ in range(count)
    ]
    return Run([*done, *(Record(sent=0.0, error="x", error_kind="timeout") for _ in range(failed))], duration_s)


def level(rows: int) -> Level:
    return Level(concurrency=rows, num_requests=4)


def test_ratios_are_medians_of_rounds_and_above_one_is_better() -> None:
    first = Cell("one", level(2), [run(1.0, 1.0), run(1.0, 2.0), run(1.0, 1.0)])
    other = Cell("two", level(2), [run(0.5, 0.5), run(0.5, 2.0), run(0.5, 0.25)])
    found = {ratio.figure: ratio for ratio in ratios([first, other], Goals())}
    speed = found["output tok/s"]
    assert (speed.median, speed.least, speed.most, speed.rounds) == (2.0, 1.0, 4.0, 3)
    assert found["latency p50"].median == pytest.approx(2.0)
    assert {ratio.endpoint for ratio in found.values()} == {"two"}


def test_a_figure_that_is_zero_has_no_ratio() -> None:
    goals = Goals(ttft_s=0.0)
    found = ratios([Cell("one", level(1), [run(1.0, 1.0)]), Cell("two", level(1), [run(1.0, 1.0)])], goals)
    assert "goodput req/s" not in {ratio.figure for ratio in found}


@pytest.mark.parametrize(
    ("runs", "rate", "words"),
    [
        ([run(1.0, 1.0)], None, None),
        ([run(1.0, 1.0), run(1.0, 0.9)], None, None),
        ([run(1.0, 1.0), run(1.0, 2.0)], None, "goodput fell from 4.00 to 2.00"),
        ([run(1.0, 1.0, failed=1)], None, "1 of 5 requests failed"),
        ([run(1.0, 1.0), run(1.0, 1.0)], 8.0, "4.00 of 8 requests"),
        ([run(0.1, 1.0), run(2.0, 1.0)], 4.0, "time to first token"),
    ],
)
def test_saturation_is_noticed_and_explained(runs: list[Run], rate: float | None, words: str | None) -> None:
    levels = [(Level(concurrency=None if rate else 1, rate=rate, num_requests=4), summarize(one)) for one in runs]
    reason = sweep.saturation(levels)
    assert (reason is None) if words is None else (words in (reason or ""))


def test_a_rate_sweep_doubles_all_endpoints_and_closes_in_on_each(monkeypatch: pytest.MonkeyPatch) -> None:
    capacity = {"one": 5.5, "two": 1.5}
    tried: dict[str, list[float]] = {"one": [], "two": []}

    def measured(endpoints: list[Endpoint], at: Level, index: int, plan: Plan) -> list[Cell]:
        assert at.rate is not None
        for endpoint in endpoints:
            tried[endpoint.name].append(at.rate)
        return [Cell(one.name, at, [run(0.1, 4 / min(at.rate, capacity[one.name]))]) for one in endpoints]

    monkeypatch.setattr(sweep, "measure_level", measured)
    endpoints: list[Endpoint] = [Endpoint(name, None) for name in capacity]  # type: ignore[arg-type]
    plan = Plan(conversations=lambda seed: iter(()))
    cells, reasons = sweep.sweep(
        endpoints, plan, lambda rate: Level(rate=rate, num_requests=4), 0.5, 9, report=lambda cell: None
    )
    assert tried["one"] == [0.5, 1.0, 2.0, 4.0, 8.0, 6.0, 7.0]
    assert tried["two"][:3] == [0.5, 1.0, 2.0]
    assert all(1.0 < rate < 2.0 for rate in tried["two"][3:])
    assert [cell.level.load for cell in cells] == sorted(cell.level.load for cell in cells)
    assert "5.50 of 8 requests" in reasons["one"]
    assert "1.50 of 2 requests" in reasons["two"]
    compared = {ratio.level for ratio in ratios(cells, Goals())}
    assert compared == {"0.5 req/s", "1 req/s", "2 req/s"}  # what both were asked to do
    assert sweep.best([cell for cell in cells if cell.endpoint == "one"], Goals()).level.rate in (6.0, 7.0, 8.0)


def test_a_plot_has_a_line_per_series_within_its_frame() -> None:
    text = draw("Title", "x", "y", [Line("a", [(1, 2), (1000, 4)]), Line("b", []), Line("c", [(3, 1)])], log_x=True)
    root = ElementTree.fromstring(text)
    lines = [element for element in root if element.tag.endswith("polyline")]
    assert len(lines) == 2
    _, _, width, height = (float(part) for part in root.attrib["viewBox"].split())
    for line in lines:
        for point in line.attrib["points"].split():
            x, y = map(float, point.split(","))
            assert 0 <= x <= width
            assert 0 <= y <= height
    assert "no data" in draw("Title", "x", "y", [])
    assert cumulative([1.0, 2.0, 4.0]) == [(1.0, 0.0), (2.0, 50.0), (4.0, 100.0)]


def test_page_and_terminal_show_cells_ratios_and_troubles() -> None:
    facts = {"time": "t", "cores": 2, "processor": "<p>", "kvasir": "1", "command": "kvasir bench"}
    timeline = Timeline([0.0, 0.5], {"running": [1.0, 2.0], "blocks in use": [None, 7.0]})
    found = result_file.Results(facts, {"seed": 0})
    cells = [
        Cell("one", level(2), [run(1.0, 1.0)], [timeline, timeline]),
        Cell("two", level(2), [run(1.0, 0.5, failed=1)]),
    ]
    found.add(cells, Goals())
    assert found.failed == 1
    html = page.html(found, "a <title>")
    assert html.count("<svg") == 3 + 3 + 2 * 2  # distributions, rates, the timelines of one endpoint's two rounds
    assert "2 in flight, round 2" in html
    assert all(
        text in html for text in ("&lt;p&gt;", "a &lt;title&gt;", "2 in flight", "timeout 1", "2.00", "Cache blocks")
    )
    text = terminal.text(found)
    assert all(part in text for part in ("timeout 1", "2 in flight", "multiples of one", "2.00"))


def test_results_of_another_version_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    found = result_file.Results({"time": "t"}, {})
    found.add([Cell("one", level(2), [run(1.0, 1.0)])], Goals())
    result_file.write(found, path)
    assert result_file.read(path) == found
    path.write_text(path.read_text().replace(result_file.SCHEMA, "kvasir-bench/1"))
    with pytest.raises(result_file.ResultsError, match="kvasir-bench/1"):
        result_file.read(path)


def test_the_command_is_kept_without_keys() -> None:
    words = ["/somewhere/kvasir", "bench", "--api-key", "secret", "--api-key=secret", "--rate", "4"]
    assert command(words) == "kvasir bench --api-key ... --api-key=... --rate 4"


def test_metrics_of_several_servers_are_understood() -> None:
    own = (
        '# TYPE x gauge\nkvasir_requests_running{model="a"} 3.0\nkvasir_requests_running{model="b"} 1.0\n'
        'kvasir_kv_blocks{model="a",state="active"} 5.0\nkvasir_kv_blocks{model="a",state="free"} 9.0\n'
        'kvasir_engine_step_requests_sum{model="a"} 12.0\nkvasir_engine_step_requests_count{model="a"} 4.0\n'
    )
    assert read_gauges(own) == {"running": 4.0, "blocks in use": 5.0}
    assert read_rows(own) == (12.0, 4.0)
    assert read_gauges('vllm:num_requests_waiting{engine="0"} 2.0') == {"waiting": 2.0}
    assert read_gauges("llamacpp:requests_processing 1") == {"running": 1.0}
    assert read_rows("nothing 1") is None


def test_streams_that_lost_doubled_or_merged_events_are_told_apart() -> None:
    def stream(pieces: list[bytes], late_s: float = 0.25) -> Stream:
        made = Stream()
        for i, piece in enumerate(pieces):
            made.read(b'data: {"delta":{"content":"' + piece + b'"}}\n\n', 8.0 + i * 2 + late_s)
        made.read(b"data: [DONE]\n\n", 20.0)
        return made

    good, merged, lost = stream([b"a", b"b", b"c"]), stream([b"a", b"bc"]), stream([b"a", b"c"])
    cut = stream([b"a", b"b", b"c"], late_s=0.5)
    cut.is_done = False
    found = figures([good, merged, lost, cut], b"abc", 3, 2.0, 10.0, 5.0)
    assert (found.incomplete, found.wrong, found.merged, found.after_next_step) == (1, 1, 2, 0)
    assert (found.lateness_p50_ms, found.lateness_max_ms, found.core_busy) == (500.0, 500.0, 0.5)
    assert not found.is_faultless
    assert lateness_s([8.1, 10.5, 14.5], 2.0) == pytest.approx([0.5, 2.5])


def test_the_table_of_drafters_is_put_where_the_document_says() -> None:
    gains = {("off", "code", 1): Gain(1.0, None), ("ngram", "code", 1): Gain(1.5, 2.25)}
    table = markdown(gains, ["eagle"], ["code"], [1, 4], "measured somewhere")
    assert "| `ngram` | **1.50** (2.25) | not measured |" in table
    assert "| `eagle` | not offered | |" in table
    document = f"before\n{BEGIN}\nold\n{END}\nafter\n"
    assert replaced(document, table) == f"before\n{BEGIN}\n\n{table}\n\n{END}\nafter\n"
    assert replaced(replaced(document, "x"), table) == replaced(document, table)
    with pytest.raises(ValueError, match="add them"):
        replaced("nothing", table)
