"""Kvasir against its peers on the same weights and prompts, alternating in one run; prints medians of per-round ratios.

    python -m loadtest.compare --model DIR --peer llama_cpp=PATH --peer vllm=ENV --peer transformers=ENV --json FILE

Timings of shared machines drift, ratios inside one round much less: only the ratios count. All parties are up during
the whole run, one at a time is measured. How each peer is started is in `loadtest/peers/`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import random
import statistics
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from loadtest.load import run_workload
from loadtest.peers import OWN, PEERS, PeerError, PeerServer, Settings
from loadtest.report import Summary, summarize
from loadtest.same_prompts import GivenPrompts, Prompt, PromptSource
from loadtest.shapes import make

OWN_NAME, WITHOUT_CACHE = "kvasir", "kvasir_without_cache"
RATES = ("output_tokens_per_s", "decode_tokens_per_s")  # more is better, unlike the time to the first token
TTFT = "ttft_p50_ms"

Figures = dict[str, float]
Rounds = dict[str, list[Figures]]


@dataclass(frozen=True)
class Case:
    """One thing to measure."""

    name: str
    concurrency: int
    num_requests: int
    prompt_tokens: int
    output_tokens: int
    shared_prefix_tokens: int = 0  # the same for all requests of a round, sent once before the round


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 2 when a peer is missing or does not start."""
    arguments = _parser().parse_args(argv)
    with ExitStack() as stack:
        scratch = arguments.scratch or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        folder = arguments.model or make(arguments.shape, scratch / arguments.shape)
        try:
            parties = _start(stack, folder, scratch, arguments)
        except (PeerError, ModuleNotFoundError) as error:
            print(f"compare: {error}", file=sys.stderr)
            return 2
        results = _measure(parties, folder, arguments)
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(results, indent=2) + "\n")
    return 0


def cases(arguments: argparse.Namespace) -> list[Case]:
    found = [
        Case(
            name=f"{streams} streams" if streams > 1 else "1 stream",
            concurrency=streams,
            num_requests=max(streams, arguments.min_requests),
            prompt_tokens=arguments.prompt_tokens,
            output_tokens=arguments.output_tokens,
        )
        for streams in arguments.streams
    ]
    if arguments.ttft_tokens:
        found.append(Case(f"first token of {arguments.ttft_tokens}", 1, 2, arguments.ttft_tokens, 1))
    if arguments.shared_prefix:
        found.append(Case(f"{arguments.shared_prefix} tokens shared", 8, 32, 16, 16, arguments.shared_prefix))
    return found


def _start(stack: ExitStack, folder: Path, scratch: Path, arguments: argparse.Namespace) -> dict[str, PeerServer]:
    """Peers first: what they lack shows before anything is measured."""
    flags = dict(arguments.peer_flags)
    settings = Settings(scratch=scratch, threads=arguments.threads, slots=arguments.slots, context=arguments.context)
    parties = {}
    for name, path in arguments.peer:
        own_settings = replace(settings, flags=tuple(flags.get(name, "").split()))
        parties[name] = stack.enter_context(PEERS[name](path, folder, own_settings))
    serve = replace(settings, flags=tuple(arguments.serve_args.split()))
    if arguments.shared_prefix:
        without = replace(serve, prefix_cache=False)
        parties[WITHOUT_CACHE] = stack.enter_context(OWN(Path(sys.executable), folder, without))
    parties[OWN_NAME] = stack.enter_context(OWN(Path(sys.executable), folder, serve))
    for name, party in parties.items():
        print(f"{name}: ready after {party.start_s:.1f} s", flush=True)
    return parties


