"""`kvasir batch FILE -o OUT`: the lines of a batch file through an engine of its own, without a server.

Results go to OUT as they come; a run that was interrupted goes on where it stopped.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from engine.config import Config
from engine.errors import ConfigError, EngineDead
from server.app import create_app, make_context
from server.batches.executor import Executor
from server.batches.lines import Line, Scan, read_line, scan
from server.batches.store import Result
from server.lifecycle import run_loop

NO_TIME_LIMIT_S = 1e9
SHOWN_PROBLEMS = 10
FAILED_LINES_CODE = 1


def run(config: Config, source: Path, target: Path) -> int:
    """Returns 0 when every line has an answer, 1 when some have errors. Raises ConfigError when nothing can run."""
    found = _scanned(source, config)
    kept = _kept(target, {line.custom_id: line for line in found.lines})
    lines = [line for line in found.lines if line.custom_id not in kept]
    if kept:
        print(f"{target} has {len(kept)} of {len(found.lines)} answers; running the rest", file=sys.stderr)
    num_failed = run_loop(_run(_offline(config), source, target, lines, num_kept=len(kept))) if lines else 0
    _sort(target, found.lines)
    print(f"{len(found.lines) - num_failed} answers and {num_failed} errors in {target}", file=sys.stderr)
    return FAILED_LINES_CODE if num_failed else 0


async def _run(config: Config, source: Path, target: Path, lines: Sequence[Line], *, num_kept: int) -> int:
    """Returns the number of lines that failed."""
    from engine.client import AsyncEngine

    engine = AsyncEngine(config)
    context = make_context(engine, config)
    create_app(engine, config, context)
    assert context.api is not None
    num_failed = 0
    await engine.start()
    try:
        await engine.wait_ready()
        with (
            target.open("ab") as file,
            tqdm(total=num_kept + len(lines), initial=num_kept, unit="request", disable=None) as bar,
        ):

            async def read(line: Line) -> dict[str, Any]:
                return read_line(source, line, config.limits)

            async def keep(result: Result) -> None:
                nonlocal num_failed
                num_failed += result.is_error
                file.write(result.record + b"\n")
                file.flush()
                bar.update()

            await Executor(context, context.api, rows=1.0, memory=1.0).run(lines, read, keep, tenant="")
    except EngineDead as error:
        raise ConfigError(f"{error}; start the command again to go on") from None
    finally:
        await engine.stop(0.0)
    return num_failed


def _offline(config: Config) -> Config:
    """Nobody waits for an answer here: requests may take as long as they take. Nothing is kept beside OUT."""
    scheduler = dataclasses.replace(config.scheduler, max_queue_wait_s=NO_TIME_LIMIT_S, max_request_s=NO_TIME_LIMIT_S)
    return dataclasses.replace(config, scheduler=scheduler, server=dataclasses.replace(config.server, data_folder=None))


def _scanned(source: Path, config: Config) -> Scan:
    limits = dataclasses.replace(config.limits, max_batch_lines=sys.maxsize)
    try:
        found = scan(source, limits, None)
    except OSError as error:
        raise ConfigError(f"cannot read {source}: {error.strerror}") from None
    if found.problems:
        told = [
            f"{'' if problem.line is None else f'line {problem.line}: '}{problem.message}"
            for problem in found.problems[:SHOWN_PROBLEMS]
        ]
        more = len(found.problems) - len(told)
        raise ConfigError("\n  ".join([f"{source} cannot be run", *told, *([f"and {more} more"] if more else [])]))
    return found


def _kept(target: Path, lines: dict[str, Line]) -> set[str]:
    """The custom ids that have an answer in OUT; everything else in it is taken out: errors are tried again.

    Raises ConfigError when OUT holds something else.
    """
    if not target.exists():
        with contextlib.suppress(FileExistsError), _told(target):
            target.touch(0o600)
        return set()
    kept: set[str] = set()
    with _told(target), _replaced(target) as fresh, target.open("rb") as old:
        for number, data in enumerate(old, start=1):
            record = _record(data)
            if record is None and not data.endswith(b"\n"):
                break  # the process was ended while it wrote this
            custom_id = None if record is None else record.get("custom_id")
            if record is None or custom_id not in lines:
                raise ConfigError(
                    f"line {number} of {target} is no result of this input; give another file with -o, or remove it"
                )
            response = record.get("response")
            if isinstance(response, dict) and response.get("status_code") == 200 and custom_id not in kept:
                kept.add(custom_id)
                fresh.write(data if data.endswith(b"\n") else data + b"\n")
    return kept


def _sort(target: Path, lines: Sequence[Line]) -> None:
    """Brings the results into the order of the input."""
    places: dict[str, tuple[int, int]] = {}
    with _replaced(target) as fresh, target.open("rb") as old:
        while data := old.readline():
            record = _record(data)
            assert record is not None, "every line of it has been written or checked by this process"
            places[record["custom_id"]] = (old.tell() - len(data), len(data))
        for line in lines:
            start, size = places[line.custom_id]
            old.seek(start)
            fresh.write(old.read(size))


@contextlib.contextmanager
def _replaced(target: Path) -> Iterator[Any]:
    """A new content, which takes the place of the old one when it is complete."""
    fresh = target.with_name(f"{target.name}.new")
    with fresh.open("wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
    fresh.replace(target)


@contextlib.contextmanager
def _told(target: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ConfigError(f"cannot write {target}: {error.strerror}") from None


def _record(data: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(data)
    except ValueError:
        return None
    return record if isinstance(record, dict) else None
