"""What cache policies buy: requests that fit, decoding, overhead; all as ratios to the full cache in one run.

    python -m loadtest.kv_policies --contexts 4096 16384 --rows 8 32

A small random model with a long context, so that reading the cache is what a decode step does; policies choose by what
its attention happens to be, which changes neither sizes nor times. Times are processor time of one thread: other work
on the machine stretches them little. Prompts of a context stay in the prefix cache from policy to policy.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.config import CacheConfig, Config, ModelConfig, RuntimeConfig, SchedulerConfig
from engine.mimir import model_path
from engine.types import EngineRequest, SamplingParams

if TYPE_CHECKING:
    from engine.core import EngineCore

BLOCK_SIZE = 16
SHARE = 0.25
LONGEST = 32_768
SMALL_MODEL = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 4096,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": LONGEST,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "torch_dtype": "float32",
    "bos_token_id": 1,
    "eos_token_id": 2,
}
FULL = "full"
ADMITTED = ("snapkv", "keyformer", "kivi")
DECODED = (
    "random",
    "streaming_llm",
    "tova",
    "snapkv",
    "pyramidkv",
    "kvcrush",
    "h2o",
    "a2sf",
    "keyformer",
    "scissorhands",
)
OVERHEAD = ("snapkv", "h2o")
SETTLED = 6  # steps before anything is timed


def choice(name: str, share: float = SHARE) -> dict[str, Any] | None:
    if name == FULL:
        return None
    return {"name": "kivi", "bits": 4} if name == "kivi" else {"name": name, "ratio": share}


def core_for(folder: Path, *, max_tokens: int, num_tokens: int, rows: int, prefix_cache: bool) -> EngineCore:
    """An engine around the small model; num_tokens: what its pool holds."""
    from engine.launch import build_core

    config = Config(
        model=ModelConfig(model=str(folder), tokenizer=str(model_path()), max_model_len=max_tokens),
        cache=CacheConfig(
            block_size=BLOCK_SIZE, num_blocks=num_tokens // BLOCK_SIZE + 1, enable_prefix_cache=prefix_cache
        ),
        scheduler=SchedulerConfig(
            max_num_seqs=rows, max_num_batched_tokens=max(512, 4096 + rows), max_waiting_pools=1e6, max_queue_wait_s=1e9
        ),
        runtime=RuntimeConfig(threads=1, load_format="dummy"),
    )
    core, _ = build_core(config)
    return core


def requests(
    name: str, count: int, prompt_tokens: int, output_tokens: int, share: float = SHARE
) -> list[EngineRequest]:
    """The same prompts for every policy."""
    numbers = random.Random(prompt_tokens)
    return [
        EngineRequest(
            request_id=f"{name}-{i}",
            prompt_token_ids=[numbers.randrange(13, 4096) for _ in range(prompt_tokens)],
            sampling=SamplingParams(max_tokens=output_tokens, temperature=0.0, ignore_eos=True, seed=i),
            kv_policy=choice(name, share),
        )
        for i in range(count)
    ]


def admitted(folder: Path, name: str, *, context: int, pool_contexts: int, offered: int, output_tokens: int) -> float:
    """Requests that run at once while others wait, averaged over the later half of those steps."""
    core = core_for(folder, max_tokens=context, num_tokens=pool_contexts * context, rows=offered, prefix_cache=False)
    for request in requests(name, offered, context - output_tokens, output_tokens):
        core.add(request)
    running = []
    while core.scheduler.roster.num_waiting:
        core.step()
        running.append(len(core.scheduler.roster.running))
    return statistics.mean(running[len(running) // 2 :])


def decode_rates(folder: Path, names: Sequence[str], *, context: int, rows: int, steps: int) -> dict[str, float]:
    """Tokens a second while all rows decode, by policy."""
    output_tokens = steps + SETTLED + 4 * rows
    core = core_for(folder, max_tokens=context, num_tokens=(2 * rows + 1) * context, rows=rows, prefix_cache=True)
    rates = {}
    for name in (FULL, *names):
        for request in requests(name, rows, context - output_tokens, output_tokens):
            core.add(request)
        roster = core.scheduler.roster
        while roster.num_waiting or any(one.num_remaining_tokens > 1 for one in roster.running):
            core.step()
        for _ in range(SETTLED):
            core.step()
        started = time.process_time()
        num_tokens = sum(len(output.token_ids) for _ in range(steps) for output in core.step())
        rates[name] = num_tokens / (time.process_time() - started)
        for request_id in {one.request_id for one in roster.running}:
            core.abort(request_id)
        while core.has_work:
            core.step()
    return rates


def overheads(folder: Path, names: Sequence[str], *, rows: int, rounds: int, prompt_tokens: int) -> dict[str, float]:
    """Time of a whole run with a policy that never has to act, over that with the full cache, minus 1.

    Of the fastest rounds: nothing makes a run faster than it is, and on a busy machine much makes it slower.
    """
    output_tokens = 64
    core = core_for(
        folder,
        max_tokens=prompt_tokens + output_tokens,
        num_tokens=(rows + 1) * (prompt_tokens + output_tokens),
        rows=rows,
        prefix_cache=False,
    )
    seconds: dict[str, list[float]] = {name: [] for name in (FULL, *names)}
    for i in range(rounds + 1):
        for name, found in seconds.items():
            for request in _idle(name, rows, prompt_tokens, output_tokens):
                core.add(request)
            started = time.process_time()
            while core.has_work:
                core.step()
            if i:  # the first round warms up
                found.append(time.process_time() - started)
    return {name: min(seconds[name]) / min(seconds[FULL]) - 1 for name in names}


def _idle(name: str, count: int, prompt_tokens: int, output_tokens: int) -> Iterator[EngineRequest]:
    """Requests whose budget holds everything."""
    import msgspec

    for request in requests(name, count, prompt_tokens, output_tokens):
        budget = {"name": name, "budget": 2 * (prompt_tokens + output_tokens)}
        yield msgspec.structs.replace(request, kv_policy=None if name == FULL else budget)


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    result: dict[str, Any] = {"decode": {}, "admitted": {}}
    with small_model() as folder:
        for context in arguments.contexts:
            for rows in arguments.rows:
                rates = decode_rates(folder, arguments.policies, context=context, rows=rows, steps=arguments.steps)
                found = {name: rate / rates[FULL] for name, rate in rates.items()}
                result["decode"][f"{context} x {rows}"] = found
                _show(f"decode, {context} tokens x {rows} rows, {rates[FULL]:.0f} tokens/s with the full cache", found)
        for name in (FULL, *arguments.admitted):
            result["admitted"][name] = admitted(
                folder,
                name,
                context=arguments.pool_context,
                pool_contexts=arguments.pool,
                offered=arguments.offered,
                output_tokens=arguments.outputs,
            )
        full = result["admitted"][FULL]
        _show("requests admitted", {name: count / full for name, count in result["admitted"].items()})
        result["overhead"] = overheads(folder, OVERHEAD, rows=4, rounds=arguments.rounds, prompt_tokens=512)
        _show("overhead of a policy that never acts", result["overhead"])
    return result


@contextmanager
def small_model() -> Iterator[Path]:
    """A folder with a configuration and no weights."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "config.json").write_text(json.dumps(SMALL_MODEL))
        yield folder


