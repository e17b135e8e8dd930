"""Chains of tokens in one native call: step, head and choice in turn, with nothing in between.

What comes out is what `DecoderStep`, the head and `kernels.sample` give when they are called one after the other; a
chain that has ended takes no part in the steps of the others. CPU only. Knows no requests and no trees.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Protocol

import numpy as np
from torch import Tensor

from kernels import native
from kernels.decoder_step import DecoderStep
from kernels.decoder_step.structures import Chains, Head, linear_of
from kernels.linear.packed import PackedLinear
from kernels.native import INT, PTR


class ChainRow(Protocol):
    """Tokens of one sequence to compute at positions `start` on, and how many to choose behind them."""

    @property
    def token_ids(self) -> Sequence[int]:
        """At least one."""

    @property
    def start(self) -> int: ...

    @property
    def block_ids(self) -> Sequence[int]:
        """With room for all tokens, those to choose included but for the last."""

    @property
    def temperature(self) -> float: ...

    @property
    def keys(self) -> Sequence[int | None]:
        """Noise of each token to choose, at least one. At greedy temperatures they do nothing."""

    @property
    def min_log_prob(self) -> float:
        """The chain ends with the token at which the sum of log-probabilities falls below."""


class DecoderChain:
    """Prepared once per model; keeps its working memory. Called from one thread at a time."""

    def __init__(
        self, step: DecoderStep, head: PackedLinear, *, num_logits: int, divisor: float = 1.0, soft_cap: float = 0.0
    ) -> None:
        """head: with panels. num_logits: its first columns, which may be chosen. soft_cap 0: off."""
        self._step, self._linear = step, head  # the memory that the structures point to
        self._head = Head(
            linear=linear_of(head), num_logits=min(num_logits, head.out_features), divisor=divisor, soft_cap=soft_cap
        )
        self._head_address = ctypes.addressof(self._head)
        self._buffers = _Buffers(1, 1, 1, 1)
        self._run = native.function("kvasir_decoder_chain", PTR, PTR, PTR, PTR, restype=INT)

    def __call__(self, rows: Sequence[ChainRow], k_cache: Tensor, v_cache: Tensor) -> list[list[tuple[int, float]]]:
        """(token, log-probability) of each chain: at the row's temperature, of greedy rows at 1.

        k_cache, v_cache: as for DecoderStep; all tokens but each chain's last are in there then.
        Raises IndexError for a token id outside of the vocabulary, before anything is written.
        """
        block_size = k_cache.shape[3]
        ends = [row.start + len(row.token_ids) + len(row.keys) - 1 for row in rows]
        sizes = (
            sum([len(row.token_ids) for row in rows]),
            len(rows),
            max([len(row.keys) for row in rows]),
            (max(ends) - 1) // block_size + 1,
        )
        buffers = self._buffers
        if not buffers.fits(sizes):
            buffers = self._buffers = _Buffers(*map(max, sizes, buffers.sizes))
        buffers.fill(rows)
        pool = self._step.pool(k_cache, v_cache)
        bad = self._run(self._step.program, ctypes.addressof(pool), self._head_address, buffers.address)
        if bad >= 0:
            raise IndexError(f"token id {int(buffers.token_ids[bad])} is outside of the vocabulary")
        return buffers.found(len(rows))


class _Buffers:
    """Arrays of a call, with room for so many tokens, rows, tokens per chain and blocks per row."""

    def __init__(self, num_tokens: int, num_rows: int, depth: int, num_blocks: int) -> None:
        self.sizes = (num_tokens, num_rows, depth, num_blocks)
        self.token_ids = np.zeros(num_tokens, dtype=np.int64)
        self._lengths, self._starts, self._depths, self._counts = np.zeros((4, num_rows), dtype=np.int64)
        self._table = np.zeros((num_rows, num_blocks), dtype=np.int32)
        self._keys, self._tokens = np.zeros((2, num_rows, depth), dtype=np.int64)
        self._temperatures = np.zeros(num_rows, dtype=np.float32)
        self._log_probs = np.zeros((num_rows, depth), dtype=np.float32)
        self._min_log_probs = np.zeros(num_rows)
        self._chains = Chains(
            token_ids=self.token_ids.ctypes.data,
            lengths=self._lengths.ctypes.data,
            starts=self._starts.ctypes.data,
            block_table=self._table.ctypes.data,
            depths=self._depths.ctypes.data,
            keys=self._keys.ctypes.data,
            temperatures=self._temperatures.ctypes.data,
            min_log_probs=self._min_log_probs.ctypes.data,
            tokens=self._tokens.ctypes.data,
            log_probs=self._log_probs.ctypes.data,
            counts=self._counts.ctypes.data,
            table_stride=num_blocks,
            depth_stride=depth,
        )
        self.address = ctypes.addressof(self._chains)

    def fits(self, sizes: tuple[int, ...]) -> bool:
        return all(wanted <= own for wanted, own in zip(sizes, self.sizes, strict=True))

    def fill(self, rows: Sequence[ChainRow]) -> None:
        end = 0
        for i, row in enumerate(rows):
            length, depth, num_blocks = len(row.token_ids), len(row.keys), min(len(row.block_ids), self.sizes[3])
            self.token_ids[end : end + length] = row.token_ids
            self._table[i, :num_blocks] = row.block_ids[:num_blocks]
            self._lengths[i], self._starts[i], self._depths[i] = length, row.start, depth
            self._keys[i, :depth] = [key or 0 for key in row.keys]
            self._temperatures[i], self._min_log_probs[i] = row.temperature, row.min_log_prob
            end += length
        self._chains.num_rows = len(rows)
        self._chains.num_threads = native.num_threads()

    def found(self, num_rows: int) -> list[list[tuple[int, float]]]:
        chains = []
        for i, count in enumerate(self._counts[:num_rows].tolist()):
            tokens, log_probs = self._tokens[i, :count].tolist(), self._log_probs[i, :count].tolist()
            chains.append(list(zip(tokens, log_probs, strict=True)))
        return chains
