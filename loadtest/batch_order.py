"""What the order of a batch saves: the same requests in file order, and in the planned order of `engine.batching`.

    python -m loadtest.batch_order --prefixes 8 --requests 12 --prefix-tokens 512

One process, the bundled model, a KV cache that cannot hold all prefixes at once; the file is shuffled. The scheduler
counts the prompt tokens that were computed: what else the machine does has no influence on them.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from engine.batching.memory import MemoryBudget
from engine.batching.ordering import Item, block_keys, num_computed_tokens, plan
from engine.config import CacheConfig, Config, ModelConfig, SchedulerConfig
from engine.launch import resolve_model_path
from engine.types import EngineRequest, SamplingParams

if TYPE_CHECKING:
    from engine.core import EngineCore
    from engine.models.batch import Model

BLOCK_SIZE = 16
NUM_ROWS = 16
VOCABULARY = range(300, 4000)


@dataclass
class Result:
    """One order's cost, and the tokens that came out."""

    prompt_tokens_computed: int
    steps: int
    cpu_s: float
    wall_s: float
    outputs: dict[str, list[int]] = field(repr=False)


def workload(
    num_prefixes: int, num_requests: int, prefix_tokens: int, tail_tokens: int, seed: int = 0
) -> list[EngineRequest]:
    """Shuffled requests; every prefix begins `num_requests` of them, outputs have 8 to 48 tokens."""
    draw = random.Random(seed)
    requests = []
    for prefix_number in range(num_prefixes):
        prefix = draw.choices(VOCABULARY, k=prefix_tokens)
        requests += [
            EngineRequest(
                request_id=f"{prefix_number}-{number}",
                prompt_token_ids=prefix + draw.choices(VOCABULARY, k=tail_tokens),
                sampling=SamplingParams(max_tokens=draw.randrange(8, 49), temperature=0.0, ignore_eos=True),
            )
            for number in range(num_requests)
        ]
    draw.shuffle(requests)
    return requests


class Driver:
    """Steps a core until all that it was given has ended."""

    def __init__(self, core: EngineCore) -> None:
        self.core = core
        self.outputs: dict[str, list[int]] = {}
        self.ended: list[str] = []
        self.num_steps = 0

    def step(self) -> None:
        self.num_steps += 1
        for output in self.core.step():
            self.outputs.setdefault(output.request_id, []).extend(output.token_ids)
            if output.finish_reason is not None:
                self.ended.append(output.request_id)

    def in_file_order(self, requests: Sequence[EngineRequest]) -> None:
        for request in requests:
            self.core.add(request)
        while self.core.has_work:
            self.step()

    def in_planned_order(self, requests: Sequence[EngineRequest], num_slots: int) -> None:
        """As the executor of batches does it: a group's prefix first, then its members, as many as memory holds."""
        items = items_of(requests)
        budget = MemoryBudget(num_slots, NUM_ROWS)
        held: dict[str, tuple[int, object, int]] = {}

        def settle() -> None:
            self.step()
            for request_id in self.ended:
                if request_id in held:
                    budget.remove(*held.pop(request_id))
            self.ended.clear()

        for number, group in enumerate(plan(items, BLOCK_SIZE)):
            size = group.prefix_tokens
            if size:
                self._compute_prefix(f"prefix-{number}", requests[group.members[0]], size, settle, budget, number)
            for place in group.members:
                request = requests[place]
                own = items[place].num_prompt_tokens - size + request.sampling.max_tokens
                cost = (own, number, size)
                while not budget.fits(*cost):
                    settle()
                budget.add(*cost)
                held[request.request_id] = cost
                self.core.add(request)
            if size:
                budget.let_go(number, size)
        while self.core.has_work:
            settle()

    def _compute_prefix(
        self, name: str, member: EngineRequest, size: int, settle: object, budget: MemoryBudget, number: int
    ) -> None:
        assert callable(settle)
        while not budget.fits(1, number, size):
            settle()
        budget.hold(number, size)
        sampling = SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True)
        self.core.add(
            EngineRequest(request_id=name, prompt_token_ids=member.prompt_token_ids[:size], sampling=sampling)
        )
        while name not in self.outputs:
            settle()
        del self.outputs[name]


def measure(model: Model, requests: Sequence[EngineRequest], num_blocks: int, *, is_planned: bool) -> Result:
    """Runs all requests in a fresh engine around the loaded model."""
    import torch

    from engine.launch import wire

    config = Config(
        model=ModelConfig(max_model_len=1024),
        cache=CacheConfig(block_size=BLOCK_SIZE, num_blocks=num_blocks + 1),
        scheduler=SchedulerConfig(
            max_num_seqs=NUM_ROWS, max_waiting_requests=len(requests), max_waiting_pools=1e6, max_queue_wait_s=1e6
        ),
    )
    core, _ = wire(model, config, torch.device("cpu"))
    driver = Driver(core)
    cpu_s, wall_s = time.process_time(), time.perf_counter()
    if is_planned:
        driver.in_planned_order(requests, num_blocks * BLOCK_SIZE)
    else:
        driver.in_file_order(requests)
    cpu_s, wall_s = time.process_time() - cpu_s, time.perf_counter() - wall_s
    return Result(core.stats().prompt_tokens_computed, driver.num_steps, cpu_s, wall_s, driver.outputs)


def items_of(requests: Sequence[EngineRequest]) -> list[Item]:
    return [
        Item(
            block_keys(request.prompt_token_ids, BLOCK_SIZE), len(request.prompt_token_ids), request.sampling.max_tokens
        )
        for request in requests
    ]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="A batch in file order against the planned order.")
    parser.add_argument("--prefixes", type=int, default=8)
    parser.add_argument("--requests", type=int, default=12, help="per prefix")
    parser.add_argument("--prefix-tokens", type=int, default=512)
    parser.add_argument("--tail-tokens", type=int, default=32)
    parser.add_argument("--pool-tokens", type=int, default=2048, help="size of the KV cache")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args(argv)
    import torch

    from engine.models import load_model

    torch.set_num_threads(arguments.threads)
    requests = workload(arguments.prefixes, arguments.requests, arguments.prefix_tokens, arguments.tail_tokens)
    items = items_of(requests)
    model = load_model(resolve_model_path("mimir"), device=torch.device("cpu"))
    num_blocks = arguments.pool_tokens // BLOCK_SIZE
    in_file_order, planned = (measure(model, requests, num_blocks, is_planned=flag) for flag in (False, True))
    for name, result in (("file order", in_file_order), ("planned", planned)):
        figures = {key: round(value, 2) for key, value in vars(result).items() if key != "outputs"}
        print(json.dumps({"order": name, **figures}))
    print(
        json.dumps(
            {
                "prompt_tokens": sum(item.num_prompt_tokens for item in items),
                "least_possible": num_computed_tokens(plan(items, BLOCK_SIZE), items),
                "prompt_tokens_ratio": round(in_file_order.prompt_tokens_computed / planned.prompt_tokens_computed, 2),
                "cpu_ratio": round(in_file_order.cpu_s / planned.cpu_s, 2),
                "wall_ratio": round(in_file_order.wall_s / planned.wall_s, 2),
                "different_outputs": sum(in_file_order.outputs[key] != planned.outputs[key] for key in planned.outputs),
            }
        )
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
