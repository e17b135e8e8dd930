"""`kvasir frontier`: runs every policy at every budget on every task and writes a table, JSON and pictures.

    kvasir frontier --out docs/frontier
    kvasir frontier --model FOLDER --out FOLDER --policies snapkv tova --ratios 0.25

Prompts of a task stay in the prefix cache from policy to policy, which changes no answer. What a policy costs is
measured apart, in processor time of one thread.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from engine.errors import ConfigError
from engine.launch import resolve_model_path
from engine.version import __version__
from loadtest.frontier import picture, table
from loadtest.frontier.engine import DECODE_ROWS, DECODE_TOKENS, SETTLED, Bench
from loadtest.frontier.policies import EVICTING, FORMATS, RATIOS, READING, settings
from loadtest.frontier.samples import TASKS, Mode, Sample, TaskSpec, Writer, make_samples

ROOM = DECODE_TOKENS + SETTLED + 6 * DECODE_ROWS + 100  # tokens of output that a prompt leaves room for
QUICK_SIZE, QUICK_SAMPLES = 128, 2
POLICIES = (*EVICTING, *READING, "raas", *FORMATS)
JSON_NAME, TABLE_NAME = "frontier.json", "table.md"


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _parser().parse_args(argv)
    started = time.process_time()
    tasks = [_sized(task, arguments) for task in TASKS if task.name in arguments.tasks]
    writer = Writer(resolve_model_path(arguments.model))
    jobs = [
        Job(task, mode, make_samples(writer, task, mode, max(arguments.samples, DECODE_ROWS)))
        for task in tasks
        for mode in task.modes
    ]
    longest = max(len(sample.token_ids) for job in jobs for sample in job.samples)
    bench = Bench(arguments.model, writer.tokenizer, longest + ROOM, arguments.samples)
    rows = measure(bench, jobs, arguments)
    used = {
        "version": __version__,
        "model": Path(arguments.model).name,
        "samples": arguments.samples,
        "sizes": {task.name: task.size for task in tasks},
        "cpu_seconds": round(time.process_time() - started, 1),
    }
    write(rows, used, Path(arguments.out))
    print(table.markdown(rows), end="")
    return 0


@dataclass(frozen=True)
class Job:
    task: TaskSpec
    mode: Mode
    samples: list[Sample]


def measure(bench: Bench, jobs: Sequence[Job], arguments: argparse.Namespace) -> list[table.Row]:
    """Task by task, so that the prompts of one stay in the prefix cache while the settings take turns."""
    wanted = settings(tuple(arguments.ratios), tuple(arguments.policies))
    rows = [table.Row(setting) for setting in wanted]
    with tqdm(total=(len(jobs) + 1) * len(rows), unit="cell", disable=None) as bar:
        for job in jobs:
            for row in rows:
                if row.setting.applies_to(job.task, job.mode):
                    samples = job.samples[: arguments.samples]
                    row.quality[job.task.name, job.mode] = bench.quality(samples, row.setting, job.task)
                bar.update()
        longest = max(jobs, key=lambda job: job.task.size)
        for row in rows:
            row.cost = bench.cost(longest.samples, row.setting)
            bar.update()
    return rows


def write(rows: Sequence[table.Row], used: dict[str, Any], folder: Path) -> None:
    """Raises ConfigError for a folder that cannot be written to."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / TABLE_NAME).write_text(table.markdown(rows), encoding="utf-8")
        content = {"settings": used, "rows": [row.to_json() for row in rows]}
        (folder / JSON_NAME).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        for task in dict.fromkeys(task for task, _ in table.columns(rows)):
            (folder / f"{task}.svg").write_text(picture.draw(task, rows), encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot write to {folder}: {error.strerror}; name another folder with --out") from error


def _sized(task: TaskSpec, arguments: argparse.Namespace) -> TaskSpec:
    """Quick runs are for tests: they show that everything works and measure nothing."""
    if not arguments.quick:
        return dataclasses.replace(task, size=arguments.size or task.size)
    arguments.samples = min(arguments.samples, QUICK_SAMPLES)
    return dataclasses.replace(task, size=min(task.size, QUICK_SIZE), max_new_tokens=min(task.max_new_tokens, 8))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="kvasir frontier",
        allow_abbrev=False,
        description="Quality of cache policies against the memory that they leave, through the running engine.",
    )
    parser.add_argument("--model", default="mimir", help="bundled model or checkpoint folder (default: %(default)s)")
    parser.add_argument("--out", default="docs/frontier", metavar="FOLDER", help="default: %(default)s")
    parser.add_argument("--policies", nargs="+", default=list(POLICIES), choices=POLICIES, metavar="NAME")
    parser.add_argument("--ratios", nargs="+", type=_ratio, default=list(RATIOS), help="shares of the prompt kept")
    names = [task.name for task in TASKS]
    parser.add_argument("--tasks", nargs="+", default=names, choices=names, metavar="NAME")
    parser.add_argument("--size", type=_positive, help="tokens of a prompt, in every task; default: the task's own")
    parser.add_argument("--samples", type=_positive, default=8, help="prompts per task (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="a few short prompts, to see that it works")
    return parser


def _ratio(text: str) -> float:
    value = float(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is no share: above 0, at most 1")
    return value


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is below 1")
    return value


if __name__ == "__main__":
    sys.exit(main())
