"""Benchmarks of products with weights: linear, low-rank adapters, and all layers of a decoder in one native call."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

import kernels
from kernels.decoder_step import DecoderStep, DecoderWeights, LayerWeights
from kernels.linear import bf16_instructions
from loadtest.micro.bench import Bench, Run
from loadtest.micro.setup import BLOCK_SIZE, Setup

WEIGHT_COPIES = 6  # taken in turn, so that a weight comes from memory as it does in a model
ADAPTERS, RANK = 8, 16
DECODER_LAYERS, DECODER_CONTEXT = 6, 160


def linear(setup: Setup, rows: tuple[int, ...] = (1, 8, 32, 512)) -> list[Bench]:
    """Gate and up in one matrix. Library: F.linear and mm in float32 on CPU, FBGEMM's 16-bit weights."""
    num_out, num_in = 2 * setup.intermediate, setup.hidden
    weights = [setup.weight(num_out, num_in) for _ in range(WEIGHT_COPIES)]
    packed = [kernels.pack_linear(weight) for weight in weights]
    dense = [weight.to(setup.activations) for weight in weights]
    prepacked = [_fbgemm(weight) for weight in dense] if setup.device.type == "cpu" else []
    benches = []
    for num_rows in rows:
        x = setup.random(num_rows, num_in)
        library: dict[str, list[Run]] = {
            "F.linear": [partial(F.linear, x, weight) for weight in dense],
            "mm": [partial(torch.mm, weight, x.t()) for weight in dense],
        }
        if setup.device.type == "cpu":
            product = torch.ops.quantized.linear_dynamic_fp16
            library["fbgemm fp16"] = [partial(product, x, handle) for handle in prepacked]
        benches.append(
            Bench(
                "linear",
                f"{num_rows} rows, {num_out} x {num_in}",
                [partial(weight, x) for weight in packed],
                num_bytes=num_out * num_in * setup.weights.itemsize
                + num_rows * (num_in + num_out) * setup.activations.itemsize,
                num_flops=2 * num_rows * num_out * num_in,
                library=library,
            )
        )
    return benches


def bf16_linear(setup: Setup, rows: tuple[int, ...] = (1, 8, 32, 512)) -> list[Bench]:
    """The same with activations rounded to bfloat16 (`--dtype bfloat16`). Library: F.linear in bfloat16."""
    if setup.device.type != "cpu":
        return []
    num_out, num_in = 2 * setup.intermediate, setup.hidden
    weights = [setup.weight(num_out, num_in).bfloat16() for _ in range(WEIGHT_COPIES)]
    packed = [kernels.pack_linear(weight, mode="bf16") for weight in weights]
    # an instruction of the CPU's own makes two multiply-adds where the bound counts one
    multiply_adds = 0.5 if bf16_instructions() == "avx512_bf16" else 1.0
    benches = []
    for num_rows in rows:
        x = setup.random(num_rows, num_in)
        rounded = x.bfloat16()
        benches.append(
            Bench(
                "bf16_linear",
                f"{num_rows} rows, {num_out} x {num_in}",
                [partial(weight, x) for weight in packed],
                num_bytes=num_out * num_in * 2 + num_rows * (num_in + num_out) * setup.activations.itemsize,
                num_flops=int(2 * num_rows * num_out * num_in * multiply_adds),
                library={"F.linear bf16": [partial(F.linear, rounded, weight) for weight in weights]},
            )
        )
    return benches


def _fbgemm(weight: Tensor) -> object:
    return torch.ops.quantized.linear_prepack_fp16(weight.float(), None)


def lora(setup: Setup, num_rows: int = 32) -> list[Bench]:
    """What adapters add to one product: every row its own of eight. Library: gathered matrices and two bmm."""
    num_out, num_in = setup.hidden, setup.hidden
    dtype = torch.bfloat16
    table = kernels.LoraTable(num_out, num_in, num_adapters=ADAPTERS + 1, device=setup.device, dtype=dtype)
    a, b = (
        torch.randn(ADAPTERS + 1, *shape, dtype=dtype, device=setup.device)
        for shape in ((RANK, num_in), (num_out, RANK))
    )
    for number in range(1, ADAPTERS + 1):
        table.set(number, [kernels.LoraPart(a=a[number], b=b[number], scale=1.0, first_column=0)])
    adapters = [1 + row % ADAPTERS for row in range(num_rows)]
    plan = kernels.plan_lora(adapters, setup.device)
    index = setup.ints(adapters, torch.int64)
    x, y = setup.random(num_rows, num_in), setup.random(num_rows, num_out)
    wide_a, wide_b = a.to(setup.activations), b.to(setup.activations)

    def library() -> None:
        low = torch.bmm(wide_a[index], x.unsqueeze(2))
        y.add_(torch.bmm(wide_b[index], low).squeeze(2))

    return [
        Bench(
            "lora",
            f"{num_rows} rows, {ADAPTERS} adapters of rank {RANK}, {num_out} x {num_in}",
            lambda: kernels.add_lora(y, x, table, plan),
            num_bytes=ADAPTERS * RANK * (num_in + num_out) * 2
            + num_rows * (num_in + 2 * num_out) * setup.activations.itemsize,
            num_flops=2 * num_rows * RANK * (num_in + num_out),
            library={"bmm": library},
        )
    ]


