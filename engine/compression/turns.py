"""What the hooks of a policy see of one request in one layer, and what they note.

Knows one row's slots, its policy and tensors; runs no attention. Shape letters: T tokens, L layers, H query heads, H_kv
kv heads, D head_dim, M hidden size, n slots that the last token sees, C channels.
"""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

import kernels
from engine.compression.base import HiddenView, QueryView, Selection
from engine.compression.state import RowState
from engine.models.batch import KVCache


@dataclass(slots=True)
class Presence:
    """Of a row's slots in a step, from which layer on their tokens are halted: [n] int64 on the device.

    Turns of one row share it: each sees what those before it have done in the same layer.
    """

    from_layer: Tensor
    is_whole: bool = True  # none is halted

    def at(self, layer: int, num_slots: int) -> Tensor:
        """[num_slots] bool: who has keys and values in the layer."""
        return self.from_layer[:num_slots] > layer


@dataclass(slots=True)
class Turn:
    """Tokens that a policy looks at together: a part of a prompt, or one generated token.

    row         of its segment
    tokens      of its segment
    num_slots   that the last of them sees; before them are the others
    acts        its attention is the policy's; else it is as usual, and only hidden states are looked at
    blocks      [MB] int64, the row's
    """

    row: int
    tokens: slice
    num_slots: int
    acts: bool
    state: RowState
    presence: Presence
    blocks: Tensor
    positions: Tensor
    memory: ChainMap[Any, Any]
    selected: dict[int, Selection | None] = field(default_factory=dict)  # of each layer
    queries: dict[int, Tensor] = field(default_factory=dict)  # of layers, for parts of later ones

    @property
    def num_tokens(self) -> int:
        return self.tokens.stop - self.tokens.start

    @property
    def own_slots(self) -> Tensor:
        """[T] int64: where the tokens themselves are."""
        return torch.arange(self.num_slots - self.num_tokens, self.num_slots, device=self.blocks.device)

    def view(self, layer: int, q: Tensor, cache: KVCache, options: dict[str, Any]) -> QueryView:
        """q [T, H, D] of these tokens; options of the layer's attention."""
        block_size = cache.k.shape[3]
        slots = torch.arange(self.num_slots, device=q.device)
        blocks, offsets = self.blocks[slots // block_size], slots % block_size

        def gathered(pool: Tensor, of_layer: int) -> Tensor:
            return pool[blocks, of_layer, :, offsets].transpose(0, 1).float()

        def logits(channels: Tensor | None = None) -> Tensor:
            return self._logits(layer, q, cache, options, channels)

        return QueryView(
            layer=layer,
            num_layers=cache.k.shape[1],
            queries=q,
            positions=self.positions,
            num_slots=self.own_slots + 1,
            num_prompt_tokens=self.state.num_prompt_tokens,
            block_size=block_size,
            seed=self.state.seed,
            scale=options["scale"],
            scores=None if self.state.scores is None else self.state.scores[:, layer],
            memory=self.memory,
            keys=lambda of_layer: gathered(cache.k, of_layer),
            values=lambda of_layer: gathered(cache.v, of_layer),
            logits=logits,
            side=None if self.state.side is None else partial(self._side, self.state.side),
        )

    def _side(self, read: Callable[[int, int], Tensor], of_layer: int) -> Tensor:
        return read(of_layer, self.num_slots)

    def _logits(
        self, layer: int, q: Tensor, cache: KVCache, options: dict[str, Any], channels: Tensor | None
    ) -> Tensor:
        found = kernels.attention_logits(
            q,
            cache.layer(layer)[0],
            self.blocks.int().unsqueeze(0),
            torch.tensor([self.num_slots], dtype=torch.int32, device=q.device),
            torch.tensor([0, self.num_tokens], dtype=torch.int32, device=q.device),
            scale=options["scale"],
            soft_cap=options["soft_cap"],
            channels=channels,
            num_slots=self.num_slots,
        )
        if self.presence.is_whole:
            return found
        return found.masked_fill(~self.presence.at(layer, self.num_slots), -torch.inf)

    def hidden_view(self, layer: int, num_layers: int, hidden: Tensor) -> HiddenView:
        """hidden [T, M] of these tokens."""
        return HiddenView(
            layer=layer,
            num_layers=num_layers,
            hidden=hidden,
            active=self.presence.from_layer[self.own_slots] > layer,
            positions=self.positions,
            num_prompt_tokens=self.state.num_prompt_tokens,
            seed=self.state.seed,
            memory=self.memory,
        )
