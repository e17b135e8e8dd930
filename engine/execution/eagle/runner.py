"""The head while serving: ragged passes of one layer over a paged cache of its own, and chains drafted with them.

Knows entries (a token and the hidden state before it), positions and block tables; no requests and no trees.
Shape letters: T entries of a pass, R rows, C width, V columns of the target's logits, k candidates.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

import kernels
from engine.errors import ConfigError
from engine.execution import kv_cache
from engine.execution.eagle.files import Head
from engine.models.batch import ForwardBatch, KVSpec
from engine.models.decoder import Decoder
from engine.models.layers import Attention, DecoderLayer, GatedMlp
from engine.models.native_step import native_step
from engine.models.rope import build_rope_table
from engine.speculation.eagle import Candidates, HeadPass
from kernels import sampling
from kernels.linear import PackedLinear, pack_linear
from kernels.sampling import GREEDY_BELOW

MAX_PASS_TOKENS = 1024  # entries of one pass; no request has more at a time

_COUNT = torch.arange(MAX_PASS_TOKENS)


class _Layout(NamedTuple):
    """Where the entries of a pass stand: as in ForwardBatch, in the order of a native step's arguments."""

    positions: Tensor  # [T] int64
    slots: Tensor  # [T] int64
    cu_seqlens_q: Tensor  # [R + 1] int32
    seq_lens: Tensor  # [R] int32
    block_table: Tensor  # [R, MB] int32

    def to(self, device: torch.device) -> _Layout:
        return self if device.type == "cpu" else _Layout(*(tensor.to(device) for tensor in self))


class EagleRunner:
    """Implements engine.speculation.eagle.HeadRunner."""

    def __init__(self, target: Decoder, head: Head, *, num_blocks: int, block_size: int) -> None:
        """Raises ConfigError for a head of another width than the target's."""
        shape = head.shape
        if shape.hidden_size != target.config.hidden_size:
            raise ConfigError(
                f"the head is made for a width of {shape.hidden_size}, the model has {target.config.hidden_size}"
            )
        self.block_size, self.num_blocks = block_size, num_blocks
        self._target, self._device = target, target.device
        config = shape.decoder(MAX_PASS_TOKENS)
        # the layer's inputs, for the native step the table that it looks embeddings up in
        self._inputs = torch.zeros(MAX_PASS_TOKENS, shape.hidden_size, dtype=target.dtype, device=self._device)
        rope = build_rope_table(shape.rope, shape.max_positions, self._device)
        self.max_len = shape.max_positions
        self._fc = self._packed(head, "fc")
        self._layer = DecoderLayer(
            config,
            attention=Attention(
                config, 0, qkv=self._packed(head, "qkv"), o=self._packed(head, "o"), norms=None, cos_sin=rope.cos_sin
            ),
            feed_forward=GatedMlp(
                config.activation, gate_up=self._packed(head, "gate_up"), down=self._packed(head, "down")
            ),
            norms={"mlp_norm": self._vector(head, "mlp_norm")},
            next_norm=self._vector(head, "norm"),
        )
        self._first_norm, self._eps = self._vector(head, "attention_norm"), config.norm_eps
        self._num_heads = shape.num_kv_heads
        spec = KVSpec(1, shape.num_kv_heads, shape.head_dim, shape.head_dim)
        self._cache = kv_cache.allocate(spec, num_blocks, block_size, target.dtype, self._device)
        self._step = native_step(config, self._inputs, self._first_norm, [self._layer])
        self._weight_bytes = sum(weight.nbytes for weight in head.weights.values())

    @property
    def num_bytes(self) -> int:
        """Weights and cache."""
        return self._weight_bytes + self._cache.k.nbytes + self._cache.v.nbytes + self._inputs.nbytes

    @torch.inference_mode()
    def draft(self, passes: Sequence[HeadPass], count: int) -> list[list[Candidates]]:
        """Adds the entries, then drafts. Of each pass, `count` candidates for every place of its chain."""
        groups: list[list[HeadPass]] = [[]]
        room = MAX_PASS_TOKENS
        for entry in passes:
            size = len(entry.token_ids)
            if size > room:
                groups.append([])
                room = MAX_PASS_TOKENS
            room -= size
            groups[-1].append(entry)
        hidden = torch.cat([self._extend(group) for group in groups]) if len(groups) > 1 else self._extend(passes)
        chains = _Chains(passes, self.block_size, self._device)
        for depth in range(max(len(entry.keys) for entry in passes)):
            if depth > 0:
                hidden = self._pass(chains.token_ids, hidden, chains.at(depth), max_seqlen_q=1)
            if not chains.choose(self._target.logits(hidden), depth, count):
                break
        return chains.found

    def _extend(self, passes: Sequence[HeadPass]) -> Tensor:
        """True entries: [R, C], the hidden state that follows each pass's last one."""
        lengths = np.array([len(entry.token_ids) for entry in passes])
        starts = np.array([entry.start for entry in passes])
        ends = np.cumsum(lengths)
        table = _table(passes, int((starts + lengths).max()), self.block_size)
        rows = np.repeat(np.arange(len(passes)), lengths)
        positions = np.arange(ends[-1]) - np.repeat(ends - lengths - starts, lengths)
        blocks, offsets = np.divmod(positions, self.block_size)
        layout = _Layout(
            torch.from_numpy(positions),
            torch.from_numpy(table[rows, blocks].astype(np.int64) * self.block_size + offsets),
            torch.from_numpy(np.concatenate(([0], ends)).astype(np.int32)),
            torch.from_numpy((starts + lengths).astype(np.int32)),
            torch.from_numpy(table),
        )
        token_ids = [token for entry in passes for token in entry.token_ids]
        parts = [entry.hidden for entry in passes]
        hidden = torch.from_numpy(parts[0] if len(parts) == 1 else np.concatenate(parts))
        hidden = hidden.to(self._device, self._target.dtype)
        found = self._pass(torch.tensor(token_ids), hidden, layout, max_seqlen_q=int(lengths.max()))
        return found if len(found) == len(passes) else found[torch.from_numpy(ends - 1).to(self._device)]

    def _pass(self, token_ids: Tensor, hidden: Tensor, layout: _Layout, *, max_seqlen_q: int) -> Tensor:
        """token_ids [T] on the host, hidden [T, C] -> what follows them [T, C]."""
        count, on_host = len(token_ids), layout
        token_ids, layout = token_ids.to(self._device), layout.to(self._device)
        inputs = self._fc(torch.cat((self._target.embed(token_ids), hidden), dim=1))
        if self._step is not None:
            self._inputs[:count] = inputs
            return self._step(_COUNT[:count], *layout, self._cache.k, self._cache.v)
        batch = ForwardBatch(
            token_ids=token_ids,
            positions=layout.positions,
            slots=layout.slots,
            cu_seqlens_q=layout.cu_seqlens_q,
            seq_lens=layout.seq_lens,
            block_table=layout.block_table,
            max_seqlen_q=max_seqlen_q,
            attention_plan=kernels.plan_attention(
                on_host.cu_seqlens_q, on_host.seq_lens, num_kv_heads=self._num_heads, device=self._device
            ),
        )
        return self._layer(kernels.rms_norm(inputs, self._first_norm, self._eps), inputs, batch, self._cache)

    def _packed(self, head: Head, name: str) -> PackedLinear:
        weight = head.weights[f"{name}.weight"].to(self._device)
        # on the CPU 16-bit weights meet fp32 activations; elsewhere both have one type
        return pack_linear(weight if self._device.type == "cpu" else weight.to(self._target.dtype))

    def _vector(self, head: Head, name: str) -> Tensor:
        return head.weights[f"{name}.weight"].to(self._device, torch.float32)


