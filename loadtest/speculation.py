"""`kvasir bench --speculation`: what each drafter gains over no speculation, by kind of work and batch size.

    kvasir bench --speculation --write docs/speculation.md
    kvasir bench --speculation --quick

In a round all settings take turns on the same prompts, which every server has in its prefix cache before, so that
what is compared is decoding. Ratios are medians over the rounds of tokens per second to the same server with
speculation off. Answers are greedy; each is compared with the one without speculation.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import json
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from tqdm import tqdm

from loadtest import scenes
from loadtest.client import Request, Run, Target
from loadtest.endpoints import BenchError, model_card
from loadtest.environment import environment
from loadtest.load import Load, drive
from loadtest.options import OUT, positive, positive_float
from loadtest.own_server import ServerStartError, own_server
from loadtest.speculation_table import BEGIN, END, Gain, markdown, replaced
from loadtest.workloads import single

SCHEMA = "kvasir-bench-speculation/1"
KINDS = ("chat", "code", "edit", "summary", "json")
BATCHES = (1, 4, 16, 64)
DRAFTERS = ("ngram", "suffix", "token_recycling", "lookahead", "aded", "goose", "draft_model", "eagle")
FIXED = ("suffix", "draft_model", "eagle")  # also with a budget that does not follow the load
BUDGETS = {
    "auto": ("--speculative-budget", "auto"),
    "fixed": ("--speculative-budget", "fixed", "--speculative-max-rows", "64"),
}
OFF = "off"
PROMPT_TOKENS, OUTPUT_TOKENS = 256, 96
LEAST_REQUESTS = 4
WARMUP_BATCH, WARMUP_ROUND = 4, 10_000
NOT_OFFERED = "http 400"


@dataclass(frozen=True, eq=False)  # told apart as objects, so that it can be a key
class Setting:
    """One drafter on one server."""

    drafter: str
    budget: str
    target: Target

    @property
    def label(self) -> str:
        return self.drafter if self.budget == "auto" or self.drafter == OFF else f"{self.drafter}, {self.budget}"


@dataclass
class Tally:
    """What the rounds of one setting, kind and batch size came to."""

    speeds: list[float] = field(default_factory=list)  # output tokens per second
    ratios: list[float] = field(default_factory=list)
    steps: int = 0  # that checked a guess
    drafted: int = 0
    accepted: int = 0
    answers: int = 0
    different: int = 0  # answers unlike those without speculation

    @property
    def acceptance_length(self) -> float | None:
        return 1 + self.accepted / self.steps if self.steps else None

    def gain(self) -> Gain | None:
        return Gain(statistics.median(self.ratios), self.acceptance_length) if self.ratios else None

    def to_json(self) -> dict[str, Any]:
        gain = self.gain()
        spread = [min(self.ratios), max(self.ratios)] if self.ratios else None
        ratio = None if gain is None else gain.ratio
        return {
            **dataclasses.asdict(self),
            "ratio": ratio,
            "spread": spread,
            "acceptance_length": self.acceptance_length,
        }


Place = tuple[str, str, int]  # label of a setting, kind, batch size


def main(argv: Sequence[str]) -> int:
    """Returns 1 when an answer differs from the one without speculation, 2 when nothing could be measured."""
    arguments = _parser().parse_args(argv)
    if arguments.quick:
        arguments.kinds, arguments.batches, arguments.rounds = ["code", "edit"], [1, 16], 1
        arguments.drafters = [name for name in arguments.drafters if name in ("ngram", "suffix", "draft_model")]
    try:
        with ExitStack() as stack:
            settings, missing = _offered(_settings(stack, arguments))
            tallies = measure(settings, arguments)
        table = _table(tallies, missing, arguments)
        _write(tallies, missing, arguments)
        print(table)
        if arguments.write is not None:
            text = arguments.write.read_text(encoding="utf-8")
            arguments.write.write_text(replaced(text, table), encoding="utf-8")
    except (BenchError, ServerStartError, OSError, ValueError) as error:
        print(f"kvasir bench --speculation: {error}", file=sys.stderr)
        return 2
    different = sum(tally.different for tally in tallies.values())
    if different:
        print(f"{different} answers differ from those without speculation", file=sys.stderr)
    return 1 if different else 0


def _settings(stack: ExitStack, arguments: argparse.Namespace) -> list[Setting]:
    """Of each server, first the one without speculation."""
    fixed = [name for name in arguments.fixed if name in arguments.drafters]
    wanted = {"auto": arguments.drafters, "fixed": fixed}
    urls = {"auto": arguments.url}
    if arguments.url is None:
        # a whole batch comes in one moment, each request with a schema of its own
        flags = ["--model", arguments.model, "--max-queued-constraints", str(max(arguments.batches))]
        flags += arguments.serve_args.split()
        urls = {
            budget: stack.enter_context(own_server([*flags, *BUDGETS[budget]])) for budget in BUDGETS if wanted[budget]
        }
    found = []
    for budget, url in urls.items():
        name, _ = model_card(url, None, None)
        for drafter in (OFF, *wanted[budget]):
            extra = {"speculative": {"off": True} if drafter == OFF else {"drafters": [drafter]}}
            target = Target(url=url, model=name, ignore_eos=False, extra=extra, stream=False)
            found.append(Setting(drafter, budget, target))
    return found


def _offered(settings: Sequence[Setting]) -> tuple[list[Setting], dict[str, str]]:
    """Those that their server takes; of the others, by label, what it said."""
    found, missing = [], {}
    probe = [Request(prompt="one two three one two", max_tokens=2)]
    for setting in settings:
        (record,) = _run(setting, probe, 1).records
        if record.error_kind == NOT_OFFERED and setting.drafter != OFF:
            missing[setting.label] = str(record.error)
        elif record.error is not None:
            raise BenchError(f"a first request with {setting.label} failed: {record.error}")
        else:
            found.append(setting)
    return found, missing


def measure(settings: Sequence[Setting], arguments: argparse.Namespace) -> dict[Place, Tally]:
    """Round by round, until the rounds or the time are over; a group that was begun is finished."""
    deadline = time.monotonic() + arguments.minutes * 60
    tallies: dict[Place, Tally] = {}
    for kind in arguments.kinds:  # budgets and what drafters learn are warm before anything counts
        for setting in settings:
            _run(setting, _requests(kind, WARMUP_BATCH, WARMUP_ROUND, arguments), WARMUP_BATCH)
    groups = [
        (r, kind, batch) for r in range(arguments.rounds) for kind in arguments.kinds for batch in arguments.batches
    ]
    with tqdm(total=len(groups) * len(settings), unit="run", disable=None) as bar:
        for number, kind, batch in groups:
            if time.monotonic() > deadline:
                print(f"{arguments.minutes:g} minutes are over in round {number + 1}", file=sys.stderr)
                break
            requests = _requests(kind, batch, number, arguments)
            for runs in _group(settings, requests, batch):
                _count(runs, kind, batch, tallies)
                bar.update(len(runs))
    return tallies


def _group(settings: Sequence[Setting], requests: Sequence[Request], batch: int) -> Iterator[dict[Setting, Run]]:
    """The runs of one round, server by server."""
    for budget in dict.fromkeys(setting.budget for setting in settings):
        here = [setting for setting in settings if setting.budget == budget]
        prompts = [dataclasses.replace(request, max_tokens=1) for request in requests]
        _run(here[0], prompts, batch)  # into the prefix cache
        yield {setting: _run(setting, requests, batch) for setting in here}


def _count(runs: dict[Setting, Run], kind: str, batch: int, tallies: dict[Place, Tally]) -> None:
    off, base = next((setting, run) for setting, run in runs.items() if setting.drafter == OFF)
    speed_off = _speed(base)
    expected = sorted((record.prompt_tokens, record.answer.text) for record in base.records)
    for setting, run in runs.items():
        if setting.drafter == OFF and off.budget != "auto":
            continue
        tally = tallies.setdefault((setting.label, kind, batch), Tally())
        tally.speeds.append(_speed(run))
        tally.ratios.append(tally.speeds[-1] / speed_off)
        got = sorted((record.prompt_tokens, record.answer.text) for record in run.records)
        tally.answers += len(got)
        tally.different += sum(one != other for one, other in zip(expected, got, strict=True))
        for record in run.records:
            used = record.speculative or {}
            tally.steps += used.get("steps", 0)
            tally.drafted += used.get("drafted", 0)
            tally.accepted += used.get("accepted", 0)


def _speed(run: Run) -> float:
    return sum(record.output_tokens for record in run.records) / run.duration_s


def _requests(kind: str, batch: int, number: int, arguments: argparse.Namespace) -> list[Request]:
    """The prompts of a round, which no other round or batch size has."""
    sizes = scenes.Sizes(
        prompt_tokens=arguments.prompt_tokens, output_tokens=arguments.output_tokens, seed=number * 100 + batch
    )
    found = islice(scenes.conversations(kind, sizes), max(batch, LEAST_REQUESTS))
    return [next(conversation.turns) for conversation in found]


def _run(setting: Setting, requests: Sequence[Request], batch: int) -> Run:
    """Raises BenchError when a request of several failed."""
    load = Load(num_requests=len(requests), concurrency=batch)
    run = asyncio.run(drive(setting.target, (single(request) for request in requests), load))
    failed = [record.error for record in run.records if record.error is not None]
    if failed and len(requests) > 1:
        raise BenchError(f"{len(failed)} of {len(requests)} requests with {setting.label} failed: {failed[0]}")
    return run


def _table(tallies: dict[Place, Tally], missing: dict[str, str], arguments: argparse.Namespace) -> str:
    gains = {place: gain for place, tally in tallies.items() if (gain := tally.gain()) is not None}
    rounds = min((len(tally.ratios) for tally in tallies.values()), default=0)
    where = environment()
    about = (
        f"{where['cores']} cores of {where['processor']}, Kvasir {where['kvasir']}, {arguments.model}; medians of "
        f"{rounds} round{'' if rounds == 1 else 's'}, about {arguments.prompt_tokens} tokens in and at most "
        f"{arguments.output_tokens} out, greedy."
    )
    return markdown(gains, list(missing), arguments.kinds, arguments.batches, about)


def _write(tallies: dict[Place, Tally], missing: dict[str, str], arguments: argparse.Namespace) -> None:
    rows = [
        {"setting": label, "kind": kind, "batch": batch, **tally.to_json()}
        for (label, kind, batch), tally in tallies.items()
    ]
    content = {"schema": SCHEMA, "environment": environment(), "rows": rows, "not_offered": missing}
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "speculation.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def _parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="kvasir bench --speculation", allow_abbrev=False, description="Compare drafters with no speculation."
    )
    made.add_argument("--url", help="a running server instead of two that are started, one for each budget")
    made.add_argument("--model", default="mimir", help="what to serve (default: %(default)s)")
    made.add_argument("--serve-args", default="", help="further flags for `kvasir serve`, as one string")
    made.add_argument("--drafters", nargs="+", default=list(DRAFTERS), metavar="NAME")
    made.add_argument("--fixed", nargs="*", default=list(FIXED), metavar="NAME", help="also with the fixed budget")
    made.add_argument("--kinds", nargs="+", default=list(KINDS), choices=list(scenes.SCENES), metavar="NAME")
    made.add_argument("--batches", nargs="+", type=positive, default=list(BATCHES), metavar="N")
    made.add_argument("--rounds", type=positive, default=3, help="default: %(default)s")
    made.add_argument("--prompt-tokens", type=positive, default=PROMPT_TOKENS, help="default: %(default)s")
    made.add_argument("--output-tokens", type=positive, default=OUTPUT_TOKENS, help="default: %(default)s")
    made.add_argument("--minutes", type=positive_float, default=25.0, help="no group begins later (%(default)s)")
    made.add_argument("--quick", action="store_true", help="two kinds, two batch sizes, three drafters, one round")
    made.add_argument("--out", type=Path, default=Path(OUT), help="folder of speculation.json (%(default)s)")
    made.add_argument("--write", type=Path, metavar="FILE", help=f"put the table between {BEGIN} and {END}")
    return made
