"""Two products per adapter and part on the rows gathered for it, in float32."""

from __future__ import annotations

from torch import Tensor

from kernels.lora.plan import LoraPlan
from kernels.lora.table import LoraTable


def add_lora(y: Tensor, x: Tensor, table: LoraTable, plan: LoraPlan) -> None:
    for adapter, start, end in plan.segments:
        parts = table.parts(adapter)
        if not parts:
            continue
        rows = plan.rows[start:end]
        inputs, sums = x[rows].float(), y[rows].float()
        for part in parts:
            inner = (inputs @ part.a.float().t()).mul_(part.scale)  # [rows, R]
            columns = sums[:, part.first_column : part.first_column + part.b.shape[1]]
            columns.addmm_(inner, part.b.float())
        y[rows] = sums.to(y.dtype)
