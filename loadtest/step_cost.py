"""What one decode step costs and where, in one process and without HTTP: a table by number of rows.

    python -m loadtest.step_cost --model mimir --rows 1 8 32

Times are medians over the steps, each stage without the stages inside it. "outside the model" is everything but the
model's forward and logits: scheduling, building the step's tensors, sampling, commit and encoding for the front end.
"""

from __future__ import annotations

import argparse
import gc
import json
import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine import ipc
from engine.config import CacheConfig, Config, ModelConfig, RuntimeConfig, SchedulerConfig
from engine.types import EngineRequest, SamplingParams

if TYPE_CHECKING:
    from engine.core import EngineCore

MODEL_STAGES = ("forward", "logits")
MICROSECONDS = 1e6
BLOCK_SIZE = 16
WARM_UP_STEPS = 8


class Stopwatch:
    """Seconds by stage of the step that is running; a stage's own time excludes the stages called within it."""

    def __init__(self) -> None:
        self.own: dict[str, float] = {}
        self._inner = [0.0]
        self._undo: list[tuple[Any, str, Callable[..., Any]]] = []

    def wrap(self, owner: Any, name: str, stage: str) -> None:
        """Replaces the function `name` of an object or module by one that is timed as `stage`."""
        function: Callable[..., Any] = getattr(owner, name)

        def timed(*args: Any, **kwargs: Any) -> Any:
            self._inner.append(0.0)
            started = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                elapsed = time.perf_counter() - started
                self.own[stage] = self.own.get(stage, 0.0) + elapsed - self._inner.pop()
                self._inner[-1] += elapsed

        self._undo.append((owner, name, function))
        setattr(owner, name, timed)

    def restore(self) -> None:
        while self._undo:
            setattr(*self._undo.pop())


def measure(core: EngineCore, num_rows: int, *, prompt_tokens: int, num_steps: int, sampled: bool) -> dict[str, float]:
    """Median microseconds by stage over `num_steps` decode steps of `num_rows` requests."""
    for request in _requests(num_rows, prompt_tokens, num_steps + 2 * num_rows + WARM_UP_STEPS, sampled=sampled):
        core.add(request)
    roster = core.scheduler.roster
    while roster.num_waiting or any(request.num_remaining_tokens > 1 for request in roster.running):
        core.step()
    for _ in range(WARM_UP_STEPS):
        core.step()
    watch = _watch(core)
    steps: list[dict[str, float]] = []
    try:
        for _ in range(num_steps):
            watch.own = {}
            started = time.perf_counter()
            ipc.encode(ipc.Outputs(core.step()))
            steps.append({**watch.own, "step": time.perf_counter() - started})
    finally:
        watch.restore()
    stages = {stage: MICROSECONDS * statistics.median(step.get(stage, 0.0) for step in steps) for stage in steps[0]}
    stages["outside the model"] = stages["step"] - sum(stages[stage] for stage in MODEL_STAGES)
    return stages


def _watch(core: EngineCore) -> Stopwatch:
    from engine.execution import runner as runner_module

    runner: Any = core.runner
    watch = Stopwatch()
    watch.wrap(core.scheduler, "schedule", "schedule")
    watch.wrap(core.scheduler, "commit", "commit")
    watch.wrap(runner, "execute", "runner, rest")
    watch.wrap(runner, "_apply", "apply plan")
    watch.wrap(runner_module, "build_batch", "build tensors")
    watch.wrap(runner.model, "forward", "forward")
    watch.wrap(runner.model, "logits", "logits")
    watch.wrap(runner._sampler, "sample", "sampler")
    watch.wrap(core, "step", "core, rest")
    watch.wrap(ipc, "encode", "encode")
    return watch


def _requests(num_rows: int, prompt_tokens: int, output_tokens: int, *, sampled: bool) -> list[EngineRequest]:
    generator = random.Random(num_rows)
    return [
        EngineRequest(
            request_id=f"{generator.getrandbits(128):032x}",  # as long as the server's
            prompt_token_ids=[generator.randrange(300, 1000) for _ in range(prompt_tokens)],
            sampling=SamplingParams(
                max_tokens=output_tokens,
                ignore_eos=True,
                seed=i,
                temperature=0.8 if sampled else 0.0,
                top_p=0.95 if sampled else 1.0,
            ),
        )
        for i in range(num_rows)
    ]


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _parser().parse_args(argv)
    from engine.launch import build_core

    results: dict[str, dict[str, float]] = {}
    for num_rows in arguments.rows:
        context = arguments.prompt_tokens + arguments.steps + 2 * num_rows + WARM_UP_STEPS + 2
        config = Config(
            model=ModelConfig(model=arguments.model, max_model_len=context),
            cache=CacheConfig(block_size=BLOCK_SIZE, num_blocks=num_rows * (context // BLOCK_SIZE + 1) + 2),
            scheduler=SchedulerConfig(max_num_seqs=num_rows),
            runtime=RuntimeConfig(threads=arguments.threads),
        )
        core, _ = build_core(config)
        gc.collect()
        gc.freeze()  # as the engine process does
        results[str(num_rows)] = measure(
            core,
            num_rows,
            prompt_tokens=arguments.prompt_tokens,
            num_steps=arguments.steps,
            sampled=arguments.sampled,
        )
    _print(results)
    if arguments.json:
        Path(arguments.json).write_text(json.dumps({"settings": vars(arguments), "us": results}, indent=2) + "\n")
    return 0


def _print(results: dict[str, dict[str, float]]) -> None:
    print(f"{'microseconds a step, rows:':<26}" + "".join(f"{rows:>10}" for rows in results))
    for stage in next(iter(results.values())):
        print(f"{stage:<26}" + "".join(f"{stages.get(stage, 0.0):>10.1f}" for stages in results.values()))
    shares = [stages["outside the model"] / stages["step"] for stages in results.values()]
    print(f"{'share outside the model':<26}" + "".join(f"{share:>10.1%}" for share in shares))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="What a decode step costs, by stage and number of rows.")
    parser.add_argument("--model", default="mimir", help="bundled model or checkpoint folder (default: %(default)s)")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--threads", type=int, help="default: all cores")
    parser.add_argument("--sampled", action="store_true", help="temperature 0.8 and top-p 0.95 instead of greedy")
    parser.add_argument("--json", metavar="FILE")
    return parser


if __name__ == "__main__":
    sys.exit(main())
