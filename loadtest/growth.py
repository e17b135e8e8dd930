"""How the cost of a step grows: with requests, with context, with blocks in the prefix cache.

    python -m loadtest.growth --out docs/growth               # both parts
    python -m loadtest.growth --parts control                 # scheduler and pool alone
    python -m loadtest.growth --parts engine --contexts 256 4096 16384

Two parts. "control": scheduler, block pool and prefix cache with a runner that answers at once and a clock that stands
still, so that nothing but their own work is timed. "engine": a random model of two layers, every stage, of which all
that is not the model's forward and logits is shown. Processor time of one thread; each figure is the median step.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from engine.config import CacheConfig, Config, ModelConfig, RuntimeConfig, SchedulerConfig
from engine.mimir import model_path
from engine.scheduling.plan import ChunkResult, StepPlan, StepResult
from engine.scheduling.scheduler import Scheduler
from engine.types import EngineRequest, SamplingParams
from loadtest import step_cost
from loadtest.chart import Line, draw
from loadtest.kv_policies import small_model

BLOCK_SIZE = 16
MAX_TOKENS = 400
REQUESTS = (1, 4, 16, 64, 256, 1024)
CONTEXTS = (256, 1024, 4096, 16384, 65536, 131072)
PREFIX_BLOCKS = (1_000, 10_000, 100_000, 1_000_000)
ENGINE_REQUESTS = (1, 4, 16, 64, 256)
ENGINE_CONTEXTS = (256, 1024, 4096, 16384)
CONTEXT_ROWS, PROMPT_TOKENS = 8, 64
LABELS = {"control": "scheduler and pool", "engine": "all but the model"}
TITLES = {
    "requests": "a decode step by running requests",
    "context": f"a decode step of {CONTEXT_ROWS} requests by tokens of context",
    "prefix blocks": "a prompt of 65 blocks, 64 of them cached, by blocks in the cache",
}


@dataclass(frozen=True)
class Point:
    """us: microseconds of a step, or of admitting a request, outside of the model."""

    part: str
    axis: str
    value: int
    us: float


def answer(plan: StepPlan) -> StepResult:
    """What a runner would give back that takes no time: token 1 for every row that chooses."""
    return StepResult(chunks=tuple([ChunkResult(token_ids=(1,) if chunk.is_sampling else ()) for chunk in plan.chunks]))


def decode_us(num_rows: int, context: int, num_steps: int = 48) -> float:
    """A step of scheduler and pool in which so many requests of that context decode one token each."""
    scheduler = _scheduler(num_rows, num_blocks=num_rows * ((context + MAX_TOKENS) // BLOCK_SIZE + 2) + 2)
    for i in range(num_rows):
        scheduler.add(_request(f"r{i}", [i, *range(context - 1)], MAX_TOKENS))
    while any(request.num_remaining_tokens > 1 for request in _step(scheduler).roster.running):
        pass
    return _median_us(lambda: _step(scheduler), num_steps)


def admission_us(num_blocks: int, num_requests: int = 40) -> float:
    """From `add` to the commit of the first token, for prompts of 65 blocks of which 64 are in a cache of that size."""
    scheduler = _scheduler(1, num_blocks=num_blocks + 200)
    chains = max(1, num_blocks // 64)
    for chain in range(chains):
        scheduler.add(_request(f"fill-{chain}", _prompt(chain), 1))
        while scheduler.has_work:
            _step(scheduler)
    seconds = []
    for i in range(num_requests):
        request = _request(f"new-{i}", [*_prompt((i * 7919) % chains), i, *range(BLOCK_SIZE - 2)], 1)
        started = time.thread_time()
        scheduler.add(request)
        while scheduler.has_work:
            _step(scheduler)
        seconds.append(time.thread_time() - started)
    return 1e6 * statistics.median(seconds)


def _prompt(chain: int) -> list[int]:
    """64 whole blocks and one token that the last step needs."""
    return [chain % 50_000, chain // 50_000, *range(64 * BLOCK_SIZE - 2), 7]


def _scheduler(num_rows: int, num_blocks: int) -> Scheduler:
    return Scheduler(
        SchedulerConfig(
            max_num_seqs=num_rows,
            max_num_batched_tokens=1 << 24,
            max_waiting_requests=1 << 20,
            max_waiting_pools=1e9,
        ),
        CacheConfig(block_size=BLOCK_SIZE),
        num_blocks=num_blocks,
        max_model_len=1 << 20,
        clock=lambda: 0.0,
    )


def _request(name: str, prompt: list[int], max_tokens: int) -> EngineRequest:
    sampling = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)
    return EngineRequest(request_id=name, prompt_token_ids=prompt, sampling=sampling)


def _step(scheduler: Scheduler) -> Scheduler:
    plan = scheduler.schedule()
    scheduler.commit(plan, answer(plan))
    return scheduler


def _median_us(call: Callable[[], object], count: int) -> float:
    seconds = []
    for _ in range(count):
        started = time.thread_time()
        call()
        seconds.append(time.thread_time() - started)
    return 1e6 * statistics.median(seconds)


def control(requests: Sequence[int], contexts: Sequence[int], prefix_blocks: Sequence[int]) -> list[Point]:
    points = [Point("control", "requests", count, decode_us(count, PROMPT_TOKENS)) for count in requests]
    points += [Point("control", "context", context, decode_us(CONTEXT_ROWS, context)) for context in contexts]
    points += [Point("control", "prefix blocks", count, admission_us(count)) for count in prefix_blocks]
    return points


def engine(requests: Sequence[int], contexts: Sequence[int]) -> list[Point]:
    """With the random model: a step's time outside of the model."""
    with small_model() as folder:
        places = [("requests", count, count, PROMPT_TOKENS) for count in requests]
        places += [("context", context, CONTEXT_ROWS, context) for context in contexts]
        return [
            Point("engine", axis, value, _engine_us(str(folder), num_rows, context))
            for axis, value, num_rows, context in places
        ]