def _measure(parties: dict[str, PeerServer], folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    prompts = PromptSource(folder)
    results: dict[str, Any] = {"environment": environment(), "settings": _plain(vars(arguments)), "cases": []}
    for case in cases(arguments):
        taking_part = {
            name: party for name, party in parties.items() if name != WITHOUT_CACHE or case.shared_prefix_tokens
        }
        load_before = os.getloadavg()[0]
        rounds = measure_case(case, taking_part, prompts, arguments.rounds)
        row = {**asdict(case), "load_average": [load_before, os.getloadavg()[0]], **_row(rounds)}
        print(table(row), flush=True)
        results["cases"].append(row)
    own_memory = parties[OWN_NAME].peak_rss_bytes()
    for name, party in parties.items():
        memory = party.peak_rss_bytes()
        results.setdefault("parties", {})[name] = {"start_s": party.start_s, "peak_rss_bytes": memory}
        print(f"{name}: peak memory {memory / 1e6:.0f} MB, Kvasir / it {own_memory / memory:.2f}")
    return results


def measure_case(case: Case, parties: dict[str, PeerServer], prompts: PromptSource, num_rounds: int) -> Rounds:
    """All parties in turn, in every second round the other way about; a short warm-up before the first."""
    rounds: Rounds = {name: [] for name in parties}
    short = replace(case, prompt_tokens=min(32, case.prompt_tokens), output_tokens=min(8, case.output_tokens))
    for name, party in parties.items():
        _run(party, name, replace(short, num_requests=case.concurrency), prompts, seed=-1)
    for index in range(num_rounds):
        for name in list(parties) if index % 2 == 0 else reversed(parties):
            rounds[name].append(_run(parties[name], name, case, prompts, seed=index))
    return rounds


def _run(party: PeerServer, name: str, case: Case, prompts: PromptSource, *, seed: int) -> Figures:
    # a string as seed: unlike a tuple's, its hash is the same in every process
    generator = random.Random(f"{case.name} {seed}")
    prefix = None
    if case.shared_prefix_tokens:
        prefix = prompts.draw(generator, case.shared_prefix_tokens)
        _send(party, name, [prompts.draw(generator, case.prompt_tokens, prefix)], replace(case, num_requests=1))
    drawn = [prompts.draw(generator, case.prompt_tokens, prefix) for _ in range(case.num_requests)]
    summary = _send(party, name, drawn, case)
    time_per_token_ms = summary.time_per_output_token_ms["p50"]
    figures = {"output_tokens_per_s": summary.output_tokens_per_s, TTFT: summary.ttft_ms["p50"]}
    if time_per_token_ms > 0:
        figures["decode_tokens_per_s"] = 1000 / time_per_token_ms
    if case.shared_prefix_tokens:
        figures["cached_tokens"] = float(summary.cached_tokens)
    return figures


def _send(party: PeerServer, name: str, drawn: list[Prompt], case: Case) -> Summary:
    """Raises RuntimeError when a request fails or the server counts other tokens than were asked for."""
    workload = GivenPrompts(
        num_requests=len(drawn),
        output_tokens=case.output_tokens,
        given=tuple(prompt.token_ids if party.takes_token_ids else prompt.text for prompt in drawn),
    )
    summary = summarize(asyncio.run(run_workload(party.target, workload, concurrency=case.concurrency)))
    if summary.failed:
        raise RuntimeError(f"{summary.failed} requests of {name} failed: {summary.first_error}")
    prompt_tokens = sum(len(prompt.token_ids) for prompt in drawn)
    if summary.output_tokens != len(drawn) * case.output_tokens or summary.prompt_tokens != prompt_tokens:
        raise RuntimeError(
            f"{name} counted {summary.prompt_tokens} prompt and {summary.output_tokens} output tokens; asked for "
            f"{prompt_tokens} and {len(drawn) * case.output_tokens}, so nothing can be compared"
        )
    return summary


def _row(rounds: Rounds) -> dict[str, Any]:
    """Ratios are Kvasir / peer: above 1 is better for rates, below 1 for the time to the first token."""
    ratios: dict[str, dict[str, Figures]] = {}
    for name, figures in rounds.items():
        if name != OWN_NAME:
            ratios[name] = {
                key: ratio(rounds[OWN_NAME], figures, key)
                for key in (*RATES, TTFT)
                if all(key in round_ for round_ in (*figures, *rounds[OWN_NAME]))
            }
    medians = {
        name: {key: statistics.median(round_[key] for round_ in figures) for key in figures[0]}
        for name, figures in rounds.items()
    }
    return {"ratios": ratios, "medians": medians, "rounds": rounds}


def ratio(own: Sequence[Figures], theirs: Sequence[Figures], key: str) -> Figures:
    """Median and extremes of the quotients own / theirs, each within one round."""
    quotients = [mine[key] / other[key] for mine, other in zip(own, theirs, strict=True)]
    return {"median": statistics.median(quotients), "min": min(quotients), "max": max(quotients)}


def table(row: dict[str, Any]) -> str:
    """One case for a terminal: what each party reached, and Kvasir against it."""
    load = " to ".join(f"{value:.1f}" for value in row["load_average"])
    lines = [
        f"\n{row['name']} ({row['num_requests']} requests of {row['prompt_tokens']} + {row['output_tokens']} "
        f"tokens; load average {load}); in brackets Kvasir / it: median, least and most of the rounds"
    ]
    for name, medians in row["medians"].items():
        cells = []
        for key, value in medians.items():
            found = row["ratios"].get(name, {}).get(key)
            spread = f" [{found['median']:.2f}: {found['min']:.2f} {found['max']:.2f}]" if found else ""
            cells.append(f"{key} {value:.1f}{spread}")
        lines.append(f"  {name:<22}" + "  ".join(cells))
    return "\n".join(lines)


def environment() -> dict[str, Any]:
    """What a reader must know about the machine."""
    return {
        "cores": len(os.sched_getaffinity(0)),
        "machine": platform.machine(),
        "python": platform.python_version(),
        "load_average": os.getloadavg(),
    }


def _plain(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings as JSON holds them, without the machine's paths."""
    plain: dict[str, Any] = {
        key: value for key, value in settings.items() if isinstance(value, int | float | str | list | None)
    }
    plain["model"] = settings["model"].name if settings["model"] else settings["shape"]
    plain["peer"] = [name for name, _ in settings["peer"]]
    plain["peer_flags"] = dict(settings["peer_flags"])
    plain.pop("json")
    return plain


def _peer(text: str) -> tuple[str, Path]:
    name, _, path = text.partition("=")
    if name not in PEERS or not path:
        raise argparse.ArgumentTypeError(f"need NAME=PATH with a name of {', '.join(PEERS)}; got {text!r}")
    return name, Path(path).expanduser()


def _peer_flags(text: str) -> tuple[str, str]:
    name, _, flags = text.partition("=")
    if name not in PEERS:
        raise argparse.ArgumentTypeError(f"need NAME=FLAGS with a name of {', '.join(PEERS)}; got {text!r}")
    return name, flags


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="loadtest.compare", description=__doc__.partition("\n")[0])
    parser.add_argument("--shape", choices=("small", "tiny"), default="small", help="random weights (default: small)")
    parser.add_argument("--model", type=Path, metavar="DIR", help="a checkpoint folder instead of --shape")
    parser.add_argument(
        "--peer", type=_peer, action="append", default=[], metavar="NAME=PATH", help=f"one of {', '.join(PEERS)}"
    )
    parser.add_argument("--peer-flags", type=_peer_flags, action="append", default=[], metavar="NAME=FLAGS")
    parser.add_argument("--serve-args", default="", help="more flags for `kvasir serve`, as one string")
    parser.add_argument("--streams", type=int, nargs="*", default=[1, 8, 32], help="requests at once (default: 1 8 32)")
    parser.add_argument("--min-requests", type=int, default=2, help="requests of a round at least (default: 2)")
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--output-tokens", type=int, default=64)
    parser.add_argument("--ttft-tokens", type=int, default=512, help="prompt whose first token is timed; 0: none")
    parser.add_argument("--shared-prefix", type=int, default=1024, help="tokens before 32 requests; 0: not measured")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="of every party")
    parser.add_argument("--slots", type=int, default=32, help="requests that every party runs at once (default: 32)")
    parser.add_argument("--context", type=int, default=1536, help="tokens of the longest request (default: 1536)")
    parser.add_argument("--scratch", type=Path, help="keeps logs and converted weights there")
    parser.add_argument("--json", metavar="FILE")
    return parser


if __name__ == "__main__":
    sys.exit(main())
