"""The layers of a decoder one by one, with somebody who looks at the hidden states between them.

Knows layers, norms and tensors. Shape letters: T tokens, C hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

import kernels
from engine.models.batch import ForwardBatch, HiddenHook, KVCache
from engine.models.layers import DecoderLayer


def run_watched(
    layers: Sequence[DecoderLayer], norms: Sequence[Tensor | None], norm_eps: float, x: Tensor, residual: Tensor,
    batch: ForwardBatch, cache: KVCache, watcher: HiddenHook,
) -> Tensor:  # fmt: skip
    """What the layers make of x [T, C] and residual [T, C], as without the watcher where that changes nothing.

    norms   that open each layer, and the final one; None for none
    """
    halted: Tensor | None = None
    for index, layer in enumerate(layers):
        seen = watcher.on_hidden(index, residual)
        if seen.changed is not None:
            x[seen.changed] = _normed(residual[seen.changed], norms[index], norm_eps)
        halted = halted if seen.halted is None else seen.halted
        kept = None if halted is None else residual[halted]
        x = layer(x, residual, batch, cache)
        if kept is not None:
            residual[halted] = kept
    if halted is not None:
        x[halted] = _normed(residual[halted], norms[len(layers)], norm_eps)
    return x


def _normed(hidden: Tensor, norm: Tensor | None, eps: float) -> Tensor:
    return hidden if norm is None else kernels.rms_norm(hidden, norm, eps)
