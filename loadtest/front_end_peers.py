"""Kvasir's HTTP front end beside vLLM's: both on a model so small that a step is over at once.

    python -m loadtest.front_end_peers --vllm ENV

vLLM's front end cannot be given a stub engine from outside, so both run their own engine, in a process of its own, and
only the CPU time of the process that was started, which speaks HTTP, counts. Latency: vLLM's metrics tell how long
its engine waited and computed; that is subtracted. Kvasir's is measured before a stub engine (`loadtest.front_end`).
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import httpx
import psutil

from loadtest.front_end import first_token_times, stream_round, stub_server
from loadtest.peers import OWN, PEERS, PeerError, PeerServer, Settings
from loadtest.shapes import make

ENGINE_TIMES = ("vllm:request_queue_time_seconds", "vllm:request_prefill_time_seconds")
CONTEXT = 1024
PLAIN_TOKEN = "300"  # two letters in the tokenizer of `loadtest.shapes`

Figures = dict[str, float]


def measure(server: PeerServer, *, connections: int, output_tokens: int, num_requests: int) -> Figures:
    """One round: all connections at once, then requests one after the other."""
    process = psutil.Process(server.pid)
    # a model of random weights would often choose bytes that are no text and make no event
    fields = {"model": server.model, "temperature": 0.0, "ignore_eos": True, "logit_bias": {PLAIN_TOKEN: 100}}
    stream_round(server.url, process, 4, 20, 0.0, fields)  # first calls
    streamed = stream_round(server.url, process, connections, output_tokens, 0.0, fields)
    first_token_times(server.url, 5, fields)
    engine_before = _engine_seconds(server.url)
    times = first_token_times(server.url, num_requests, fields)
    engine_s = (_engine_seconds(server.url) - engine_before) / num_requests
    return {
        "tokens_s": streamed.tokens_s,
        "tokens_per_core_s": streamed.tokens_per_core_s,
        "us_per_token": 1e6 / streamed.tokens_per_core_s,
        "events_per_token": streamed.events_per_token,
        "core_busy": streamed.cpu_s / streamed.wall_s,
        "ttft_ms": 1000 * statistics.median(times),
        "ttft_in_engine_ms": 1000 * engine_s,
        "ttft_front_end_ms": 1000 * (statistics.fmean(times) - engine_s),
    }


def _engine_seconds(url: str) -> float:
    """Sum over all requests so far of the time between their arrival in the engine and their first token there.

    0 for a server without vLLM's metrics of these names.
    """
    text = httpx.get(f"{url}/metrics", timeout=10.0, follow_redirects=True).text
    sums = [re.search(rf"^{re.escape(name)}_sum(?:{{.*}})? (\S+)$", text, re.MULTILINE) for name in ENGINE_TIMES]
    return sum(float(found[1]) for found in sums if found)


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 2 when vLLM is missing or does not start."""
    arguments = _parser().parse_args(argv)
    rounds: dict[str, list[Figures]] = {"kvasir": [], "vllm": []}
    load = [os.getloadavg()[0]]
    with ExitStack() as stack:
        scratch = arguments.scratch or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        folder = make("nano", scratch / "nano")
        settings = Settings(
            scratch=scratch,
            threads=len(os.sched_getaffinity(0)),
            slots=arguments.connections,
            context=CONTEXT,
            prefix_cache=False,
        )
        try:
            vllm = stack.enter_context(PEERS["vllm"](arguments.vllm, folder, settings))
        except PeerError as error:
            print(f"front_end_peers: {error}", file=sys.stderr)
            return 2
        own = stack.enter_context(OWN(Path(sys.executable), folder, settings))
        for _ in range(arguments.rounds):
            for name, server in (("kvasir", own), ("vllm", vllm)):
                figures = measure(
                    server,
                    connections=arguments.connections,
                    output_tokens=arguments.output_tokens,
                    num_requests=arguments.requests,
                )
                if name == "kvasir":  # its latency without an engine
                    with stub_server(0.0) as (url, _):
                        first_token_times(url, 20)
                        figures["ttft_front_end_ms"] = 1000 * statistics.fmean(
                            first_token_times(url, arguments.requests)
                        )
                rounds[name].append(figures)
    load.append(os.getloadavg()[0])
    _print(rounds, load)
    if arguments.json:
        Path(arguments.json).write_text(json.dumps({"load_average": load, "rounds": rounds}, indent=2) + "\n")
    return 0


def _print(rounds: dict[str, list[Figures]], load: Sequence[float]) -> None:
    print(f"medians of {len(rounds['vllm'])} rounds, load average {load[0]:.1f} to {load[1]:.1f}")
    print(f"{'':<20}{'kvasir':>12}{'vllm':>12}{'kvasir / vllm, least and most':>32}")
    for key in rounds["vllm"][0]:
        own, peer = ([figures[key] for figures in rounds[name]] for name in ("kvasir", "vllm"))
        ratios = [mine / theirs for mine, theirs in zip(own, peer, strict=True) if theirs]
        spread = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})" if ratios else ""
        print(f"{key:<20}{statistics.median(own):>12,.2f}{statistics.median(peer):>12,.2f}{spread:>32}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="loadtest.front_end_peers", description=__doc__.partition("\n")[0])
    parser.add_argument("--vllm", type=Path, required=True, metavar="ENV", help="environment with vLLM's CPU build")
    parser.add_argument("--connections", type=int, default=64, help="streams at once (default: %(default)s)")
    parser.add_argument("--output-tokens", type=int, default=300, help="of each stream (default: %(default)s)")
    parser.add_argument("--requests", type=int, default=100, help="one after the other, for the latency")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--scratch", type=Path, help="keeps logs and the checkpoint there")
    parser.add_argument("--json", metavar="FILE")
    return parser


if __name__ == "__main__":
    sys.exit(main())
