"""Benchmarks of everything that reads keys and values: attention, its scores, and packed blocks."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

import kernels
from kernels.packed_blocks import packed_bits_per_value, packed_places
from loadtest.micro.bench import Bench
from loadtest.micro.setup import BLOCK_SIZE, Setup

SCORE_QUERIES = 32  # the window of SnapKV


@dataclass(frozen=True)
class Cache:
    """Rows of one context length in blocks, and the same keys and values gathered for torch's attention."""

    k: Tensor  # [NB, H_kv, BS, D]
    v: Tensor
    table: Tensor
    lens: Tensor
    cu: Tensor
    q: Tensor  # [T, H, D]
    dense: tuple[Tensor, Tensor, Tensor]  # q [R, H, n, D], k and v [R, H_kv, S, D]


def make_cache(setup: Setup, rows: int, context: int, queries: int) -> Cache:
    """`queries` new tokens a row, the last ones of its context; blocks lie in random order."""
    blocks = context // BLOCK_SIZE
    k, v = (setup.random(rows * blocks, setup.kv_heads, BLOCK_SIZE, setup.head_dim) for _ in "kv")
    table = torch.randperm(rows * blocks).view(rows, blocks)
    q = setup.random(rows * queries, setup.heads, setup.head_dim)
    dense_k, dense_v = (
        x[table.to(setup.device)].transpose(1, 2).reshape(rows, setup.kv_heads, context, setup.head_dim) for x in (k, v)
    )
    return Cache(
        k=k,
        v=v,
        table=setup.ints(table),
        lens=setup.ints([context] * rows),
        cu=setup.ints([row * queries for row in range(rows + 1)]),
        q=q,
        dense=(q.view(rows, queries, setup.heads, setup.head_dim).transpose(1, 2), dense_k, dense_v),
    )


def decode(setup: Setup, sizes: tuple[tuple[int, int], ...] = ((32, 160), (8, 1024), (1, 8192))) -> list[Bench]:
    """One new token a row: the bound is reading all keys and values once."""
    return [decode_bench(setup, rows, context) for rows, context in sizes]


def decode_bench(setup: Setup, rows: int, context: int) -> Bench:
    return _attention_bench(setup, make_cache(setup, rows, context, 1), "decode", f"{rows} rows x {context} tokens", 1)


def prefill(setup: Setup, lengths: tuple[int, ...] = (512, 2048)) -> list[Bench]:
    """One whole prompt: the bound is the products of the half that is not masked."""
    return [prefill_bench(setup, length) for length in lengths]


def prefill_bench(setup: Setup, length: int) -> Bench:
    return _attention_bench(setup, make_cache(setup, 1, length, length), "prefill", f"{length} tokens", length)


def _attention_bench(setup: Setup, cache: Cache, kind: str, case: str, queries: int) -> Bench:
    plan = kernels.plan_attention(
        cache.cu.tolist(), cache.lens.tolist(), num_kv_heads=setup.kv_heads, device=setup.device
    )
    scale = setup.head_dim**-0.5
    q, k, v = cache.dense
    context = k.shape[2]
    pairs = context if queries == 1 else context * (context + 1) // 2  # of a query and a key that it sees
    return Bench(
        f"paged_attention {kind}",
        case,
        lambda: kernels.paged_attention(
            cache.q, cache.k, cache.v, cache.table, cache.lens, cache.cu, scale=scale, plan=plan
        ),
        num_bytes=(cache.k.numel() + cache.v.numel() + 2 * cache.q.numel()) * setup.activations.itemsize,
        num_flops=4 * k.shape[0] * setup.heads * setup.head_dim * pairs,
        library={
            "sdpa": lambda: F.scaled_dot_product_attention(q, k, v, is_causal=queries > 1, enable_gqa=True),
        },
    )


def attention_scores(setup: Setup, context: int = 4096) -> list[Bench]:
    """Attention that each slot got from the last queries of a prompt. Library: softmax of the products, summed."""
    cache = make_cache(setup, 1, context, SCORE_QUERIES)
    scale = setup.head_dim**-0.5
    _, lse = kernels.paged_attention(
        cache.q, cache.k, cache.v, cache.table, cache.lens, cache.cu, scale=scale, return_lse=True
    )
    weights = torch.ones(1, SCORE_QUERIES, device=setup.device)
    q, k, _ = cache.dense
    group = setup.heads // setup.kv_heads
    grouped = q.reshape(1, setup.kv_heads, group * SCORE_QUERIES, setup.head_dim)
    out = torch.zeros(1, 1, setup.kv_heads, context, device=setup.device)
    return [
        Bench(
            "attention_scores",
            f"{SCORE_QUERIES} queries, {context} tokens",
            lambda: kernels.attention_scores(
                cache.q, cache.k, cache.table, cache.lens, cache.cu, lse, weights, scale=scale, out=out
            ),
            num_bytes=cache.k.numel() * setup.activations.itemsize,
            num_flops=2 * setup.heads * SCORE_QUERIES * context * setup.head_dim,
            library={"softmax": lambda: (grouped @ k.transpose(2, 3) * scale).softmax(dim=-1).sum(dim=2)},
        )
    ]


def packed_blocks(setup: Setup, rows: int = 8, context: int = 4096) -> list[Bench]:
    """Attention over tokens packed into few bits. Library: torch's attention over the same tokens unpacked."""
    benches = []
    dense = make_cache(setup, rows, context, 1)
    plan = kernels.plan_packed_attention(
        dense.cu.tolist(), dense.lens.tolist(), num_kv_heads=setup.kv_heads, device=setup.device
    )
    groups = context // BLOCK_SIZE
    shape = (rows * groups + 1, 1, setup.kv_heads, BLOCK_SIZE, setup.head_dim)
    q, k, v = dense.dense
    for name in ("int8", "kivi4"):
        # what a group holds does not change the time, so all hold the same: the last block's tokens
        pool_k, pool_v = (setup.random(*shape) for _ in "kv")
        places = packed_places(name, setup.head_dim, setup.head_dim, BLOCK_SIZE, setup.activations)
        blocks = -(-groups // places)
        table = torch.arange(rows * blocks, dtype=torch.int32, device=setup.device).view(rows, blocks)
        destination = table.flatten().long()
        source = torch.full_like(destination, rows * groups)
        for place in range(places):
            kernels.seal_blocks(pool_k, pool_v, source, destination, torch.full_like(source, place), format=name)
        bits = packed_bits_per_value(name, setup.head_dim, setup.head_dim, BLOCK_SIZE, setup.activations)
        benches.append(
            Bench(
                f"packed_blocks {name}",
                f"{rows} rows x {context} tokens",
                partial(
                    kernels.packed_attention,
                    *(dense.q, pool_k, pool_v, table, dense.lens, dense.cu),
                    layer=0,
                    scale=setup.head_dim**-0.5,
                    format=name,
                    plan=plan,
                ),
                num_bytes=int(2 * rows * context * setup.kv_heads * setup.head_dim * bits / 8),
                num_flops=4 * rows * setup.heads * setup.head_dim * context,
                library={"sdpa, unpacked": lambda: F.scaled_dot_product_attention(q, k, v, enable_gqa=True)},
            )
        )
    return benches
