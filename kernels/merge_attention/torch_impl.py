"""The merge in plain torch, float32 inside."""

from __future__ import annotations

import torch
from torch import Tensor


def merge_attention(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> None:
    largest = torch.maximum(lse_a, lse_b)
    largest = largest.masked_fill(largest == -torch.inf, 0.0)
    keep, add = torch.exp(lse_a - largest), torch.exp(lse_b - largest)
    total = keep + add
    divisor = total.masked_fill(total == 0, 1.0)
    merged = out_a * (keep / divisor).unsqueeze(2) + out_b * (add / divisor).unsqueeze(2)
    # where one part is empty the other stays: 0 times what an empty part holds need not be 0
    merged = torch.where((lse_a == -torch.inf).unsqueeze(2), out_b.float(), merged)
    merged = torch.where((lse_b == -torch.inf).unsqueeze(2), out_a.float(), merged)
    out_a.copy_(merged)
    is_merged = (lse_a != -torch.inf) & (lse_b != -torch.inf)
    lse_a.copy_(torch.where(is_merged, largest + total.log(), torch.maximum(lse_a, lse_b)))
