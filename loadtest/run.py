"""`kvasir bench`: one workload against one OpenAI-compatible server.

kvasir bench --url http://127.0.0.1:8000 --prompt-tokens 128 --output-tokens 64 --concurrency 8
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import httpx

from loadtest.client import Target, run_workload
from loadtest.own_server import own_server
from loadtest.report import Goals, summarize, table
from loadtest.workloads import Workload


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 1 when a request failed, 2 when the server could not be reached."""
    arguments = _parser().parse_args(argv)
    if arguments.self:
        with own_server(arguments.serve_args.split()) as url:
            arguments.url = url
            return _measure(arguments)
    return _measure(arguments)


def _measure(arguments: argparse.Namespace) -> int:
    url = arguments.url.rstrip("/").removesuffix("/v1")
    try:
        model = arguments.model or _first_model(url, arguments.api_key)
    except httpx.HTTPError as error:
        print(f"kvasir bench: cannot reach {url} ({type(error).__name__}); start a server first", file=sys.stderr)
        return 2
    target = Target(url=url, model=model, api_key=arguments.api_key, ignore_eos=not arguments.honour_eos)
    workload = Workload(
        num_requests=arguments.num_requests,
        prompt_tokens=arguments.prompt_tokens,
        output_tokens=arguments.output_tokens,
        shared_prefix_tokens=arguments.shared_prefix_tokens,
        vocab_size=0 if arguments.text else arguments.vocab_size,
        seed=arguments.seed,
    )
    run = asyncio.run(run_workload(target, workload, concurrency=arguments.concurrency, rate=arguments.rate))
    goals = Goals(
        ttft_s=arguments.goal_ttft_ms / 1000 if arguments.goal_ttft_ms else None,
        time_per_output_token_s=arguments.goal_itl_ms / 1000 if arguments.goal_itl_ms else None,
    )
    summary = summarize(run, goals)
    print(f"{model} at {url}")
    print(table(summary))
    if arguments.json:
        settings = {key: value for key, value in vars(arguments).items() if key != "api_key"}
        Path(arguments.json).write_text(json.dumps({"settings": settings, **summary.to_json()}, indent=2) + "\n")
    return 1 if summary.failed else 0


def _first_model(url: str, api_key: str | None) -> str:
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    response = httpx.get(f"{url}/v1/models", headers=headers, timeout=10.0)
    response.raise_for_status()
    return str(response.json()["data"][0]["id"])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="kvasir bench", description="Measure an OpenAI-compatible server.")
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="server (default: %(default)s)")
    parser.add_argument("--api-key", default=os.environ.get("KVASIR_API_KEY"), help="key, or KVASIR_API_KEY")
    parser.add_argument("--model", help="served model; default: the first one")
    parser.add_argument("--self", action="store_true", help="start a Kvasir server, measure it and stop it")
    parser.add_argument("--serve-args", default="", help="with --self: flags for `kvasir serve`, as one string")
    parser.add_argument("--num-requests", type=int, default=32, help="requests to send (default: %(default)s)")
    parser.add_argument("--prompt-tokens", type=int, default=128, help="own tokens of a prompt (default: %(default)s)")
    parser.add_argument("--output-tokens", type=int, default=64, help="tokens of an answer (default: %(default)s)")
    parser.add_argument("--shared-prefix-tokens", type=int, default=0, help="equal tokens in front of every prompt")
    load = parser.add_mutually_exclusive_group()
    load.add_argument("--concurrency", type=int, help="closed loop: requests in flight (default: all)")
    load.add_argument("--rate", type=float, help="open loop: Poisson arrivals per second")
    parser.add_argument("--text", action="store_true", help="send words; default: token ids")
    parser.add_argument("--vocab-size", type=int, default=1000, help="token ids stay below it (default: %(default)s)")
    parser.add_argument("--honour-eos", action="store_true", help="let answers end early")
    parser.add_argument("--goal-ttft-ms", type=float, help="goodput: time to first token at most")
    parser.add_argument("--goal-itl-ms", type=float, help="goodput: mean time per output token at most")
    parser.add_argument("--seed", type=int, default=0, help="of prompts and arrivals (default: %(default)s)")
    parser.add_argument("--json", metavar="FILE", help="write all figures there")
    return parser


if __name__ == "__main__":
    sys.exit(main())
