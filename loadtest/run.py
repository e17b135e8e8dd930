"""`kvasir bench`: chosen workloads and loads against one or several OpenAI-compatible servers.

    kvasir bench
    kvasir bench --url http://127.0.0.1:8000 --workload chat --rate 2 4 8 --slo-ttft-ms 500

Without --url a server with the bundled model is started, measured and stopped.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from loadtest import page, result_file, scenes, sweep, terminal, trace
from loadtest.arrivals import recorded
from loadtest.client import Record, Request, Target, connect, send
from loadtest.endpoints import BenchError, Served, names_of, served
from loadtest.environment import environment
from loadtest.measure import Cell, Endpoint, Level, Plan, arrivals_of, measure_level, warm_up
from loadtest.options import TOKENS, parser
from loadtest.report import Goals
from loadtest.workloads import Conversation, Workload

DEFAULT_LEVELS = (1, 4, 16)
BATCH_LEVEL = 64  # an offline batch is sent all at once
REQUESTS_PER_ROW, LEAST_REQUESTS = 4, 16
SECONDS_OF_ARRIVALS = 10
PROBE_TOKENS = 256
ENDLESS = 10**9
JSON_NAME, HTML_NAME = "results.json", "report.html"


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 1 when a request failed, 2 when there was nothing to measure."""
    given = list(sys.argv[1:] if argv is None else argv)
    if "--speculation" in given:
        from loadtest.speculation import main as speculation

        given.remove("--speculation")
        return speculation(given)
    made = parser()
    arguments = made.parse_args(given)
    try:
        if arguments.compare:
            found = result_file.compare(arguments.compare)
            print(terminal.text(found))
        else:
            found = _measured(arguments)
            result_file.write(found, arguments.out / JSON_NAME)
        page.write(found, arguments.out / HTML_NAME)
    except (BenchError, result_file.ResultsError, trace.TraceError) as error:
        print(f"kvasir bench: {error}", file=sys.stderr)
        return 2
    print(f"report: {arguments.out / HTML_NAME}" + ("" if arguments.compare else f", {arguments.out / JSON_NAME}"))
    return 1 if found.failed else 0


def _measured(arguments: argparse.Namespace) -> result_file.Results:
    lines = None
    if arguments.trace is not None:
        lines = trace.read(
            arguments.trace, vocab_size=0 if arguments.text else arguments.vocab_size, seed=arguments.seed
        )
    levels = _levels(arguments, None if lines is None else len(lines))
    found = result_file.Results(environment(), _settings(arguments))
    with served(arguments, slots=max(level.concurrency or BATCH_LEVEL for level in levels)) as ready:
        print(names_of(ready.endpoints), flush=True)
        plan = _plan(arguments, ready, lines)
        for name, summary in warm_up(ready.endpoints, plan).items():
            found.warm_up[name] = {"requests": summary.requests, "failed": summary.failed}
        if arguments.sweep:
            _sweep(arguments, ready.endpoints, plan, found)
        else:
            for index, level in enumerate(levels):
                found.add(measure_level(ready.endpoints, level, index, plan), plan.goals)
    print(terminal.text(found))
    return found


def _sweep(
    arguments: argparse.Namespace, endpoints: Sequence[Endpoint], plan: Plan, found: result_file.Results
) -> None:
    def make(value: float) -> Level:
        if arguments.sweep == "rate":
            return Level(rate=value, num_requests=arguments.num_requests or _requests_at_rate(value))
        return Level(concurrency=int(value), num_requests=arguments.num_requests or _requests_in_flight(int(value)))

    def report(cell: Cell) -> None:
        row = terminal.cell_row(result_file.cell_json(cell, plan.goals))
        print("  ".join(row), flush=True)

    cells, reasons = sweep.sweep(endpoints, plan, make, arguments.sweep_from, arguments.max_levels, report=report)
    for name, reason in reasons.items():
        best = sweep.best([cell for cell in cells if cell.endpoint == name], plan.goals)
        found.stopped[name] = f"{reason}; the highest goodput was at {best.level.label}"
    found.add(cells, plan.goals)


def _levels(arguments: argparse.Namespace, num_lines: int | None) -> list[Level]:
    """One for each load that is asked for; of a sweep, the first."""
    if num_lines is not None:
        if arguments.concurrency or arguments.rate or arguments.sweep:
            raise BenchError("a trace says itself when requests are due; leave out --concurrency, --rate and --sweep")
        return [Level(num_requests=min(num_lines, arguments.num_requests or num_lines))]
    wanted = arguments.num_requests
    if arguments.rate:
        return [Level(rate=rate, num_requests=wanted or _requests_at_rate(rate)) for rate in arguments.rate]
    usual = (BATCH_LEVEL,) if arguments.workload == "batch" else DEFAULT_LEVELS
    rows = [int(arguments.sweep_from)] if arguments.sweep else (arguments.concurrency or usual)
    return [Level(concurrency=row, num_requests=wanted or _requests_in_flight(row)) for row in rows]