def _engine_us(folder: str, num_rows: int, context: int, num_steps: int = 40) -> float:
    from engine.launch import build_core

    length = context + num_steps + 2 * num_rows + step_cost.WARM_UP_STEPS + 2
    core, _ = build_core(
        Config(
            model=ModelConfig(model=folder, tokenizer=str(model_path()), max_model_len=length),
            cache=CacheConfig(block_size=BLOCK_SIZE, num_blocks=num_rows * (length // BLOCK_SIZE + 1) + 2),
            scheduler=SchedulerConfig(max_num_seqs=num_rows),
            runtime=RuntimeConfig(threads=1, load_format="dummy"),
        )
    )
    gc.collect()
    stages = step_cost.measure(core, num_rows, prompt_tokens=context, num_steps=num_steps, sampled=False)
    return stages["outside the model"]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="How the cost of a step outside of the model grows.")
    parser.add_argument("--parts", nargs="+", default=["control", "engine"], choices=["control", "engine"])
    parser.add_argument("--requests", type=int, nargs="+", default=None)
    parser.add_argument("--contexts", type=int, nargs="+", default=None)
    parser.add_argument("--prefix-blocks", type=int, nargs="+", default=list(PREFIX_BLOCKS))
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="write growth.json and the pictures there")
    arguments = parser.parse_args(argv)
    points: list[Point] = []
    if "control" in arguments.parts:
        points += control(arguments.requests or REQUESTS, arguments.contexts or CONTEXTS, arguments.prefix_blocks)
    if "engine" in arguments.parts:
        points += engine(arguments.requests or ENGINE_REQUESTS, arguments.contexts or ENGINE_CONTEXTS)
    for point in points:
        print(f"{point.part:<8} {point.axis:<14} {point.value:>9,} {point.us:>10,.1f} us")
    if arguments.out:
        write(points, arguments.out)
    return 0


def write(points: Sequence[Point], folder: Path) -> None:
    """growth.json, and a picture for each axis."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "growth.json").write_text(json.dumps([asdict(point) for point in points], indent=2) + "\n")
    for axis, title in TITLES.items():
        lines = [
            Line(f"{part}: {LABELS[part]}", [(p.value, p.us) for p in points if (p.part, p.axis) == (part, axis)])
            for part in LABELS
        ]
        picture = draw(title, axis, "microseconds", lines, log_x=True)
        (folder / f"{axis.replace(' ', '-')}.svg").write_text(picture + "\n")


if __name__ == "__main__":
    sys.exit(main())
