"""What low-rank adapters cost in a decode step: engines with and without them step alternately, in one process.

    python -m loadtest.lora_cost --model FOLDER --rows 32 --adapters 8 --rank 16

Both engines share one model with random weights; the adapters target all linears. Times are processor time, which other
work on the machine disturbs less than the clock; only the ratio is meant to be compared.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from engine.config import CacheConfig, Config, LoraConfig, ModelConfig, RuntimeConfig, SchedulerConfig
from engine.types import EngineRequest, SamplingParams

if TYPE_CHECKING:
    from engine.core import EngineCore
    from engine.models.decoder import Decoder
    from engine.models.lora_file import AdapterWeights

BLOCK_SIZE = 16
PROMPT_TOKENS = 32
WARM_UP_STEPS = 4
MILLISECONDS = 1e3


def measure(model: Decoder, *, num_rows: int, num_adapters: int, rank: int, num_steps: int) -> dict[str, float]:
    """Median milliseconds of a decode step without and with adapters, and the median ratio of neighbouring steps."""
    cores = [_decoding(model, num_rows, num_adapters, rank, num_steps, uses=uses) for uses in (False, True)]
    seconds: list[list[float]] = [[], []]
    for _ in range(WARM_UP_STEPS + num_steps):
        for core, own in zip(cores, seconds, strict=True):
            started = time.process_time()
            core.step()
            own.append(time.process_time() - started)
    without, with_adapters = (own[WARM_UP_STEPS:] for own in seconds)
    return {
        "without_ms": MILLISECONDS * statistics.median(without),
        "with_ms": MILLISECONDS * statistics.median(with_adapters),
        "ratio": statistics.median(b / a for a, b in zip(without, with_adapters, strict=True)),
    }


def _decoding(model: Decoder, num_rows: int, num_adapters: int, rank: int, num_steps: int, *, uses: bool) -> EngineCore:
    """An engine whose rows all decode; with `uses`, row i runs with adapter i modulo their number."""
    import torch

    from engine.launch import wire

    length = PROMPT_TOKENS + num_steps + 4 * num_rows + WARM_UP_STEPS
    config = Config(
        model=ModelConfig(max_model_len=length),
        cache=CacheConfig(
            block_size=BLOCK_SIZE, num_blocks=num_rows * (length // BLOCK_SIZE + 2) + 1, enable_prefix_cache=False
        ),
        scheduler=SchedulerConfig(max_num_seqs=num_rows),
        lora=LoraConfig(enable_lora=uses, max_lora_adapters=num_adapters, max_lora_rank=rank),
    )
    core, _ = wire(model, config, torch.device("cpu"))
    if uses:
        for number in range(num_adapters):
            index = core.scheduler.adapters.add(f"adapter{number}")
            core.runner._adapters.put(index, _random_adapter(model, rank, number))  # type: ignore[attr-defined]
    for row in range(num_rows):
        core.add(
            EngineRequest(
                request_id=str(row),
                prompt_token_ids=[2 + (7 * row + i) % 250 for i in range(PROMPT_TOKENS)],
                sampling=SamplingParams(max_tokens=length, temperature=0.0, ignore_eos=True),
                adapter=f"adapter{row % num_adapters}" if uses else "",
            )
        )
    roster = core.scheduler.roster
    while roster.num_waiting or any(request.num_remaining_tokens > 1 for request in roster.running):
        core.step()
    return core


def _random_adapter(model: Decoder, rank: int, seed: int) -> AdapterWeights:
    import torch

    from engine.models.lora_file import AdapterWeights, adaptable
    from kernels import LoraPart

    generator = torch.Generator().manual_seed(seed)
    parts: dict[str, list[LoraPart]] = {}
    for target in adaptable(model.config).values():
        a = torch.randn(rank, target.in_features, generator=generator) / target.in_features**0.5
        b = torch.randn(target.num_columns, rank, generator=generator) * 0.01
        pair = (a.to(torch.bfloat16), b.to(torch.bfloat16))
        parts.setdefault(target.linear, []).append(LoraPart(*pair, 1.0, target.first_column))
    return AdapterWeights(str(seed), rank, parts)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Decode steps with and without low-rank adapters.")
    parser.add_argument("--model", type=Path, required=True, help="folder with config.json, for instance of a shape")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--adapters", type=int, default=8)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--threads", type=int, default=RuntimeConfig().threads)
    arguments = parser.parse_args(argv)
    import torch

    from engine.models import load_model
    from engine.models.decoder import Decoder

    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    model = load_model(arguments.model, load_format="dummy", kind="native")
    assert isinstance(model, Decoder)
    for num_rows in arguments.rows:
        result = measure(
            model,
            num_rows=num_rows,
            num_adapters=min(arguments.adapters, num_rows),
            rank=arguments.rank,
            num_steps=arguments.steps,
        )
        print(json.dumps({"rows": num_rows, **{name: round(value, 3) for name, value in result.items()}}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