class _Chains:
    """Chains that grow side by side, and what was found for them. A chain that has ended writes nothing."""

    def __init__(self, passes: Sequence[HeadPass], block_size: int, device: torch.device) -> None:
        self.found: list[list[Candidates]] = [[] for _ in passes]
        self._passes = passes
        self._is_open = [True] * len(passes)
        self._log_probs = [0.0] * len(passes)
        rows, depth = len(passes), max(len(entry.keys) for entry in passes)
        starts = np.array([entry.start + len(entry.token_ids) for entry in passes])
        positions = starts + np.arange(depth)[:, None]  # [depth, R], of the drafted entries
        table = _table(passes, int(positions.max()) + 1, block_size)
        blocks, offsets = np.divmod(positions, block_size)
        self._slot_at = table[np.arange(rows), blocks].astype(np.int64) * block_size + offsets
        # what changes from place to place; the tensors share this memory
        self._token_ids, self._slots = np.zeros(rows, dtype=np.int64), np.zeros(rows, dtype=np.int64)
        self._positions, self._seq_lens = starts - 1, starts.astype(np.int32)
        self.token_ids = torch.from_numpy(self._token_ids)
        self._layout = _Layout(
            torch.from_numpy(self._positions),
            torch.from_numpy(self._slots),
            torch.arange(rows + 1, dtype=torch.int32),
            torch.from_numpy(self._seq_lens),
            torch.from_numpy(table),
        )
        temperatures = torch.tensor([entry.temperature for entry in passes])
        self._scale = None
        if any(entry.temperature >= GREEDY_BELOW for entry in passes):
            self._scale = torch.where(temperatures < GREEDY_BELOW, 1.0, temperatures).unsqueeze(1).to(device)
        self._noised = [row for row, entry in enumerate(passes) if entry.keys[0] is not None]

    def at(self, depth: int) -> _Layout:
        """Of the pass that adds the tokens chosen last."""
        is_open = np.array(self._is_open)
        self._slots[:] = np.where(is_open, self._slot_at[depth - 1], -1)
        self._positions += is_open  # a chain that has ended may stand at the last position there is
        self._seq_lens += is_open
        return self._layout

    def choose(self, logits: Tensor, depth: int, count: int) -> bool:
        """Adds a place to every open chain. logits [R, V]. False when none goes on."""
        log_q = (logits if self._scale is None else logits / self._scale).log_softmax(dim=1)
        scores = log_q
        if self._noised:
            keys = [self._passes[row].keys[min(depth, len(self._passes[row].keys) - 1)] for row in self._noised]
            words = sampling.random_bits(torch.tensor(keys, device=logits.device), logits.shape[1])
            u = (words.double() + 0.5) * 2.0**-32
            scores = log_q.clone()
            scores[self._noised] -= (-u.log()).log().to(log_q.dtype)
        best = scores.topk(min(count, scores.shape[1]), dim=1).indices
        found = zip(best.tolist(), log_q.gather(1, best).tolist(), strict=True)
        for row, (token_ids, log_probs) in enumerate(found):
            if self._is_open[row]:
                self.found[row].append(Candidates(token_ids, log_probs))
                self._token_ids[row] = token_ids[0]
                self._log_probs[row] += log_probs[0]
                entry = self._passes[row]
                self._is_open[row] = depth + 1 < len(entry.keys) and self._log_probs[row] >= entry.min_log_prob
        return any(self._is_open)


def _table(passes: Sequence[HeadPass], num_entries: int, block_size: int) -> np.ndarray:
    """[R, blocks of so many entries] int32."""
    table = np.zeros((len(passes), -(-num_entries // block_size)), dtype=np.int32)
    for row, entry in enumerate(passes):
        used = entry.block_ids[: table.shape[1]]
        table[row, : len(used)] = used
    return table
