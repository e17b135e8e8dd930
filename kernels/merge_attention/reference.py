"""Definition of the merge: a mean of the two results by their softmax denominators, in float64."""

from __future__ import annotations

import torch
from torch import Tensor


def merge_attention(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> None:
    for token in range(out_a.shape[0]):
        for head in range(out_a.shape[1]):
            parts = torch.stack([lse_a[token, head], lse_b[token, head]]).double()
            if parts[1] == -torch.inf:
                continue
            share = parts.softmax(0)
            if parts[0] == -torch.inf:
                out_a[token, head] = out_b[token, head].to(out_a.dtype)
            else:
                out_a[token, head] = share[0] * out_a[token, head].double() + share[1] * out_b[token, head].double()
            lse_a[token, head] = parts.logsumexp(0)