def _show(title: str, found: dict[str, float]) -> None:
    print(title)
    for name, value in found.items():
        print(f"  {name:<16}{value:>8.3f}", flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _parser().parse_args(argv)
    result = measure(arguments)
    if arguments.json:
        settings = {name: value for name, value in vars(arguments).items() if name != "json"}
        Path(arguments.json).write_text(json.dumps({"settings": settings, **result}, indent=2) + "\n")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Cache policies against the full cache, as ratios.")
    parser.add_argument("--contexts", type=int, nargs="+", default=[4096, 16384], help="tokens of a decoding row")
    parser.add_argument("--rows", type=int, nargs="+", default=[8, 32])
    parser.add_argument("--policies", nargs="+", default=list(DECODED), choices=DECODED, metavar="NAME")
    parser.add_argument("--steps", type=int, default=20, help="decode steps that are timed")
    parser.add_argument("--admitted", nargs="*", default=list(ADMITTED), choices=ADMITTED, metavar="NAME")
    parser.add_argument("--pool", type=int, default=8, help="whole contexts that the pool of the admission test holds")
    parser.add_argument("--pool-context", type=int, default=4096)
    parser.add_argument("--offered", type=int, default=48, help="requests of the admission test")
    parser.add_argument("--outputs", type=int, default=96, help="tokens that each of them writes")
    parser.add_argument("--rounds", type=int, default=5, help="of the overhead test")
    parser.add_argument("--json", metavar="FILE")
    return parser


if __name__ == "__main__":
    sys.exit(main())
