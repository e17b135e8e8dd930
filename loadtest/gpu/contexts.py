"""Rows of one length in a paged cache of one layer, in all the ways in which attention may read them.

Shape letters: R rows, n new tokens of a row, S slots of a row, H query heads, H_kv kv heads, D head dim, BS block size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

import kernels
from kernels.packed_blocks import packed_bits_per_value, packed_places
from loadtest.gpu.record import Run

BLOCK_SIZE = 16

Call = Callable[[], Tensor]


@dataclass(frozen=True, kw_only=True)
class Heads:
    """Of the attention that is measured."""

    query: int
    kv: int
    dim: int

    def scale(self) -> float:
        return float(self.dim**-0.5)


def heads_of(run: Run) -> Heads:
    """Llama-3.1-8B's."""
    return Heads(query=run.size(32, 4), kv=run.size(8, 2), dim=run.size(128, 32))


@dataclass(frozen=True)
class Contexts:
    """R rows of S slots, the last n of them new; blocks lie in random order. `k`, `v` [NB, H_kv, BS, D]."""

    heads: Heads
    q: Tensor  # [R * n, H, D]
    k: Tensor
    v: Tensor
    table: Tensor  # [R, S / BS] int32
    lens: Tensor
    starts: Tensor
    queries: int

    @staticmethod
    def make(run: Run, rows: int, length: int, queries: int = 1) -> Contexts:
        heads, blocks = heads_of(run), length // BLOCK_SIZE
        dtype = torch.bfloat16 if run.device.type == "cuda" else torch.float32
        k, v = (
            torch.randn(rows * blocks, heads.kv, BLOCK_SIZE, heads.dim, dtype=dtype, device=run.device) for _ in "kv"
        )
        return Contexts(
            heads=heads,
            q=torch.randn(rows * queries, heads.query, heads.dim, dtype=dtype, device=run.device),
            k=k,
            v=v,
            table=torch.randperm(rows * blocks, device=run.device).int().view(rows, blocks),
            lens=torch.full((rows,), length, dtype=torch.int32, device=run.device),
            starts=torch.arange(0, (rows + 1) * queries, queries, dtype=torch.int32, device=run.device),
            queries=queries,
        )

    @property
    def rows(self) -> int:
        return len(self.lens)

    @property
    def length(self) -> int:
        return self.table.shape[1] * BLOCK_SIZE

    @property
    def num_bytes(self) -> int:
        """Keys and values read once, queries and outputs."""
        return self.k.nbytes + self.v.nbytes + 2 * self.q.nbytes

    def dense(self, rows: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """q [R, H, n, D] and k, v [R, H_kv, S, D] of the first rows: what library attention takes."""
        table = self.table[:rows].long()
        q = self.q[: len(table) * self.queries].unflatten(0, (len(table), self.queries)).transpose(1, 2)
        k, v = (x[table].transpose(1, 2).flatten(2, 3) for x in (self.k, self.v))
        return q, k, v

    def paged(self, parents: list[int] | None = None) -> Call:
        """Every row over its table."""
        return self._attend(self.k, self.v, self.table, self.lens, parents)

    def block_lists(self, kept: int) -> Call:
        """Each kv head of a row reads blocks of its own choice, `kept` slots in all, as Quest does."""
        heads, blocks = self.heads.kv, kept // BLOCK_SIZE
        chosen = torch.rand(self.rows, heads, self.table.shape[1], device=self.q.device).topk(blocks, dim=2).indices
        picked = self.table.unsqueeze(1).expand(-1, heads, -1).gather(2, chosen.sort(dim=2).values)
        head = torch.arange(heads, device=self.q.device).view(1, heads, 1)
        k, v = (x.flatten(0, 1).unsqueeze(1) for x in (self.k, self.v))  # one head of [NB * H_kv] parts of blocks
        return self._attend(k, v, (picked * heads + head).int(), torch.full_like(self.lens, kept))

    def token_lists(self, kept: int) -> Call:
        """Each kv head of a row reads tokens of its own choice, `kept` of them."""
        heads = self.heads.kv
        chosen = torch.rand(self.rows, heads, self.length, device=self.q.device).topk(kept, dim=2).indices
        chosen = chosen.sort(dim=2).values
        block = self.table.unsqueeze(1).expand(-1, heads, -1).long().gather(2, chosen // BLOCK_SIZE)
        head = torch.arange(heads, device=self.q.device).view(1, heads, 1)
        slots = (block * heads + head) * BLOCK_SIZE + chosen % BLOCK_SIZE
        k, v = (x.view(-1, 1, 1, self.heads.dim) for x in (self.k, self.v))  # blocks of one slot
        return self._attend(k, v, slots.int(), torch.full_like(self.lens, kept))

    def _attend(self, k: Tensor, v: Tensor, table: Tensor, lens: Tensor, parents: list[int] | None = None) -> Call:
        plan = kernels.plan_attention(
            self.starts.tolist(), lens.tolist(), num_kv_heads=self.heads.kv, device=self.q.device, parents=parents
        )
        where = table.contiguous(), lens, self.starts
        return partial(kernels.paged_attention, self.q, k, v, *where, scale=self.heads.scale(), plan=plan)

    def packed(self, name: str) -> tuple[Call, int, Callable[[], Contexts]]:
        """All slots in a packed format: the call, the bytes that it reads, and what the codes say as a dense cache."""
        dim = self.heads.dim
        places = packed_places(name, dim, dim, BLOCK_SIZE, self.k.dtype)
        groups = self.rows * self.table.shape[1]
        blocks = -(-self.table.shape[1] // places)  # of a row
        pools = [torch.cat((x, torch.zeros_like(x[: self.rows * blocks]))).unsqueeze(1) for x in (self.k, self.v)]
        row = torch.arange(self.rows, device=self.q.device).view(-1, 1)
        group = torch.arange(self.table.shape[1], device=self.q.device).view(1, -1)
        target, place = (groups + row * blocks + group // places), (group % places).expand(self.rows, -1)
        source = self.table.flatten().long()
        kernels.seal_blocks(pools[0], pools[1], source, target.flatten(), place.flatten(), format=name)
        table = groups + torch.arange(self.rows * blocks, device=self.q.device).view(self.rows, blocks)
        plan = kernels.plan_packed_attention(
            self.starts.tolist(), self.lens.tolist(), num_kv_heads=self.heads.kv, device=self.q.device
        )
        k_pool, v_pool = pools
        packed_table, scale = table.int(), self.heads.scale()

        def call() -> Tensor:
            where = packed_table, self.lens, self.starts
            out, _ = kernels.packed_attention(
                self.q, k_pool, v_pool, *where, layer=0, scale=scale, format=name, plan=plan
            )
            return out

        def decoded() -> Contexts:
            k, v = kernels.unpack_blocks(k_pool, v_pool, target.flatten(), place.flatten().contiguous(), format=name)
            in_order = torch.arange(groups, dtype=torch.int32, device=self.q.device).view(self.rows, -1)
            return Contexts(self.heads, self.q, k[:, 0], v[:, 0], in_order, self.lens, self.starts, self.queries)

        bits = packed_bits_per_value(name, dim, dim, BLOCK_SIZE, self.k.dtype)
        return call, int(2 * self.rows * self.length * self.heads.kv * dim * bits / 8), decoded
