"""The whole core on models with random weights: decode speed by batch, and how much of a step is not the model."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import torch

from loadtest.gpu.models import (
    LLAMA_8B,
    QWEN3_30B_A3B,
    build_core,
    build_model,
    finish,
    requests,
    shape_of,
    to_decoding,
)
from loadtest.gpu.record import Run, Target
from loadtest.step_cost import Stopwatch

if TYPE_CHECKING:
    from engine.core import EngineCore
    from engine.models.decoder import Decoder

# What is switched on, from nothing to what is the default on CUDA.
WAYS: tuple[tuple[str, dict[str, str]], ...] = (
    ("plain", {"cuda_graphs": "off", "overlap": "off"}),
    ("graphs", {"cuda_graphs": "on", "overlap": "off"}),
    ("graphs, overlap", {"cuda_graphs": "on", "overlap": "on"}),
)
WAYS_ON_CPU = (WAYS[0], ("overlap", {"cuda_graphs": "off", "overlap": "on"}))
BATCHES = (1, 4, 16, 64, 256)
PROMPT_TOKENS = 128
STEPS = 24
SETTLE_STEPS = 6
PROFILED_STEPS = 6
SAME_TOKENS = 16  # of the answers that are compared between two ways

BOUND = Target("share_of_weight_bound", 0.85)
OUTSIDE = Target("share_outside_model", 0.05, at_least=False)


def measure_engine(run: Run) -> None:
    """Llama-3.1-8B's shape, batch 1 to 256, with and without graphs and overlap."""
    model = build_model(run, shape_of(run, LLAMA_8B), run.size(4096, 512))
    answers: dict[str, list[list[int]]] = {}
    for way, options in ways_of(run):
        if not run.has_time(way, 12):
            continue
        with run.case(way):
            core = _core_of(run, model, options)
            answers[way] = _answers(run, core, model.vocab_size)
            # the ways in between are for the steps from one to the other; few batches show them
            batches = BATCHES if way == ways_of(run)[-1][0] else (1, 16, 256)
            for batch in batches[: run.size(len(batches), 2)]:
                _measure_batch(run, model, core, way, batch)
            del core
            run.release()
    _compare(run, answers)


def measure_moe(run: Run) -> None:
    """Qwen3-30B-A3B's shape in the way that is the default on CUDA."""
    model = build_model(run, shape_of(run, QWEN3_30B_A3B), run.size(4096, 512))
    way, options = ways_of(run)[-1]
    with run.case(way):
        core = _core_of(run, model, options)
        for batch in (1, 16, 64, 256)[: run.size(4, 2)]:
            if run.has_time(f"batch {batch}", 6):
                _measure_batch(run, model, core, f"Qwen3-30B-A3B, {way}", batch)


def ways_of(run: Run) -> tuple[tuple[str, dict[str, str]], ...]:
    return WAYS if run.device.type == "cuda" else WAYS_ON_CPU


def _core_of(run: Run, model: Decoder, options: dict[str, str]) -> EngineCore:
    rows = run.size(max(BATCHES), 4)
    length = run.size(1024, 512)
    return build_core(run, model, max_model_len=length, rows=rows, pool_tokens=rows * length, **options)


def _measure_batch(run: Run, model: Decoder, core: EngineCore, way: str, batch: int) -> None:
    total = PROMPT_TOKENS + 4 * (STEPS + SETTLE_STEPS + PROFILED_STEPS) + 4 * batch // 64 + 16
    for request in requests(f"{way}-{batch}", batch, PROMPT_TOKENS, total - PROMPT_TOKENS, model.vocab_size):
        core.add(request)
    running = to_decoding(core, 400)
    for _ in range(SETTLE_STEPS):
        core.advance()
    core.stats()
    tokens, seconds = timed_steps(run, core, run.size(STEPS, 4))
    steps = run.size(STEPS, 4)
    stats = core.stats()
    step_ms = 1000 * seconds / steps
    busy_ms = _model_ms(run, core)
    finish(core)
    is_default = way.endswith(ways_of(run)[-1][0])
    bytes_read = model.weight_bytes - model.vocab_size * model.config.hidden_size * 2  # rows of the embedding only
    bound_ms = bytes_read / 1e6 / run.limits["copy_gb_per_s"]
    is_dense = model.config.moe is None
    run.record(
        f"{way}, batch {batch}",
        _target_of(batch, is_default=is_default, is_dense=is_dense, largest=run.size(max(BATCHES), 4)),
        running=running,
        tokens_per_s=tokens / seconds,
        step_ms=step_ms,
        model_ms=busy_ms,
        share_outside_model=max(0.0, 1 - busy_ms / step_ms),
        share_of_weight_bound=bound_ms / step_ms if is_dense and batch == 1 else None,
        scheduler_ms=1000 * sum(stats.scheduler_seconds) / steps,
        sampler_ms=1000 * sum(stats.sampler_seconds) / steps,
    )


def _target_of(batch: int, *, is_default: bool, is_dense: bool, largest: int) -> Target | None:
    if not is_default or not is_dense:
        return None
    return BOUND if batch == 1 else OUTSIDE if batch in (largest, max(BATCHES)) else None


def timed_steps(run: Run, core: EngineCore, steps: int) -> tuple[int, float]:
    """Tokens that came out, and seconds, the device's work included."""
    run.synchronize()
    started = time.perf_counter()
    tokens = sum(len(output.token_ids) for _ in range(steps) for output in core.advance())
    run.synchronize()
    return tokens, time.perf_counter() - started


def _model_ms(run: Run, core: EngineCore) -> float:
    """What a step's kernels take, one after the other; on a CPU what the model's calls take. The rest of a step is time
    in which the device waits for the engine.
    """
    steps = run.size(PROFILED_STEPS, 2)
    if run.device.type == "cpu":
        watch = Stopwatch()
        model: Any = core.runner.model  # type: ignore[attr-defined]
        watch.wrap(model, "forward", "model")
        watch.wrap(model, "logits", "model")
        try:
            for _ in range(steps):
                core.advance()
        finally:
            watch.restore()
        return 1000 * watch.own.get("model", 0.0) / steps
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(steps):
            core.advance()
        torch.cuda.synchronize()
    busy_us = sum(event.self_device_time_total for event in profile.key_averages())
    return float(busy_us) / 1000 / steps


def _answers(run: Run, core: EngineCore, vocab: int) -> list[list[int]]:
    """Greedy tokens of a few requests."""
    found: dict[str, list[int]] = {}
    for request in requests("same", run.size(8, 3), PROMPT_TOKENS, SAME_TOKENS, vocab):
        core.add(request)
        found[request.request_id] = []
    while core.has_work:
        for output in core.advance():
            found[output.request_id] += output.token_ids
    return [found[name] for name in sorted(found)]


def _compare(run: Run, answers: dict[str, list[list[int]]]) -> None:
    """Rounding may differ between captured and other steps, and random weights have near ties: so it is a share."""
    first, *others = answers
    for other in others:
        pairs = [
            (a, b)
            for one, two in zip(answers[first], answers[other], strict=True)
            for a, b in zip(one, two, strict=True)
        ]
        share = sum(a == b for a, b in pairs) / len(pairs)
        run.record(f"tokens of {other} as of {first}", Target("share_equal", 0.9), share_equal=share)
