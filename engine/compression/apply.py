"""Makes a compaction: moves the keys and values that a policy keeps. Knows tables and slots, no requests.

Shape letters: L layers, H_kv kv heads, n slots present, K slots kept, D head_dim, BS block size, MB blocks of a table.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

import kernels
from engine.compression.base import Keep
from engine.models.batch import KVCache


class SlotMap:
    """Addresses of a row's slots in the flat pools, where a unit is the BS neighbours of one block, layer and kv head.

    The tables of a row are one of blocks, or one per layer of parts that hold all heads of one layer, or one per
    (layer, kv head) of parts that are units.
    """

    def __init__(self, cache: KVCache, tables: Sequence[Sequence[int]]) -> None:
        _, num_layers, num_heads, self._block_size, _ = cache.k.shape
        device = cache.k.device
        width = max(len(table) for table in tables)
        ids = torch.tensor(
            [[*table, *[0] * (width - len(table))] for table in tables], dtype=torch.int64, device=device
        )
        layers = torch.arange(num_layers, device=device).view(-1, 1, 1)
        heads = torch.arange(num_heads, device=device).view(1, -1, 1)
        if len(tables) == 1:
            self._units = (ids.view(1, 1, -1) * num_layers + layers) * num_heads + heads  # [L, H_kv, MB]
        elif len(tables) == num_layers:
            self._units = ids.view(num_layers, 1, -1) * num_heads + heads
        else:
            self._units = ids.view(num_layers, num_heads, -1)

    def addresses(self, index: Tensor) -> Tensor:
        """index [L, H_kv, K] int64 of slots, -1 for none -> [L, H_kv, K] int64 rows of `flat`, -1 for none."""
        slots = index.clamp_min(0)
        units = self._units.gather(2, slots // self._block_size)
        return (units * self._block_size + slots % self._block_size).masked_fill(index < 0, -1)

    def layer(self, pool: Tensor, layer: int, num_slots: int) -> Tensor:
        """The first slots of one layer of a pool: [H_kv, n, D] float32. Slots that a head does not have are noise."""
        slots = torch.arange(num_slots, device=pool.device)
        units = self._units[layer][:, slots // self._block_size]
        return flat(pool)[units * self._block_size + slots % self._block_size].float()


def flat(pool: Tensor) -> Tensor:
    """A pool [NB, L, H_kv, BS, D] as rows [NB * L * H_kv * BS, D]."""
    return pool.view(-1, pool.shape[-1])


def move(cache: KVCache, source: SlotMap, destination: SlotMap, keep: Keep) -> None:
    """Puts the survivors into the first slots of `destination`, merged with what the policy merges into them."""
    num_kept = keep.index.shape[2]
    places = torch.arange(num_kept, device=keep.index.device).expand_as(keep.index)
    src = source.addresses(keep.index)
    dst = destination.addresses(places.masked_fill(keep.index < 0, -1))
    if keep.merge_to is None:
        kernels.move_slots(flat(cache.k), flat(cache.v), src.flatten(0, 1), dst.flatten(0, 1))
        return
    for pool in (cache.k, cache.v):
        for layer in range(keep.index.shape[0]):
            present = source.layer(pool, layer, keep.merge_to.shape[2])  # [H_kv, n, D]
            merged = _merged(present, keep.index[layer], keep.merge_to[layer])
            is_kept = dst[layer] >= 0
            flat(pool)[dst[layer][is_kept]] = merged[is_kept].to(pool.dtype)


def part_of(keep: Keep, first: int, last: int) -> Keep:
    """Only the survivors first .. last - 1 of each head, with what merges into them."""
    merge_to = keep.merge_to
    if merge_to is not None:
        merge_to = (merge_to - first).masked_fill((merge_to < first) | (merge_to >= last), -1)
    return Keep(keep.index[:, :, first:last], merge_to)


def _merged(present: Tensor, index: Tensor, merge_to: Tensor) -> Tensor:
    """Means of survivors and of what merges into them: [H_kv, n, D], [H_kv, K], [H_kv, n] -> [H_kv, K, D].

    A survivor into which nothing merges keeps its bits.
    """
    own = present.gather(1, index.clamp_min(0).unsqueeze(2).expand(-1, -1, present.shape[2]))
    takes_part = (merge_to >= 0).float()
    place = merge_to.clamp_min(0)
    total = own.scatter_add(1, place.unsqueeze(2).expand_as(present), present * takes_part.unsqueeze(2))
    count = torch.ones_like(index, dtype=torch.float32).scatter_add(1, place, takes_part)
    return torch.where((count > 1).unsqueeze(2), total / count.unsqueeze(2), own)
