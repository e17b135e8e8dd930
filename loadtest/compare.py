"""Kvasir against its peers on the same weights, alternating in one run; prints medians of the per-round ratios.

    python -m loadtest.compare --shape small --llama-server PATH --rounds 3 --json loadtest/results/compare.json

Timings of shared machines drift, ratios inside one round much less: only the ratios count.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from loadtest.client import Target, run_workload
from loadtest.own_server import own_server
from loadtest.report import summarize
from loadtest.shapes import make
from loadtest.workloads import Workload

Measure = Callable[[Workload, int], dict[str, float]]


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _parser().parse_args(argv)
    with tempfile.TemporaryDirectory() as scratch:
        folder = arguments.model or make(arguments.shape, Path(scratch) / arguments.shape)
        results = _compare(folder, Path(scratch), arguments)
    for row in results:
        ratios = "  ".join(f"{name} {value:.2f}" for name, value in row["ratios"].items())
        print(f"concurrency {row['concurrency']:>2}: {ratios}")
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(results, indent=2) + "\n")
    return 0


def _compare(folder: Path, scratch: Path, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    results = []
    for concurrency in arguments.concurrency:
        workload = Workload(
            num_requests=max(concurrency, arguments.min_requests),
            prompt_tokens=arguments.prompt_tokens,
            output_tokens=arguments.output_tokens,
        )
        rounds: dict[str, list[dict[str, float]]] = {}
        # one server at a time is up while it is measured: an idle peer still holds memory, not the cores
        with ExitStack() as stack:
            measures = _start(stack, folder, scratch, arguments, workload, concurrency)
            for index in range(arguments.rounds + 1):
                for name, measure in measures.items():
                    figures = measure(_with_seed(workload, index), concurrency)
                    if index > 0:  # the first round warms up
                        rounds.setdefault(name, []).append(figures)
        results.append(_row(concurrency, rounds))
    return results


def _start(
    stack: ExitStack, folder: Path, scratch: Path, arguments: argparse.Namespace, workload: Workload, concurrency: int
) -> dict[str, Measure]:
    threads = str(arguments.threads)
    flags = ["--model", str(folder), "--served-model-name", "own", "--threads", threads, *arguments.serve_args.split()]
    url = stack.enter_context(own_server(flags, log=scratch / "kvasir.log"))
    measures: dict[str, Measure] = {"kvasir": _http_measure(Target(url=url, model="own"))}
    if arguments.llama_server:
        from loadtest.peers.gguf import convert
        from loadtest.peers.llama_cpp import llama_server

        gguf = convert(folder, scratch / "model-f32.gguf")
        context = concurrency * (workload.prompt_tokens + workload.output_tokens + 64)
        server = llama_server(
            arguments.llama_server,
            gguf,
            threads=arguments.threads,
            slots=concurrency,
            context=context,
            log=scratch / "llama.log",
        )
        measures["llama_cpp_f32"] = _http_measure(Target(url=stack.enter_context(server).url, model="peer"))
    if arguments.transformers:
        from loadtest.peers.transformers_generate import TransformersGenerate

        peer = TransformersGenerate(folder, threads=arguments.threads)
        measures["transformers_generate"] = lambda w, c: {"output_tokens_per_s": peer.run(w, concurrency=c)}
    return measures


def _http_measure(target: Target) -> Measure:
    def measure(workload: Workload, concurrency: int) -> dict[str, float]:
        summary = summarize(asyncio.run(run_workload(target, workload, concurrency=concurrency)))
        if summary.failed:
            raise RuntimeError(
                f"{summary.failed} requests of {target.model!r} failed at {target.url}: {summary.first_error}"
            )
        return {
            "output_tokens_per_s": summary.output_tokens_per_s,
            "ttft_p50_ms": summary.ttft_ms["p50"],
            "time_per_output_token_p50_ms": summary.time_per_output_token_ms["p50"],
        }

    return measure


def _with_seed(workload: Workload, seed: int) -> Workload:
    """The same workload with other prompts, so that no round is answered from a prefix cache."""
    return Workload(**{**workload.__dict__, "seed": seed})


def _row(concurrency: int, rounds: dict[str, list[dict[str, float]]]) -> dict[str, Any]:
    """Medians over the rounds; ratios above 1 say that Kvasir is faster."""
    own = rounds["kvasir"]
    ratios = {}
    for name, figures in rounds.items():
        if name == "kvasir":
            continue
        pairs = list(zip(own, figures, strict=True))
        key = "output_tokens_per_s"
        ratios[f"{key} / {name}"] = statistics.median(mine[key] / theirs[key] for mine, theirs in pairs)
        if "ttft_p50_ms" in figures[0]:
            key = "ttft_p50_ms"
            ratios[f"ttft {name} / own"] = statistics.median(theirs[key] / mine[key] for mine, theirs in pairs)
    return {"concurrency": concurrency, "ratios": ratios, "rounds": rounds}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Compare Kvasir with other servers on the same weights.")
    parser.add_argument("--shape", choices=("small", "tiny"), default="small")
    parser.add_argument("--model", type=Path, help="checkpoint folder; default: random weights of --shape")
    parser.add_argument("--llama-server", type=Path, help="llama.cpp's llama-server binary (needs the gguf package)")
    parser.add_argument("--transformers", action="store_true", help="also measure transformers' generate()")
    parser.add_argument("--serve-args", default="", help="more flags for `kvasir serve`, as one string")
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--min-requests", type=int, default=2)
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--output-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--json", metavar="FILE")
    return parser


if __name__ == "__main__":
    sys.exit(main())
