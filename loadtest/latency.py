"""Two latencies of a server of our own: from start to ready, and to the first token of a prompt that is cached or not.

    python -m loadtest.latency --model mimir --prompt-tokens 1500 --rounds 5

Each round sends one fresh prompt three times to the same server: the first time it is cold, the last time warm. Only
the ratio counts on a shared machine.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from loadtest.client import Target
from loadtest.load import run_workload
from loadtest.own_server import own_server
from loadtest.workloads import Workload

SERVED_NAME = "own"


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _parser().parse_args(argv)
    result = measure(arguments)
    print(f"ready after {result['ready_s']:.1f} s")
    print(
        f"time to first token of {arguments.prompt_tokens} tokens: cold {result['cold_ms']:.1f} ms, "
        f"warm {result['warm_ms']:.1f} ms, ratio {result['ratio']:.1f} (medians of {arguments.rounds} rounds)"
    )
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(result, indent=2) + "\n")
    return 0


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    flags = ["--model", str(arguments.model), "--served-model-name", SERVED_NAME, "--threads", str(arguments.threads)]
    with tempfile.TemporaryDirectory() as scratch:
        started = time.perf_counter()
        with own_server([*flags, *arguments.serve_args.split()], log=Path(scratch) / "server.log") as url:
            ready_s = time.perf_counter() - started
            target = Target(url=url, model=SERVED_NAME)
            _send(target, 16, seed=-1)  # connections, first-call costs of the front end
            rounds = [_round(target, arguments.prompt_tokens, seed) for seed in range(arguments.rounds)]
    return {
        "ready_s": ready_s,
        "cold_ms": statistics.median(cold for cold, _ in rounds),
        "warm_ms": statistics.median(warm for _, warm in rounds),
        "ratio": statistics.median(cold / warm for cold, warm in rounds),
        "rounds": rounds,
    }


def _round(target: Target, prompt_tokens: int, seed: int) -> tuple[float, float]:
    """Milliseconds to the first token: of a prompt that is new, and of the same one the third time."""
    cold = _send(target, prompt_tokens, seed)
    _send(target, prompt_tokens, seed)
    return cold, _send(target, prompt_tokens, seed)


def _send(target: Target, prompt_tokens: int, seed: int) -> float:
    workload = Workload(num_requests=1, prompt_tokens=prompt_tokens, output_tokens=2, seed=seed)
    (record,) = asyncio.run(run_workload(target, workload, concurrency=1)).records
    if record.error:
        raise RuntimeError(f"a request of {prompt_tokens} tokens failed: {record.error}")
    return record.ttft_s * 1000


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Time to ready, and warm against cold time to first token.")
    parser.add_argument("--model", default="mimir", help="bundled model or checkpoint folder (default: %(default)s)")
    parser.add_argument("--prompt-tokens", type=int, default=1500)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--serve-args", default="", help="more flags for `kvasir serve`, as one string")
    parser.add_argument("--json", metavar="FILE")
    return parser


if __name__ == "__main__":
    sys.exit(main())
