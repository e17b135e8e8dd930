"""A guard against lost speed: fast paths against the plain ones that they replace, in one process and one run.

    python -m loadtest.guard            # compares with the recorded ratios; exits with 1 where a fifth of one is lost
    python -m loadtest.guard --record   # lowers or raises the record to what is measured now

No absolute time is ever compared. Both sides of a ratio alternate, in processor time of one thread, and each counts
with its fastest repetition: what else the machine does can only lengthen the others. A ratio that falls short is
measured again before it counts as lost.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.config import CacheConfig, Config, ModelConfig, RuntimeConfig, SchedulerConfig
from engine.types import EngineRequest, SamplingParams

if TYPE_CHECKING:
    from collections.abc import Iterator

    from engine.core import EngineCore

RECORD = Path(__file__).with_name("guard.json")
MAX_LOSS = 0.2
REPETITIONS = 25
ATTEMPTS = 3
ROWS = 8
PROMPT_TOKENS = 512


@dataclass(frozen=True)
class Pair:
    """Two ways to the same result; `plain` is the slow one."""

    name: str
    fast: Callable[[], object]
    plain: Callable[[], object]
    repetitions: int = REPETITIONS

    def ratio(self) -> float:
        """How many times faster."""
        self.fast()
        self.plain()
        fast, plain = [], []
        gc.collect()
        gc.disable()
        try:
            for _ in range(self.repetitions):
                fast.append(_seconds(self.fast))
                plain.append(_seconds(self.plain))
        finally:
            gc.enable()
        return min(plain) / min(fast)


def _seconds(call: Callable[[], object]) -> float:
    started = time.thread_time()
    call()
    return time.thread_time() - started


def lost(pairs: Sequence[Pair], record: dict[str, float]) -> dict[str, tuple[float, float]]:
    """Of each pair that is more than MAX_LOSS below its record in every attempt: the best ratio and the record."""
    found = {}
    for pair in pairs:
        wanted = record[pair.name]
        best = 0.0
        for _ in range(ATTEMPTS):
            best = max(best, pair.ratio())
            if best >= (1 - MAX_LOSS) * wanted:
                break
        else:
            found[pair.name] = best, wanted
    return found


def machine() -> str:
    """For which processors a record holds: instruction set, family and model. Ratios of others may differ by more."""
    from kernels import native

    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    named = dict(line.split(":", 1) for line in reversed(lines) if ":" in line)
    found = {key.strip(): value.strip() for key, value in named.items()}
    return f"{native.isa_level()} {found.get('cpu family', '?')}/{found.get('model', '?')}"


def pairs() -> list[Pair]:
    """What is guarded. Call within `one_thread`."""
    core = _core()
    return [*_kernel_pairs(), _step_pair(core), _prefix_pair(core)]


@contextmanager
def one_thread() -> Iterator[None]:
    """For processor time of this thread to mean something."""
    import torch

    from kernels import native

    num_threads, of_kernels = torch.get_num_threads(), native.num_threads
    torch.set_num_threads(1)
    native.num_threads = lambda: 1
    try:
        yield
    finally:
        torch.set_num_threads(num_threads)
        native.num_threads = of_kernels


def _kernel_pairs() -> list[Pair]:
    import torch
    import torch.nn.functional as F

    import kernels
    from kernels import backend

    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Any:
        return torch.randn(*shape, generator=generator)

    weight, x = random(1024, 512), random(ROWS, 512)
    packed = kernels.pack_linear(weight)
    norm, hidden = torch.ones(512), random(ROWS, 512)
    logits, keys = random(ROWS, 4096), torch.arange(ROWS)
    temperature, top_p = torch.full((ROWS,), 0.8), torch.full((ROWS,), 0.9)
    cache = random(ROWS * 32, 2, 16, 64)
    table = torch.arange(ROWS * 32, dtype=torch.int32).view(ROWS, 32)
    lengths, starts = torch.full((ROWS,), PROMPT_TOKENS, dtype=torch.int32), torch.arange(ROWS + 1, dtype=torch.int32)
    q = random(ROWS, 8, 64)

    def by(name: str, call: Callable[[], object]) -> Callable[[], object]:
        def run() -> None:
            with backend.using(name):
                call()
                call()

        return run

    def both(name: str, call: Callable[[], object]) -> Pair:
        return Pair(name, by("cpp", call), by("torch", call))

    return [
        Pair("linear, 8 rows", lambda: packed(x), lambda: F.linear(x, weight)),
        both("rms_norm, 8 rows", lambda: kernels.rms_norm(hidden, norm, 1e-6)),
        both("top-p sampling, 8 rows", lambda: kernels.sample(logits, temperature=temperature, keys=keys, top_p=top_p)),
        both(
            "attention, 8 rows of 512 tokens",
            lambda: kernels.paged_attention(q, cache, cache, table, lengths, starts, scale=0.125),
        ),
    ]


def _core() -> EngineCore:
    from engine.launch import build_core

    config = Config(
        model=ModelConfig(model="mimir", max_model_len=2048),
        cache=CacheConfig(block_size=16, num_blocks=ROWS * 128 + 2),
        scheduler=SchedulerConfig(max_num_seqs=ROWS),
        runtime=RuntimeConfig(threads=1),
    )
    core, _ = build_core(config)
    return core


def _request(name: str, num_tokens: int, max_tokens: int, salt: str = "") -> EngineRequest:
    return EngineRequest(
        request_id=name,
        prompt_token_ids=[300 + 7 * i % 701 for i in range(num_tokens)],
        sampling=SamplingParams(max_tokens=max_tokens, ignore_eos=True, temperature=0.0),
        cache_salt=salt,
    )


def _step_pair(core: EngineCore) -> Pair:
    """A decode step of the whole engine, with the model as one native call or operation by operation."""
    model: Any = core.runner.model  # type: ignore[attr-defined]
    native_step = model._step
    serial = itertools.count()

    def step() -> None:
        while len(core.scheduler.roster.running) < ROWS:
            core.add(_request(f"decoding-{next(serial)}", 32, 1500))
            core.step()
        core.step()

    def by_operations() -> None:
        model._step = None
        try:
            step()
        finally:
            model._step = native_step

    return Pair("decode step, 8 rows", step, by_operations)


def _prefix_pair(core: EngineCore) -> Pair:
    """A prompt that was there before against a new one, to its only token, alone in the engine."""
    serial = itertools.count()

    def run(salt: str) -> None:
        for request in list(core.scheduler.roster.running):  # what other measurements left
            core.abort(request.request_id)
        core.add(_request(f"prompt-{next(serial)}", PROMPT_TOKENS, 1, salt))
        while core.has_work:
            core.step()

    return Pair("prompt of 512 tokens, cached", lambda: run("same"), lambda: run(f"new-{next(serial)}"), repetitions=8)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Fast paths against plain ones, compared with recorded ratios.")
    parser.add_argument("--record", action="store_true", help="write the ratios measured now, for this processor")
    arguments = parser.parse_args(argv)
    level = machine()
    records = json.loads(RECORD.read_text())
    with one_thread():
        if arguments.record:
            records[level] = {pair.name: round(pair.ratio(), 2) for pair in pairs()}
            RECORD.write_text(json.dumps(records, indent=2) + "\n")
            print(json.dumps(records[level], indent=2))
            return 0
        if level not in records:
            print(f"nothing is recorded for {level}; recorded: {', '.join(records)}. Record it with --record")
            return 1
        slower = lost(pairs(), records[level])
    for name, (ratio, wanted) in slower.items():
        print(f"{name}: {ratio:.2f}x the plain path, recorded {wanted:.2f}x; more than {MAX_LOSS:.0%} is lost")
    if not slower:
        print(f"all {len(records[level])} ratios hold")
    return 1 if slower else 0


if __name__ == "__main__":
    sys.exit(main())
