"""The flags of `kvasir bench`."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from loadtest.arrivals import ARRIVALS
from loadtest.client import TIMEOUT_S
from loadtest.scenes import SCENES
from loadtest.timeline import INTERVAL_S

DESCRIPTION = """Measure an OpenAI-compatible server: latencies, throughput and goodput under a chosen load.

Without --url a Kvasir server is started for it. --speculation compares drafters and has flags of its own
(`kvasir bench --speculation --help`); --compare FILE FILE shows earlier results side by side."""
OUT = "bench-report"
TOKENS, TRACE = "tokens", "trace"


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="kvasir bench",
        allow_abbrev=False,
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _server_flags(made.add_argument_group("what is measured"))
    _workload_flags(made.add_argument_group("what is sent"))
    _load_flags(made.add_argument_group("how it is sent"))
    _result_flags(made.add_argument_group("what comes out"))
    return made


def _server_flags(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--url", nargs="+", default=[], metavar="[NAME=]URL", help="running servers; several take turns, round by round"
    )
    group.add_argument("--api-key", default=os.environ.get("KVASIR_API_KEY"), help="key, or KVASIR_API_KEY")
    group.add_argument(
        "--model", help="with --url: the served model (default: the first); else what to serve (default: mimir)"
    )
    group.add_argument("--serve-args", default="", help="flags for the `kvasir serve` that is started, as one string")
    group.add_argument(
        "--peer",
        nargs="+",
        default=[],
        metavar="NAME=PATH",
        help="also start and measure other servers on the same weights: llama_cpp, vllm, transformers ...",
    )
    group.add_argument("--threads", type=positive, default=len(os.sched_getaffinity(0)), help="of servers with --peer")
    group.add_argument("--timeout-s", type=positive_float, default=TIMEOUT_S, help="of a request (%(default)s)")


def _workload_flags(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--workload",
        default=TOKENS,
        choices=(TOKENS, *SCENES),
        help="tokens: random prompts of one length; " + "; ".join(f"{name}: {s.about}" for name, s in SCENES.items()),
    )
    group.add_argument("--trace", type=Path, metavar="FILE", help="replay a JSONL trace instead")
    group.add_argument("--trace-speed", type=positive_float, default=1.0, help="so many times as fast (%(default)s)")
    group.add_argument("--prompt-tokens", type=positive, help="longest prompt (tokens: 128; else by the context)")
    group.add_argument("--output-tokens", type=positive, help="of an answer (tokens: 64; else by the workload)")
    group.add_argument("--shared-prefix-tokens", type=not_negative, default=0, help="equal tokens before each prompt")
    group.add_argument("--context", type=positive, help="prompt plus answer at most (default: what the server says)")
    group.add_argument("--text", action="store_true", help="send random words instead of random token ids")
    group.add_argument("--vocab-size", type=positive, default=1000, help="token ids stay below it (%(default)s)")
    group.add_argument("--honour-eos", action="store_true", help="let answers end early")
    group.add_argument("--temperature", type=float, default=0.0, help="default: greedy")
    group.add_argument("--seed", type=int, default=0, help="of prompts and arrivals (%(default)s)")


def _load_flags(group: argparse._ArgumentGroup) -> None:
    load = group.add_mutually_exclusive_group()
    load.add_argument(
        "--concurrency", type=positive, nargs="+", metavar="N", help="closed loop: requests in flight (1 4 16)"
    )
    load.add_argument("--rate", type=positive_float, nargs="+", metavar="R", help="open loop: requests per second")
    load.add_argument("--sweep", choices=("concurrency", "rate"), help="double the load until each server is saturated")
    group.add_argument("--sweep-from", type=positive_float, default=1.0, help="first load of a sweep (%(default)s)")
    group.add_argument("--max-levels", type=positive, default=8, help="of a sweep (%(default)s)")
    group.add_argument("--arrivals", default="poisson", choices=list(ARRIVALS), help="of an open loop (%(default)s)")
    group.add_argument("--max-in-flight", type=positive, help="of an open loop; what waits for it counts as late")
    group.add_argument("--num-requests", type=positive, help="at each load (default: by the load)")
    group.add_argument("--duration-s", type=positive_float, default=30.0, help="at each load at most (%(default)s)")
    group.add_argument("--warmup", type=not_negative, default=4, help="requests before the measurement (%(default)s)")
    group.add_argument("--rounds", type=positive, help="at each load (default: 1, with several servers 3)")
    group.add_argument("--no-stream", action="store_true", help="whole answers: no time to first token")


def _result_flags(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--slo-ttft-ms", type=positive_float, help="goodput: time to first token at most")
    group.add_argument("--slo-itl-ms", type=positive_float, help="goodput: mean time per output token at most")
    group.add_argument("--metrics-interval-s", type=float, default=INTERVAL_S, help="between samples; 0: none")
    group.add_argument(
        "--out", type=Path, default=Path(OUT), metavar="FOLDER", help="results.json, report.html (%(default)s)"
    )
    group.add_argument("--compare", type=Path, nargs="+", metavar="FILE", help="show earlier results; measure nothing")


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is below 1")
    return value


def not_negative(text: str) -> int:
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{text} is below 0")
    return value


def positive_float(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return value
