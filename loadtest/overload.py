"""What the ladder under pressure buys: goodput and quality of an overloaded engine against preemption alone.

    python -m loadtest.overload --rounds 3

Mimir with a small pool, and requests with known answers that arrive faster than it can serve them (Poisson, from a
seed; nobody waits for an answer before asking). Every request allows its cache to shrink and writes on after its answer
to a fixed length, so that all ways do the same work. A way is a ladder; all take turns within a round, on the same
requests. A request is good when it ends within so many times what one takes alone, which is the unit of all times.
Two clocks: processor time of one thread, which other work on the machine stretches little; and steps, all counted
alike, as on a device where a step costs what reading the weights costs. Arrivals and limits go by the same clock.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.config import CacheConfig, Config, ModelConfig, RuntimeConfig, SchedulerConfig
from engine.mimir import model_path
from engine.types import EngineRequest, SamplingParams
from loadtest.frontier.samples import Sample, TaskSpec, Writer

if TYPE_CHECKING:
    from engine.core import EngineCore
    from engine.models.batch import Model

EVICTION = '{"name": "streaming_llm", "ratio": 0.5}'
WAYS = {"preemption": "", "format": "int8", "eviction": EVICTION, "ladder": f'["int8", {EVICTION}]'}
TASKS = (
    TaskSpec("needle", "needle_single", 512, ("aware",)),
    TaskSpec("multi-key", "multi_key", 384, ("aware",)),
    TaskSpec("facts", "facts", 384, ("aware",)),
)
BLOCK_SIZE = 16
MAX_TOKENS = 1024
NEVER_S = 1e9


@dataclass(frozen=True)
class Load:
    """arrivals: of each sample, by the clock"""

    samples: list[Sample]
    arrivals: list[float]


class Clock:
    """Processor seconds or steps since it was made, and what was skipped because there was nothing to do."""

    def __init__(self, kind: str) -> None:
        self._counts_steps = kind == "steps"
        self._started = time.process_time()
        self._skipped = 0.0
        self.num_steps = 0

    def now(self) -> float:
        passed = self.num_steps if self._counts_steps else time.process_time() - self._started
        return passed + self._skipped

    def skip_to(self, moment: float) -> None:
        self._skipped += max(0.0, moment - self.now())


@dataclass(frozen=True)
class Found:
    """
    goodput     requests that ended within the limit, and tokens generated: in the time that one request takes alone
    tokens
    late        share of the requests that ended after the limit
    quality     share of the answers' lines that were right
    preemptions, recomputed   how often somebody gave way, and tokens computed again
    rungs       rungs taken, of all policies
    peak_blocks the most that requests held at a time
    steps       of the engine, in all
    """

    goodput: float
    tokens: float
    late: float
    quality: float
    preemptions: float
    recomputed: float
    rungs: float
    peak_blocks: float
    steps: float


class Bench:
    """A loaded model; each run has an engine of its own."""

    def __init__(
        self, clock: str, device: str, *, num_blocks: int, rows: int, output_tokens: int, model: Path | None = None
    ) -> None:
        """
        clock  "processor" or "steps"
        model  folder of a checkpoint that reads Mimir's token ids; what it answers is not worth looking at. None: Mimir
        """
        import torch

        from engine.models import load_model

        self._clock, self._device = clock, device
        self._folder = model or model_path()
        self.model: Model = load_model(self._folder, device=torch.device(self._device), max_model_len=MAX_TOKENS)
        self.writer = Writer(model_path())
        self._num_blocks, self._rows, self._output_tokens = num_blocks, rows, output_tokens

    def load(self, count: int, rate: float, seed: int) -> Load:
        """rate: requests per unit of the clock."""
        numbers = random.Random(seed)
        samples = [self.writer.sample(TASKS[i % len(TASKS)], "aware", seed * 1000 + i) for i in range(count)]
        gaps = [0.0, *(numbers.expovariate(rate) for _ in range(count - 1))]
        return Load(samples, [sum(gaps[: i + 1]) for i in range(count)])

    def time_alone(self) -> float:
        """Of one request in an engine of its own: the median of a few, after one that warms up."""
        found = [1 / self.run("", self.load(1, 1.0, 900 + seed), limit=NEVER_S).goodput for seed in range(4)]
        return statistics.median(found[1:])

    def run(self, pressure: str, load: Load, *, limit: float, alone: float = 1.0) -> Found:
        """limit, alone: see the head of this file; in units of the clock."""
        core = self._core(pressure)
        pool, scheduler = core.scheduler.cache.pool, core.scheduler
        num_executed = peak = 0
        outputs: dict[str, list[int]] = {}
        latencies: dict[str, float] = {}
        coming = list(enumerate(zip(load.samples, load.arrivals, strict=True)))
        clock = Clock(self._clock)
        execute = core.runner.execute

        def counted(plan: Any) -> Any:
            nonlocal num_executed
            num_executed += plan.num_tokens
            return execute(plan)

        core.runner.execute = counted  # type: ignore[method-assign]
        while coming or core.has_work:
            if not core.has_work:
                clock.skip_to(coming[0][1][1])
            while coming and coming[0][1][1] <= clock.now():
                number, (sample, _) = coming.pop(0)
                core.add(self._request(number, sample))
            clock.num_steps += 1
            for output in core.step():
                outputs.setdefault(output.request_id, []).extend(output.token_ids)
                if output.finish_reason is not None:
                    latencies[output.request_id] = clock.now() - load.arrivals[int(output.request_id)]
            peak = max(peak, pool.counts.active)
        total = clock.now() / alone
        stats = scheduler.stats()
        num_needed = sum(len(sample.token_ids) for sample in load.samples) - stats.prompt_tokens_cached
        num_generated = sum(len(token_ids) for token_ids in outputs.values())
        scores = [s.score(self._answer(outputs[str(i)])) for i, s in enumerate(load.samples)]
        num_good = sum(latency <= limit for latency in latencies.values())
        return Found(
            goodput=num_good / total,
            tokens=num_generated / total,
            late=1 - num_good / len(load.samples),
            quality=statistics.mean(scores),
            preemptions=stats.num_preemptions,
            recomputed=num_executed - num_needed - num_generated + len(outputs),
            rungs=stats.num_shrunk,
            peak_blocks=peak,
            steps=clock.num_steps,
        )

    def _answer(self, token_ids: list[int]) -> str:
        """The text up to where the model would have ended it."""
        ends = [i for i, token_id in enumerate(token_ids) if token_id in self.model.eos_token_ids]
        return self.writer.tokenizer.decode(token_ids[: ends[0]] if ends else token_ids)

    def _request(self, number: int, sample: Sample) -> EngineRequest:
        return EngineRequest(
            request_id=str(number),
            prompt_token_ids=sample.token_ids,
            sampling=SamplingParams(temperature=0.0, max_tokens=self._output_tokens, ignore_eos=True, seed=number),
            kv_policy={"name": "full", "may_shrink": True},
        )

    def _core(self, pressure: str) -> EngineCore:
        import torch

        from engine.launch import wire

        config = Config(
            model=ModelConfig(model=str(self._folder), max_model_len=MAX_TOKENS),
            cache=CacheConfig(block_size=BLOCK_SIZE, num_blocks=self._num_blocks + 1, pressure_policy=pressure),
            scheduler=SchedulerConfig(
                max_num_seqs=self._rows, max_waiting_requests=4096, max_waiting_pools=1e6, max_queue_wait_s=NEVER_S,
                max_request_s=NEVER_S,
            ),
            runtime=RuntimeConfig(threads=1),
        )  # fmt: skip
        return wire(self.model, config, torch.device(self._device))[0]


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    bench = Bench(
        arguments.clock,
        arguments.device,
        num_blocks=arguments.blocks,
        rows=arguments.rows,
        output_tokens=arguments.outputs,
        model=arguments.model,
    )
    alone = bench.time_alone()
    print(f"one request alone takes {alone:.3f} of the clock's units ({arguments.clock})")
    rounds: dict[str, list[Found]] = {way: [] for way in WAYS}
    for number in range(arguments.rounds):
        load = bench.load(arguments.requests, arguments.rate / alone, number)
        for way in _in_turn(number):
            rounds[way].append(bench.run(WAYS[way], load, limit=arguments.limit * alone, alone=alone))
    medians = {way: median(found) for way, found in rounds.items()}
    _show(medians)
    spread = {way: [asdict(found) for found in rounds[way]] for way in WAYS}
    return {"alone": alone, "medians": {way: asdict(found) for way, found in medians.items()}, "rounds": spread}


def _in_turn(number: int) -> Iterator[str]:
    """All ways, another one first in each round."""
    names = list(WAYS)
    yield from names[number % len(names) :] + names[: number % len(names)]


def median(found: Sequence[Found]) -> Found:
    return Found(
        **{field.name: statistics.median(getattr(one, field.name) for one in found) for field in fields(Found)}
    )


def _show(medians: dict[str, Found]) -> None:
    names = [field.name for field in fields(Found)]
    print(f"{'':<12}" + "".join(f"{name:>12}" for name in names))
    for way, found in medians.items():
        print(f"{way:<12}" + "".join(f"{getattr(found, name):>12.2f}" for name in names), flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _parser().parse_args(argv)
    result = measure(arguments)
    if arguments.json:
        settings = {name: value for name, value in vars(arguments).items() if name not in ("json", "model")}
        Path(arguments.json).write_text(json.dumps({"settings": settings, **result}, indent=2) + "\n")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Goodput and quality under overload, by what is done about it.")
    parser.add_argument("--clock", choices=("processor", "steps"), default="processor")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument(
        "--model", type=Path, metavar="FOLDER", help="whose steps take the time (Mimir); no quality then"
    )
    parser.add_argument("--requests", type=int, default=24, help="in a round")
    parser.add_argument("--rate", type=float, default=6.0, help="arrivals, in requests per time that one takes alone")
    parser.add_argument("--limit", type=float, default=4.0, help="a good request ends in so many times that")
    parser.add_argument("--blocks", type=int, default=120, help="of 16 tokens in the pool")
    parser.add_argument("--rows", type=int, default=16, help="requests in a step, at most")
    parser.add_argument("--outputs", type=int, default=160, help="tokens that each request writes")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", metavar="FILE")
    return parser


if __name__ == "__main__":
    sys.exit(main())
