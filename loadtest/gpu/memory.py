"""What formats and policies of the cache buy where memory is the limit, and where contexts are long.

On 8 layers of Llama-3.1-8B's shape: weights and cache shrink alike, and so does the time of the prompts.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from loadtest.gpu.engine import timed_steps, ways_of
from loadtest.gpu.models import LLAMA_8B, build_core, build_model, finish, requests, shape_of, to_decoding
from loadtest.gpu.record import Run, Target

if TYPE_CHECKING:
    from engine.models.decoder import Decoder

LAYERS = 8
STEPS = 16
OUTPUT_TOKENS = 320  # so many that nobody ends while the prompts of the others run
AT_POOL_LIMIT: dict[str, dict[str, Any] | None] = {
    "full": None,
    "kivi, 4 bits": {"name": "kivi", "bits": 4},
    "snapkv, 25 %": {"name": "snapkv", "ratio": 0.25},
}
QUEST_BUDGET = 4096


def measure_memory(run: Run) -> None:
    """Throughput at 4k contexts when the pool is full: requests that fit times what each gets done."""
    context, contexts, offered = run.size(4096, 256), run.size(96, 3), run.size(480, 8)
    model = build_model(run, shape_of(run, LLAMA_8B, LAYERS), 2 * context)
    rates: dict[str, float] = {}
    for name, policy in AT_POOL_LIMIT.items():
        if run.has_time(name, 12):
            with run.case(name):
                rates[name], running = _rate(
                    run, model, policy, context=context, rows=offered, pool_tokens=contexts * context
                )
                if name == "full":
                    run.record(f"{name}, {context} tokens", tokens_per_s=rates[name], running=running)
                elif "full" in rates:
                    gain = rates[name] / rates["full"]
                    target = Target("gain_over_full", 1.5)
                    run.record(
                        f"{name}, {context} tokens",
                        target,
                        tokens_per_s=rates[name],
                        running=running,
                        gain_over_full=gain,
                    )


def measure_quest(run: Run) -> None:
    """Decoding at 32k tokens that reads the best 4k, against all of them."""
    context, rows = run.size(32768, 256), run.size(8, 2)
    budget = run.size(QUEST_BUDGET, 64)
    model = build_model(run, shape_of(run, LLAMA_8B, LAYERS), 2 * context)
    rates: dict[str, float] = {}
    policies: dict[str, dict[str, Any] | None] = {"full": None, "quest": {"name": "quest", "budget": budget}}
    for name, policy in policies.items():
        if run.has_time(name, 8):
            with run.case(name):
                rates[name], _ = _rate(run, model, policy, context=context, rows=rows, pool_tokens=(rows + 1) * context)
                gain = rates[name] / rates["full"]
                target = Target("gain_over_full", 1.5) if name == "quest" else None
                run.record(f"{name}, {rows} x {context}", target, tokens_per_s=rates[name], gain_over_full=gain)


def _rate(
    run: Run, model: Decoder, policy: dict[str, Any] | None, *, context: int, rows: int, pool_tokens: int
) -> tuple[float, int]:
    """Tokens per second while as many requests decode as run at once, and how many that are."""
    options = ways_of(run)[-1][1]
    output = run.size(OUTPUT_TOKENS, 64)
    core = build_core(run, model, max_model_len=context, rows=rows, pool_tokens=pool_tokens, **options)
    try:
        for request in requests("r", rows, context - output, output, model.vocab_size, kv_policy=policy):
            core.add(request)
        running = to_decoding(core, 3000)
        for _ in range(4):
            core.advance()
        tokens, seconds = timed_steps(run, core, run.size(STEPS, 3))
        return tokens / seconds, running
    finally:
        finish(core)
        del core
        run.release()
