"""The definition: token by token, part by part, in float64, rounded once."""

from __future__ import annotations

from torch import Tensor

from kernels.lora.plan import LoraPlan
from kernels.lora.table import LoraTable


def add_lora(y: Tensor, x: Tensor, table: LoraTable, plan: LoraPlan) -> None:
    for adapter, start, end in plan.segments:
        for row in plan.rows[start:end].tolist():
            for part in table.parts(adapter):
                columns = slice(part.first_column, part.first_column + part.b.shape[1])
                inner = part.scale * (part.a.double() @ x[row].double())  # [R]
                y[row, columns] = (y[row, columns].double() + inner @ part.b.double()).to(y.dtype)
