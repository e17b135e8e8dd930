"""What the speculation budget is worth: off, fixed and auto by batch size, on text that repeats and on chat.

    python -m loadtest.speculation_budget --drafters ngram --rows 1 16 64

In one process, without HTTP, on Mimir. The three ways alternate on the same requests, ratios are taken within a round,
and one round before the first warms everything, the budget's costs included. "copy" continues a prompt of random tokens
that repeats itself; "chat" are short prompts, sampled, which hardly any draft foresees.
"""

from __future__ import annotations

import argparse
import gc
import random
import statistics
import sys
import time
from collections.abc import Sequence
from typing import Any

WAYS = ("off", "fixed", "auto")
KINDS = ("copy", "chat")
MAX_NODES = 8
CONTEXT = 1024
PERIOD, NUM_PERIODS = 30, 6
SENTENCES = (
    "Once upon a time there was a little dog who lived near the river.",
    "Tell me how to bake a loaf of bread at home.",
    "What is the capital of France and why?",
    "Write a short letter to a friend about the sea.",
    "My sister has three cats and one of them",
    "Explain why the sky is blue to a child.",
)


def requests(
    tokenizer: Any, kind: str, num_rows: int, num_tokens: int, number: int, choice: dict[str, Any]
) -> list[Any]:
    """One per row; `number` says which round they are of."""
    from engine.types import EngineRequest, SamplingParams

    generator = random.Random(number)
    found = []
    for i in range(num_rows):
        if kind == "copy":
            prompt = NUM_PERIODS * [generator.randrange(10, 4000) for _ in range(PERIOD)]
            sampling = SamplingParams(temperature=0.0, max_tokens=num_tokens, ignore_eos=True)
        else:
            prompt = tokenizer.encode(SENTENCES[(i + number) % len(SENTENCES)])
            seed = generator.getrandbits(30)
            sampling = SamplingParams(temperature=0.9, seed=seed, max_tokens=num_tokens, ignore_eos=True)
        found.append(
            EngineRequest(request_id=f"{number}-{i}", prompt_token_ids=prompt, sampling=sampling, speculative=choice)
        )
    return found


def seconds(core: Any, batch: Sequence[Any]) -> float:
    for request in batch:
        core.add(request)
    started = time.perf_counter()
    while core.has_work:
        core.step()
    return time.perf_counter() - started


def measure(kind: str, drafter: str, num_rows: int, num_tokens: int, num_rounds: int) -> dict[str, list[float]]:
    """Seconds of each round, by way."""
    from engine.config_load import load
    from engine.launch import build_core, resolve_model_path
    from engine.text.tokenizer import Tokenizer

    tokenizer = Tokenizer.from_folder(resolve_model_path("mimir"))
    cores = {}
    for way in WAYS:
        options = {
            "model": "mimir",
            "max_model_len": CONTEXT,
            "max_num_seqs": num_rows,
            "threads": 1,
            "kv_cache_memory_mib": 512,
            "speculative_budget": "auto" if way == "auto" else "fixed",
            "speculative_max_rows": num_rows,
        }
        cores[way], _ = build_core(load(options))
    found: dict[str, list[float]] = {way: [] for way in WAYS}
    gc.collect()
    gc.freeze()
    for number in range(num_rounds + 1):
        for way in WAYS:
            choice = {"off": True} if way == "off" else {"drafters": [drafter], "max_nodes": MAX_NODES}
            found[way].append(seconds(cores[way], requests(tokenizer, kind, num_rows, num_tokens, number, choice)))
    return {way: times[1:] for way, times in found.items()}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="loadtest.speculation_budget", description=__doc__)
    parser.add_argument("--drafters", nargs="+", default=["ngram"])
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--tokens", type=int, default=200, help="of each output")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args(argv)
    print(f"{'speed, median (range)':34}{'fixed / off':>20}{'auto / off':>20}{'auto / fixed':>20}")
    for drafter in arguments.drafters:
        for kind in arguments.kinds:
            for num_rows in arguments.rows:
                times = measure(kind, drafter, num_rows, arguments.tokens, arguments.rounds)
                line = f"{drafter:18}{kind:6}{num_rows:4} rows "
                for way, base in (("fixed", "off"), ("auto", "off"), ("auto", "fixed")):
                    ratios = [b / a for a, b in zip(times[way], times[base], strict=True)]
                    spread = f"{statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})"
                    line += f"{spread:>20}"
                print(line, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
