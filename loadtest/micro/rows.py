"""Benchmarks of operations that work token by token or slot by slot: memory bounds them all."""

from __future__ import annotations

import torch
import torch.nn.functional as F

import kernels
from loadtest.micro.bench import Bench
from loadtest.micro.setup import BLOCK_SIZE, Setup

EPS = 1e-6
MOVED_SHARE = 4  # one slot in four is kept when a cache is compacted


def rms_norm(setup: Setup) -> list[Bench]:
    x, residual = (setup.random(setup.tokens, setup.hidden) for _ in range(2))
    weight = torch.ones(setup.hidden, dtype=setup.activations, device=setup.device)
    size = x.numel() * setup.activations.itemsize

    def library() -> None:
        F.rms_norm(residual.add_(x), (setup.hidden,), weight, EPS)

    case = f"{setup.tokens} x {setup.hidden}"
    return [
        Bench(
            "rms_norm",
            case,
            lambda: kernels.rms_norm(x, weight, EPS),
            num_bytes=2 * size,
            library={"F.rms_norm": lambda: F.rms_norm(x, (setup.hidden,), weight, EPS)},
        ),
        Bench(
            "add_rms_norm",
            case,
            lambda: kernels.add_rms_norm(x, residual, weight, EPS),
            num_bytes=4 * size,
            library={"add, F.rms_norm": library},
        ),
    ]


def rope(setup: Setup) -> list[Bench]:
    """Library: the formula in torch operations."""
    q = setup.random(setup.tokens, setup.heads, setup.head_dim)
    k = setup.random(setup.tokens, setup.kv_heads, setup.head_dim)
    positions = torch.arange(setup.tokens, device=setup.device)
    cos_sin = torch.rand(setup.tokens, setup.head_dim, device=setup.device)

    def library() -> None:
        cos, sin = (half.unsqueeze(1) for half in cos_sin[positions].chunk(2, dim=1))
        for x in (q, k):
            first, second = x.chunk(2, dim=2)
            torch.cat((first * cos - second * sin, second * cos + first * sin), dim=2)

    return [
        Bench(
            "rope",
            f"{setup.tokens} tokens, {setup.heads} + {setup.kv_heads} heads of {setup.head_dim}",
            lambda: kernels.apply_rope(q, k, positions, cos_sin),
            num_bytes=2 * (q.numel() + k.numel()) * setup.activations.itemsize + cos_sin.numel() * 4,
            library={"torch": library},
        )
    ]


def kv_write(setup: Setup) -> list[Bench]:
    """New keys and values into slots all over the cache. Library: index_copy_ of a cache without head-wise blocks."""
    shape = (setup.tokens // BLOCK_SIZE, setup.kv_heads, BLOCK_SIZE, setup.head_dim)
    k_cache, v_cache = (setup.random(*shape) for _ in "kv")
    k, v = (setup.random(setup.tokens, setup.kv_heads, setup.head_dim) for _ in "kv")
    slots = torch.randperm(setup.tokens, device=setup.device)
    flat_k, flat_v = (torch.empty_like(k) for _ in "kv")

    def library() -> None:
        flat_k.index_copy_(0, slots, k)
        flat_v.index_copy_(0, slots, v)

    return [
        Bench(
            "kv_write",
            f"{setup.tokens} tokens, {setup.kv_heads} heads of {setup.head_dim}",
            lambda: kernels.kv_write(k, v, k_cache, v_cache, slots),
            num_bytes=4 * k.numel() * setup.activations.itemsize,
            library={"index_copy_": library},
        )
    ]


def act_and_mul(setup: Setup) -> list[Bench]:
    tokens = setup.tokens // 4
    gate_up = setup.random(tokens, 2 * setup.intermediate)
    gate, up = gate_up.chunk(2, dim=1)
    out = torch.empty(tokens, setup.intermediate, dtype=setup.activations, device=setup.device)
    return [
        Bench(
            "act_and_mul",
            f"silu, {tokens} x {setup.intermediate}",
            lambda: kernels.act_and_mul(gate_up, "silu", out=out),
            num_bytes=3 * tokens * setup.intermediate * setup.activations.itemsize,
            library={"F.silu, mul": lambda: torch.mul(F.silu(gate), up, out=out)},
        )
    ]


def embedding(setup: Setup) -> list[Bench]:
    table = setup.weight(setup.vocab, setup.hidden)
    ids = torch.randint(setup.vocab, (setup.tokens,), device=setup.device)
    out_size = 4 if setup.device.type == "cpu" else setup.weights.itemsize
    return [
        Bench(
            "embedding",
            f"{setup.tokens} of {setup.vocab} rows of {setup.hidden}",
            lambda: kernels.embedding(ids, table),
            num_bytes=setup.tokens * setup.hidden * (setup.weights.itemsize + out_size),
            library={"F.embedding": lambda: F.embedding(ids, table).to(setup.activations)},
        )
    ]


def move_slots(setup: Setup) -> list[Bench]:
    """The compaction of a cache to a quarter. Library: index_copy_ of index_select."""
    slots = setup.kv_heads * setup.tokens * 8
    k, v = (setup.random(slots, setup.head_dim) for _ in "kv")
    kept = torch.arange(0, slots, MOVED_SHARE, device=setup.device)
    target = torch.arange(len(kept), device=setup.device)
    src, dst = kept.view(1, -1), target.view(1, -1)

    def library() -> None:
        for pool in (k, v):
            pool.index_copy_(0, target, pool.index_select(0, kept))

    return [
        Bench(
            "move_slots",
            f"{len(kept)} of {slots} slots of {setup.head_dim}",
            lambda: kernels.move_slots(k, v, src, dst),
            num_bytes=4 * len(kept) * setup.head_dim * setup.activations.itemsize,
            library={"index_copy_": library},
        )
    ]


def top_slots(setup: Setup, rows: int = 64, slots: int = 16384) -> list[Bench]:
    """The best quarter of each row, in the order of the slots. Library: topk and a sort of what it found."""
    scores = torch.rand(rows, slots, device=setup.device)
    lengths = torch.full((rows,), slots, device=setup.device)
    kept = torch.full((rows,), slots // MOVED_SHARE, device=setup.device)
    return [
        Bench(
            "top_slots",
            f"{slots // MOVED_SHARE} of {slots} slots, {rows} rows",
            lambda: kernels.top_slots(scores, kept, lengths),
            num_bytes=scores.numel() * 4 + rows * (slots // MOVED_SHARE) * 8,
            library={"topk, sort": lambda: torch.topk(scores, slots // MOVED_SHARE, sorted=False)[1].sort(dim=1)[0]},
        )
    ]
