"""Benchmarks of the choice of tokens: the bound is reading the logits once."""

from __future__ import annotations

import torch

import kernels
from loadtest.micro.bench import Bench
from loadtest.micro.setup import Setup

TOP_P = 0.95
SHARPNESS = 3.0  # spread of the logits: a few hundred tokens hold most of the mass


def greedy(setup: Setup, rows: int = 256) -> list[Bench]:
    logits = torch.randn(rows, setup.vocab, device=setup.device) * SHARPNESS
    return [
        Bench(
            "sampling greedy",
            f"{rows} rows of {setup.vocab}",
            lambda: kernels.greedy(logits),
            num_bytes=logits.numel() * 4,
            library={"argmax": lambda: logits.argmax(1)},
        )
    ]


def sampling(setup: Setup, rows: int = 32) -> list[Bench]:
    """Greedy, plain and top-p. Library: argmax; softmax and multinomial; the same after a sort."""
    logits = torch.randn(rows, setup.vocab, device=setup.device) * SHARPNESS
    temperature = torch.full((rows,), 0.8, device=setup.device)
    keys = torch.arange(rows, device=setup.device)
    top_p = torch.full((rows,), TOP_P, device=setup.device)

    def plain() -> object:
        return torch.multinomial((logits / 0.8).softmax(dim=1), 1)

    def filtered() -> object:
        ordered, index = (logits / 0.8).softmax(dim=1).sort(dim=1, descending=True)
        ordered[ordered.cumsum(dim=1) - ordered > TOP_P] = 0.0
        return index.gather(1, torch.multinomial(ordered, 1))

    case = f"{rows} rows of {setup.vocab}"
    size = logits.numel() * 4
    return [
        *greedy(setup, rows),
        Bench(
            "sampling plain",
            case,
            lambda: kernels.sample(logits, temperature=temperature, keys=keys),
            size,
            library={"softmax, multinomial": plain},
        ),
        Bench(
            "sampling top-p",
            case,
            lambda: kernels.sample(logits, temperature=temperature, keys=keys, top_p=top_p),
            size,
            library={"sort, multinomial": filtered},
        ),
    ]
