"""What it costs to check guesses: the time of a step by the rows that one request has in it, and its parts.

    python -m loadtest.verification --model mimir --rows 1 2 3 5 9 17 33 65

In one process, without HTTP. The guesses are random tokens, so none is accepted and every step begins one token
further; steps of all sizes take turns. One row is a plain step, on the plain path.
"""

from __future__ import annotations

import argparse
import gc
import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

ROWS = (1, 2, 3, 5, 9, 17, 33, 65)
PARTS = ("model", "head", "choice")
CONTEXT = 128


class Stub:
    """A drafter whose guesses are random tokens, of the size that is set from outside."""

    name = "ngram"  # in its place

    def __init__(self, vocab_size: int) -> None:
        from engine.speculation.base import Taps

        self.needs = Taps()
        self.num_nodes = 0
        self._vocab_size = vocab_size
        self._random = random.Random(0)
        self.state_bytes = 0

    def propose(self, views: Sequence[Any], caps: Sequence[int]) -> list[Any]:
        from engine.speculation.tree import DraftTree

        tokens = [self._random.randrange(self._vocab_size) for _ in range(self.num_nodes)]
        return [DraftTree.chain(tokens, source=self.name) for _ in views]

    def _hear(self, *arguments: Any) -> None:
        """It learns nothing."""

    admit = fork = on_commit = drop = _hear


class Clock:
    """Seconds spent in some functions, since they were last read."""

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(PARTS, 0.0)

    def around(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*arguments: Any, **options: Any) -> Any:
            started = time.perf_counter()
            try:
                return function(*arguments, **options)
            finally:
                self.seconds[part] += time.perf_counter() - started

        return timed

    def read(self) -> dict[str, float]:
        found, self.seconds = self.seconds, dict.fromkeys(PARTS, 0.0)
        return found


def measure(options: dict[str, Any], rows: Sequence[int], num_steps: int) -> dict[int, dict[str, list[float]]]:
    """Seconds by number of rows: of each step, and of its parts."""
    from engine.config_load import load
    from engine.launch import build_core
    from engine.speculation.allowance import FixedBudget
    from engine.speculation.manager import Speculation
    from engine.types import EngineRequest, SamplingParams

    core, info = build_core(load(options))
    stub, clock = Stub(info.vocab_size), Clock()
    core.speculation = Speculation(lambda name: stub, FixedBudget(1), info.vocab_size)
    runner: Any = core.runner
    runner.model.forward = clock.around("model", runner.model.forward)
    runner.model.logits = clock.around("head", runner.model.logits)
    runner._sampler.choose = clock.around("choice", runner._sampler.choose)
    generator = random.Random(1)
    core.add(
        EngineRequest(
            request_id="one",
            prompt_token_ids=[generator.randrange(info.vocab_size) for _ in range(CONTEXT)],
            sampling=SamplingParams(temperature=0.0, max_tokens=options["max_model_len"] - CONTEXT, ignore_eos=True),
            speculative={"drafters": ["ngram"], "max_nodes": max(2, *rows) - 1},
        )
    )
    found: dict[int, dict[str, list[float]]] = {
        count: {part: [] for part in ("step", *PARTS, "guess")} for count in rows
    }
    gc.collect()
    gc.freeze()
    core.step()
    for turn in range(num_steps + 2):
        for count in generator.sample(rows, len(rows)):
            stub.num_nodes = count - 1
            core.speculation.guess(core.scheduler.roster.running)  # for the step that is timed
            clock.read()
            started = time.perf_counter()
            plan = core.scheduler.schedule()
            core.scheduler.commit(plan, runner.execute(plan))
            seconds = time.perf_counter() - started
            assert plan.num_tokens == count, f"{plan.num_tokens} rows, not {count}"
            core.speculation.follow(core.scheduler.progress)
            if turn >= 2:
                for part, value in {"step": seconds, **clock.read()}.items():
                    found[count][part].append(value)
    return found


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="loadtest.verification", description=__doc__)
    parser.add_argument("--model", default="mimir")
    parser.add_argument("--rows", type=int, nargs="+", default=list(ROWS))
    parser.add_argument("--steps", type=int, default=40, help="of each size")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quantization", default="none")
    arguments = parser.parse_args(argv)
    length = CONTEXT + (arguments.steps + 3) * len(arguments.rows) + max(arguments.rows)
    options = {
        "model": arguments.model,
        "max_model_len": -(-length // 128) * 128,
        "max_num_seqs": 1,
        "threads": arguments.threads,
        "kv_cache_memory_mib": 512,
        "quantization": arguments.quantization,
        "speculative_max_nodes_limit": 512,
    }
    found = measure(options, arguments.rows, arguments.steps)
    base = statistics.median(found[arguments.rows[0]]["step"])
    print(f"{'rows':>5}{'step, us':>12}{'times':>8}" + "".join(f"{part:>10}" for part in PARTS) + f"{'rest':>10}")
    for count in arguments.rows:
        parts = {part: 1e6 * statistics.median(values) for part, values in found[count].items() if values}
        rest = parts["step"] - sum(parts[part] for part in PARTS)
        line = f"{count:5}{parts['step']:12.0f}{parts['step'] / (1e6 * base):8.2f}"
        print(line + "".join(f"{parts[part]:10.0f}" for part in PARTS) + f"{rest:10.0f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
