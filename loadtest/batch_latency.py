"""Time to first token of interactive requests while a batch runs, while equal interactive load runs, and when idle.

    python -m loadtest.batch_latency

Starts a server of its own with the bundled model. The load is the same kind of requests each time: prompts of a few
hundred tokens with shared beginnings, outputs of 96 tokens.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import httpx

from loadtest.own_server import own_server

COMPLETIONS = "/v1/completions"
WORDS = ("the", "of", "and", "to", "in", "is", "that", "it", "was", "for", "on", "are", "as", "with", "his", "they")
NUM_LINES = 400
NUM_CLIENTS = 12
PAUSE_S = 0.02
GREEDY = {"temperature": 0, "ignore_eos": True}


def bodies(count: int, seed: int = 1) -> list[dict[str, Any]]:
    draw = random.Random(seed)
    prefixes = [_text(draw, 300) for _ in range(4)]
    return [{"prompt": f"{draw.choice(prefixes)} {_text(draw, 100)}", "max_tokens": 96, **GREEDY} for _ in range(count)]


def _text(draw: random.Random, num_words: int) -> str:
    return " ".join(draw.choices(WORDS, k=num_words))


def probe(client: httpx.Client, draw: random.Random) -> float:
    """Milliseconds to the first event of a short request whose prompt nobody has sent before."""
    body = {"prompt": _text(draw, 60), "max_tokens": 8, "stream": True, **GREEDY}
    began = time.perf_counter()
    with client.stream("POST", COMPLETIONS, json=body) as answer:
        next(line for line in answer.iter_lines() if line.startswith("data: "))
        return (time.perf_counter() - began) * 1000


@contextmanager
def batch(client: httpx.Client) -> Iterator[Callable[[], bool]]:
    """A batch runs inside; gives whether it still does."""
    lines = [
        json.dumps({"custom_id": str(number), "method": "POST", "url": COMPLETIONS, "body": body})
        for number, body in enumerate(bodies(NUM_LINES))
    ]
    files = {"file": ("in.jsonl", "\n".join(lines))}
    file = client.post("/v1/files", files=files, data={"purpose": "batch"}).raise_for_status().json()
    fields = {"input_file_id": file["id"], "endpoint": COMPLETIONS, "completion_window": "24h"}
    made = client.post("/v1/batches", json=fields).raise_for_status().json()
    url = f"/v1/batches/{made['id']}"

    def state() -> dict[str, Any]:
        found: dict[str, Any] = client.get(url).raise_for_status().json()
        return found

    while state()["request_counts"]["completed"] == 0:
        time.sleep(PAUSE_S)
    yield lambda: state()["status"] == "in_progress"
    client.post(f"{url}/cancel")
    while state()["status"] not in ("cancelled", "completed"):
        time.sleep(PAUSE_S)


@contextmanager
def clients(url: str) -> Iterator[Callable[[], bool]]:
    """So many clients send the same requests inside, each one after the other."""
    is_over = threading.Event()
    load = bodies(NUM_LINES, seed=2)

    def run(number: int) -> None:
        with httpx.Client(base_url=url, timeout=120) as client:
            for body in load[number::NUM_CLIENTS] * 100:
                if is_over.is_set():
                    return
                client.post(COMPLETIONS, json=body)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(NUM_CLIENTS)]
    for thread in threads:
        thread.start()
    time.sleep(1.0)
    yield lambda: True
    is_over.set()
    for thread in threads:
        thread.join()


def measure(client: httpx.Client, num_probes: int, is_running: Callable[[], bool]) -> dict[str, float]:
    draw = random.Random()
    values: list[float] = []
    while len(values) < num_probes and is_running():
        values.append(probe(client, draw))
        time.sleep(PAUSE_S)
    values.sort()
    median, p90 = statistics.median(values), values[len(values) * 9 // 10]
    return {"probes": len(values), "ttft_p50_ms": round(median, 1), "ttft_p90_ms": round(p90, 1)}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Time to first token beside a batch.")
    parser.add_argument("--probes", type=int, default=60)
    arguments = parser.parse_args(argv)
    flags = ("--threads", "1", "--max-num-seqs", "8", "--num-blocks", "256", "--log-level", "warning")
    with (
        tempfile.TemporaryDirectory() as folder,
        own_server((*flags, "--data-folder", folder)) as url,
        httpx.Client(base_url=url, timeout=120) as client,
    ):
        measure(client, 5, lambda: True)  # first calls are slower
        print(json.dumps({"load": "none", **measure(client, arguments.probes, lambda: True)}))
        with batch(client) as is_running:
            print(json.dumps({"load": "a batch", **measure(client, arguments.probes, is_running)}))
        with clients(url) as is_running:
            name = f"{NUM_CLIENTS} interactive clients"
            print(json.dumps({"load": name, **measure(client, arguments.probes, is_running)}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