def decoder_step(setup: Setup, rows: tuple[int, ...] = (1, 8)) -> list[Bench]:
    """Six layers at a context of 160. Library: only the products of the layers, by F.linear, in float32."""
    if setup.device.type != "cpu":
        return []
    layers = [_layer(setup) for _ in range(DECODER_LAYERS)]
    dense = [[weight.float() for weight in weights] for _, weights in layers]
    embedding = setup.weight(setup.vocab, setup.hidden)
    step = DecoderStep(
        DecoderWeights(
            embedding=embedding,
            first_norm=torch.ones(setup.hidden),
            layers=[layer for layer, _ in layers],
            num_heads=setup.heads,
            num_kv_heads=setup.kv_heads,
            head_dim=setup.head_dim,
            activation="silu",
            norm_eps=1e-6,
            norms_whole_projection=False,
            qkv_clip=0.0,
            attention_scale=setup.head_dim**-0.5,
            attention_soft_cap=0.0,
            residual_multiplier=1.0,
            embedding_multiplier=1.0,
        )
    )
    weight_values = sum(weight.numel() for weights in dense for weight in weights)
    return [_decoder_bench(setup, step, dense, weight_values, num_rows) for num_rows in rows]


def _layer(setup: Setup) -> tuple[LayerWeights, list[Tensor]]:
    qkv_size = (setup.heads + 2 * setup.kv_heads) * setup.head_dim
    shapes = (
        (qkv_size, setup.hidden),
        (setup.hidden, setup.heads * setup.head_dim),
        (2 * setup.intermediate, setup.hidden),
        (setup.hidden, setup.intermediate),
    )
    weights = [setup.weight(*shape) for shape in shapes]
    qkv, o, gate_up, down = (kernels.pack_linear(weight) for weight in weights)
    norm = torch.ones(setup.hidden)
    layer = LayerWeights(
        qkv=qkv,
        o=o,
        gate_up=gate_up,
        down=down,
        q_norm=None,
        k_norm=None,
        attention_out_norm=None,
        mlp_norm=norm,
        mlp_out_norm=None,
        next_norm=norm,
        cos_sin=torch.rand(DECODER_CONTEXT, setup.head_dim),
        window=0,
    )
    return layer, weights


def _decoder_bench(
    setup: Setup, step: DecoderStep, dense: list[list[Tensor]], weight_values: int, num_rows: int
) -> Bench:
    blocks = DECODER_CONTEXT // BLOCK_SIZE
    pool = [torch.randn(num_rows * blocks, DECODER_LAYERS, setup.kv_heads, BLOCK_SIZE, setup.head_dim) for _ in "kv"]
    table = torch.arange(num_rows * blocks, dtype=torch.int32).view(num_rows, blocks)
    arguments = (
        torch.arange(num_rows) + 300,
        torch.full((num_rows,), DECODER_CONTEXT - 1),
        torch.arange(1, num_rows + 1) * DECODER_CONTEXT - 1,
        torch.arange(num_rows + 1, dtype=torch.int32),
        torch.full((num_rows,), DECODER_CONTEXT, dtype=torch.int32),
        table,
        pool[0],
        pool[1],
    )
    inputs = [[torch.randn(num_rows, weight.shape[1]) for weight in weights] for weights in dense]

    def library() -> None:
        for weights, xs in zip(dense, inputs, strict=True):
            for weight, x in zip(weights, xs, strict=True):
                F.linear(x, weight)

    return Bench(
        "decoder_step",
        f"{num_rows} rows, {DECODER_LAYERS} layers, context {DECODER_CONTEXT}",
        lambda: step(*arguments),
        num_bytes=weight_values * setup.weights.itemsize + sum(part.numel() for part in pool) * 4,
        num_flops=2 * num_rows * weight_values,
        library={"F.linear, products alone": library},
    )
