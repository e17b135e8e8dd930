"""Low-rank adapters on top of a product, many of them in one batch: y[t] += scale * B (A x[t]) for the token's adapter.

Sources: Hu et al. 2021, arXiv:2106.09685 (LoRA); grouping the tokens of a batch by adapter as in Chen et al. 2023,
arXiv:2310.18547 (Punica) and Sheng et al. 2023, arXiv:2311.03285 (S-LoRA). Differs from both: adapters of any ranks
lie where they were loaded, nothing is padded or paged.
Shape letters: T tokens, K and N of the base weight [N, K], R rank, n tokens that have an adapter.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels import backend
from kernels.lora.plan import BLOCK_ROWS, LoraPlan, plan_lora
from kernels.lora.table import LoraPart, LoraTable

__all__ = ["BLOCK_ROWS", "LoraPart", "LoraPlan", "LoraTable", "add_lora", "plan_lora"]

_FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def add_lora(y: Tensor, x: Tensor, table: LoraTable, plan: LoraPlan) -> None:
    """y[t, columns of p] += scale_p * (x[t] @ A_p^T) @ B_p^T for every part p of token t's adapter, in place.

    y      [T, N] float, rows contiguous: the base product
    x      [T, K] float of the same type, rows contiguous: its input
    table  the adapters of this linear: A_p [R, K], B_p [columns, R], of any ranks
    plan   of `plan_lora` for the adapters of the T tokens; an adapter without parts in this table adds nothing
    Sums are float32, rounded once when added to y. Tokens without an adapter are neither read nor written, and on CPU
    with the native kernels, and on GPUs, a token's result has the same bits in every batch.
    Raises ValueError when shapes, types or devices disagree, or when the plan has an adapter beyond the table.
    """
    if y.shape != (plan.num_tokens, table.out_features) or y.dtype not in _FLOATS or y.stride(1) != 1:
        raise ValueError(
            f"y is {list(y.shape)} {y.dtype}, need [{plan.num_tokens}, {table.out_features}] float, rows contiguous"
        )
    if x.shape != (plan.num_tokens, table.in_features) or x.dtype != y.dtype or x.stride(1) != 1:
        raise ValueError(
            f"x is {list(x.shape)} {x.dtype}, need [{plan.num_tokens}, {table.in_features}] {y.dtype}, rows contiguous"
        )
    if plan.max_adapter >= table.num_adapters:
        raise ValueError(f"the plan has adapter {plan.max_adapter}, the table ends at {table.num_adapters - 1}")
    if table.max_rank and plan.num_rows:
        backend.implementation("lora", x.device).add_lora(y, x, table, plan)
