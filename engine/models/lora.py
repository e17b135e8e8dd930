"""A decoder's layers a second time, over the same weights, whose linears add the low-rank adapters of each token.

The plain layers stay as they are and run whenever no token of a batch has an adapter: same path, same bits, no cost.
Knows adapter indices; never names, files or requests.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor

import kernels
from engine.models.config import DecoderConfig
from engine.models.layers import DecoderLayer, GatedMlp, Linear
from engine.models.lora_file import AdapterWeights, Target, adaptable
from kernels import LoraPlan, LoraTable, backend
from kernels.linear import PackedLinear


class DecoderAdapters:
    """Room for `max_adapters` adapters of one decoder. Made by `Decoder.enable_adapters`."""

    def __init__(
        self,
        config: DecoderConfig,
        layers: Sequence[DecoderLayer],
        max_adapters: int,
        *,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        """dtype: of hidden states."""
        self.targets: dict[str, Target] = adaptable(config)
        # the native and torch products take matrices of any type side by side, the Triton one those of one type
        self._dtype = dtype if device.type != "cpu" or backend.select("lora", device) == "triton" else None
        self._device = device
        self._num_indices = max_adapters + 1
        self._step = _Step()
        self._tables: dict[str, LoraTable] = {}
        self._layers = [self._adapted(f"layers.{i}", layer) for i, layer in enumerate(layers)]

    @property
    def num_bytes(self) -> int:
        """Bytes of all adapters held."""
        return sum(table.nbytes for table in self._tables.values())

    def add(self, index: int, weights: AdapterWeights) -> None:
        """Puts an adapter at a free index in 1 .. max_adapters. Not during a step."""
        for name, parts in weights.parts.items():
            self._tables[name].set(index, parts)

    def remove(self, index: int) -> None:
        """Lets go of an adapter's memory. Not during a step."""
        for table in self._tables.values():
            table.clear(index)

    def layers_for(self, plan: LoraPlan) -> list[DecoderLayer]:
        """The layers with which the batch of that plan runs; until the next call."""
        self._step.plan = plan
        return self._layers

    def _adapted(self, at: str, plain: DecoderLayer) -> DecoderLayer:
        layer = copy.copy(plain)
        layer.attention = copy.copy(plain.attention)
        layer.attention.qkv = self._linear(f"{at}.qkv", plain.attention.qkv)
        layer.attention.o = self._linear(f"{at}.o", plain.attention.o)
        if isinstance(plain.feed_forward, GatedMlp):
            mlp = copy.copy(plain.feed_forward)
            mlp.gate_up = self._linear(f"{at}.gate_up", mlp.gate_up)
            mlp.down = self._linear(f"{at}.down", mlp.down)
            layer.feed_forward = mlp
        return layer

    def _linear(self, name: str, base: Linear) -> Linear:
        assert isinstance(base, PackedLinear)
        num_parts = sum(target.linear == name for target in self.targets.values())
        table = LoraTable(
            base.out_features,
            base.in_features,
            num_adapters=self._num_indices,
            num_parts=num_parts,
            device=self._device,
            dtype=self._dtype,
        )
        self._tables[name] = table
        return _AdaptedLinear(base, table, self._step)


class _Step:
    """What the running step needs, shared by all adapted linears of a model."""

    plan: LoraPlan


class _AdaptedLinear:
    """The base product, then what the adapters of the batch's tokens add to it."""

    def __init__(self, base: PackedLinear, table: LoraTable, step: _Step) -> None:
        self._base = base
        self._table = table
        self._step = step

    def __call__(self, x: Tensor) -> Tensor:  # [T, K] -> [T, N]
        y = self._base(x)
        kernels.add_lora(y, x, self._table, self._step.plan)
        return y
