"""The operations beside attention, in the sizes of Llama-3.1-8B: what memory bounds against the copy bandwidth,
adapters against the product that they change, experts against reading those that are chosen.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

import kernels
from loadtest.gpu.record import Run, relative_error
from loadtest.micro import rows, sampling
from loadtest.micro.bench import Bench
from loadtest.micro.setup import BLOCK_SIZE, Setup, cpu_setup, cuda_setup

ADAPTERS, RANK = 8, 16
EXPERTS, TOP_K, EXPERT_SIZE, MODEL_SIZE = 128, 8, 768, 2048  # Qwen3-30B-A3B
DECODE_ROWS = (1, 32, 256)


def setup_of(run: Run) -> Setup:
    if run.device.type == "cuda":
        return cuda_setup()
    return replace(
        cpu_setup(), hidden=64, intermediate=96, heads=4, kv_heads=2, head_dim=32, vocab=500, tokens=4 * BLOCK_SIZE
    )


def measure_operations(run: Run) -> None:
    """Each with many rows, where bandwidth counts, and with few, where only latency does."""
    setup = setup_of(run)
    makers: list[Callable[[Setup], list[Bench]]] = [
        rows.rms_norm, rows.rope, rows.kv_write, rows.act_and_mul, rows.embedding, rope_kv_write,
        sampling.greedy, sampling.sampling,
    ]  # fmt: skip
    for make in makers:
        for tokens in (setup.tokens, run.size(32, 4)):
            if make in (sampling.greedy, sampling.sampling) and tokens != setup.tokens:
                continue
            if run.has_time(make.__name__, 2):
                with run.case(make.__name__):
                    for bench in make(replace(setup, tokens=max(tokens, BLOCK_SIZE * 4))):
                        _against_copy(run, bench)
    for count in DECODE_ROWS[: run.size(3, 2)]:
        if run.has_time("adapters", 2):
            with run.case("adapters"):
                _adapters(run, setup, count)
    for count in (*DECODE_ROWS, 2048)[: run.size(4, 2)]:
        if run.has_time("experts", 3):
            with run.case("experts"):
                _experts(run, count)


def rope_kv_write(setup: Setup) -> list[Bench]:
    """Rotation and cache write in one. Library: none has it; rotation and write one after the other."""
    q = setup.random(setup.tokens, setup.heads, setup.head_dim)
    k, v = (setup.random(setup.tokens, setup.kv_heads, setup.head_dim) for _ in "kv")
    shape = (setup.tokens // BLOCK_SIZE, setup.kv_heads, BLOCK_SIZE, setup.head_dim)
    k_cache, v_cache = (setup.random(*shape) for _ in "kv")
    positions = torch.arange(setup.tokens, device=setup.device)
    cos_sin = torch.rand(setup.tokens, setup.head_dim, device=setup.device)
    slots = torch.randperm(setup.tokens, device=setup.device)

    def apart() -> None:
        kernels.apply_rope(q, k, positions, cos_sin)
        kernels.kv_write(k, v, k_cache, v_cache, slots)

    return [
        Bench(
            "rope_kv_write",
            f"{setup.tokens} tokens",
            lambda: kernels.rope_kv_write(q, k, v, positions, cos_sin, k_cache, v_cache, slots),
            num_bytes=2 * (q.numel() + 2 * k.numel()) * setup.activations.itemsize + cos_sin.numel() * 4,
            library={"one after the other": apart},
        )
    ]


def _against_copy(run: Run, bench: Bench) -> None:
    assert callable(bench.run)
    has_sort = "top-p" in bench.kernel
    ms = run.ms(bench.run, in_graph=not has_sort)
    libraries = {name: run.ms(call, in_graph=not has_sort) for name, call in bench.library.items() if callable(call)}
    best = min(libraries, key=libraries.__getitem__)
    run.record(
        f"{bench.kernel}, {bench.case}",
        ms=ms,
        share_of_copy=run.share_of_copy(bench.num_bytes, ms),
        ratio_to_best_library=libraries[best] / ms,
        best_library=best,
    )


def _adapters(run: Run, setup: Setup, count: int) -> None:
    """What rows of 8 adapters add to the product of q, k and v."""
    out = (setup.heads + 2 * setup.kv_heads) * setup.head_dim
    dtype = setup.activations
    table = kernels.LoraTable(out, setup.hidden, num_adapters=ADAPTERS + 1, device=setup.device, dtype=dtype)
    for index in range(1, ADAPTERS + 1):
        a, b = setup.weight(RANK, setup.hidden).to(dtype), setup.weight(out, RANK).to(dtype)
        table.set(index, [kernels.LoraPart(a, b, 1.0)])
    plan = kernels.plan_lora([1 + i % ADAPTERS for i in range(count)], device=setup.device)
    x, y = setup.random(count, setup.hidden), setup.random(count, out)
    product = kernels.pack_linear(setup.weight(out, setup.hidden))
    base_ms = run.ms(lambda: product(x), in_graph=True)
    ms = run.ms(lambda: kernels.add_lora(y, x, table, plan), in_graph=True)
    run.record(f"adapters of rank {RANK}, {count} rows", ms=ms, product_ms=base_ms, share_of_product=ms / base_ms)


def _experts(run: Run, count: int) -> None:
    """The whole mixture for `count` tokens; the floor is reading each chosen expert once."""
    experts, top_k = run.size(EXPERTS, 8), run.size(TOP_K, 2)
    size, hidden = run.size(EXPERT_SIZE, 32), run.size(MODEL_SIZE, 64)
    dtype = torch.bfloat16 if run.device.type == "cuda" else torch.float32
    gate_up = torch.randn(experts, 2 * size, hidden, dtype=dtype, device=run.device) / hidden**0.5
    down = torch.randn(experts, hidden, size, dtype=dtype, device=run.device) / size**0.5
    x = torch.randn(count, hidden, dtype=dtype, device=run.device)
    scores = torch.rand(count, experts, device=run.device).topk(top_k, dim=1)
    weights, ids = scores.values.to(dtype), scores.indices

    def call() -> torch.Tensor:
        return kernels.moe(x, gate_up, down, weights, ids)

    exact = _by_expert(x.float(), gate_up.float(), down.float(), weights.float(), ids)
    error = relative_error(call(), exact)
    ms = run.ms(call, in_graph=True)
    library_ms = run.ms(lambda: _by_expert(x, gate_up, down, weights, ids))
    chosen = len(set(ids.flatten().tolist()))
    num_bytes = chosen * 3 * size * hidden * dtype.itemsize
    run.record(
        f"experts, {count} tokens",
        ms=ms,
        error=None if error < 2e-2 else f"relative error {error:.3g}",
        relative_error=error,
        chosen=chosen,
        share_of_copy=run.share_of_copy(num_bytes, ms),
        tflops=6 * count * top_k * size * hidden / 1e9 / ms,
        ratio_to_loop=library_ms / ms,
    )


def _by_expert(
    x: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor
) -> torch.Tensor:
    """One expert after the other in torch: what a model without a grouped product does."""
    out = torch.zeros_like(x)
    for expert in sorted(set(ids.flatten().tolist())):
        token, choice = (ids == expert).nonzero(as_tuple=True)
        gate, up = (x[token] @ gate_up[expert].t()).chunk(2, dim=1)
        inner = torch.nn.functional.silu(gate) * up
        out.index_add_(0, token, (inner @ down[expert].t()) * weights[token, choice, None])
    return out