def _requests_in_flight(rows: int) -> int:
    return max(LEAST_REQUESTS, REQUESTS_PER_ROW * rows)


def _requests_at_rate(rate: float) -> int:
    return max(LEAST_REQUESTS, int(SECONDS_OF_ARRIVALS * rate))


def _plan(arguments: argparse.Namespace, ready: Served, lines: list[trace.Line] | None) -> Plan:
    turns = 1.0
    if lines is not None:

        def conversations(seed: int) -> Iterator[Conversation]:
            return trace.conversations(lines)

    elif arguments.workload == TOKENS:

        def conversations(seed: int) -> Iterator[Conversation]:
            return _random_tokens(arguments, ready, seed)

    else:
        density = _chars_per_token(arguments, ready)

        def conversations(seed: int) -> Iterator[Conversation]:
            return scenes.conversations(arguments.workload, _sizes(arguments, ready, seed, density))

        turns = scenes.mean_turns(conversations(arguments.seed))
    is_open = bool(arguments.rate) or arguments.sweep == "rate"
    arrivals = arrivals_of(arguments.arrivals, turns) if is_open else None
    if lines is not None:
        times = [line.timestamp for line in lines]

        def arrivals(level: Level, seed: int) -> Iterator[float]:
            return recorded(times, arguments.trace_speed)

    return Plan(
        conversations=conversations,
        arrivals=arrivals,
        goals=_goals(arguments),
        rounds=arguments.rounds or (1 if len(ready.endpoints) == 1 else 3),
        duration_s=None if lines is not None else arguments.duration_s,
        max_in_flight=arguments.max_in_flight,
        warmup=arguments.warmup,
        seed=arguments.seed,
        interval_s=arguments.metrics_interval_s,
    )


def _random_tokens(arguments: argparse.Namespace, ready: Served, seed: int) -> Iterator[Conversation]:
    workload = Workload(
        num_requests=ENDLESS,
        prompt_tokens=arguments.prompt_tokens or Workload.prompt_tokens,
        output_tokens=arguments.output_tokens or Workload.output_tokens,
        shared_prefix_tokens=arguments.shared_prefix_tokens,
        vocab_size=0 if arguments.text or not ready.takes_token_ids else arguments.vocab_size,
        seed=seed,
    )
    return workload.conversations()


def _sizes(arguments: argparse.Namespace, ready: Served, seed: int, density: float) -> scenes.Sizes:
    try:
        return scenes.SCENES[arguments.workload].sizes(
            ready.context,
            prompt_tokens=arguments.prompt_tokens,
            output_tokens=arguments.output_tokens,
            chars_per_token=density,
            seed=seed,
        )
    except ValueError as error:
        raise BenchError(str(error)) from error


def _chars_per_token(arguments: argparse.Namespace, ready: Served) -> float:
    """Of this workload's text at the first server, by its own count for a short request."""
    sizes = scenes.Sizes(prompt_tokens=min(PROBE_TOKENS, ready.context // 2), output_tokens=1)
    request = next(next(scenes.conversations(arguments.workload, sizes)).turns)
    target = ready.endpoints[0].target
    record = asyncio.run(_send_one(target, request))
    if record.error is not None:
        raise BenchError(f"a first short request failed: {record.error}")
    return scenes.num_chars(request) / max(1, record.prompt_tokens)


async def _send_one(target: Target, request: Request) -> Record:
    async with connect(target) as http:
        return await send(http, target, request)


def _goals(arguments: argparse.Namespace) -> Goals:
    return Goals(
        ttft_s=arguments.slo_ttft_ms / 1000 if arguments.slo_ttft_ms else None,
        time_per_output_token_s=arguments.slo_itl_ms / 1000 if arguments.slo_itl_ms else None,
    )


def _settings(arguments: argparse.Namespace) -> dict[str, Any]:
    plain = {key: value for key, value in vars(arguments).items() if key not in ("api_key", "compare")}
    found: dict[str, Any] = json.loads(json.dumps(plain, default=_as_text))
    return found


def _as_text(value: object) -> str:
    if not isinstance(value, Path):
        raise TypeError(f"{value!r} is no setting")
    return value.name


if __name__ == "__main__":
    sys.exit(main())
