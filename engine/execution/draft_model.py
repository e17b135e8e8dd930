"""The tensor half of drafting by a small language model: ragged passes over a paged cache of its own, and its guesses.

Knows token ids, positions and block tables; no requests and no trees. Shape letters: R rows of a pass, V columns of the
target's logits, k candidates per draw.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

import kernels
from engine.execution import kv_cache
from engine.models.batch import ForwardBatch, Model
from engine.models.decoder import Decoder
from engine.speculation.draft_rows import ChainPass, Draw, Pick, RowPass
from kernels import sampling
from kernels.sampling import GREEDY_BELOW

MAX_PASS_TOKENS = 2048  # of one forward: bounds the memory that a long prompt takes when it is caught up with


class _Piece(NamedTuple):
    """Tokens [begin, end) of a row's pass."""

    row: int
    begin: int
    end: int


class DraftLanguageModel:
    """Implements engine.speculation.draft_rows.DraftRunner: logits are held between `compute` and what reads them."""

    def __init__(
        self,
        model: Model,
        *,
        num_blocks: int,
        block_size: int,
        logits_size: int,
        max_pass_tokens: int = MAX_PASS_TOKENS,
    ) -> None:
        """logits_size: V, of the target, with the same tokens; further columns of the drafter are never guessed."""
        self.block_size = block_size
        self.num_blocks = num_blocks
        self.max_len = model.max_model_len
        self._model = model
        self._device = model.device
        self._cache = kv_cache.allocate(model.spec, num_blocks, block_size, model.dtype, model.device)
        self._num_heads = model.spec.num_kv_heads
        self._logits_size = logits_size
        self._max_pass_tokens = max_pass_tokens
        self._native = model.chain(logits_size) if isinstance(model, Decoder) else None

    @property
    def num_bytes(self) -> int:
        """Weights and cache."""
        return self._model.weight_bytes + self._cache.k.nbytes + self._cache.v.nbytes

    @torch.inference_mode()
    def compute(self, rows: Sequence[RowPass], copies: Sequence[tuple[int, int]] = ()) -> Tensor:
        """Block copies, then the rows' tokens. Returns the logits after each row's last token, [R, <= V] float32."""
        if copies:
            kernels.copy_blocks(self._cache.k, self._cache.v, torch.tensor(copies, dtype=torch.int64))
        return self._model.logits(self._read(rows))[:, : self._logits_size]

    def _read(self, rows: Sequence[RowPass]) -> Tensor:
        """Computes the rows' tokens, at least one of each. Returns the hidden states [R, C] of the last ones."""
        last: list[Tensor] = [torch.empty(0)] * len(rows)
        for pieces in _forwards(rows, self._max_pass_tokens):
            hidden = self._model.forward(self._batch(rows, pieces), self._cache)
            end = 0
            for piece in pieces:
                end += piece.end - piece.begin
                if piece.end == len(rows[piece.row].token_ids):
                    last[piece.row] = hidden[end - 1]
        return torch.stack(last)

    @torch.inference_mode()
    def pick(self, logits: Tensor, draws: Sequence[Draw], count: int) -> list[Pick]:
        """The `count` best tokens of each draw, which are `count` draws without replacement where it has noise."""
        log_q = self._log_q(logits, draws)
        scores = log_q
        keys = [draw.key for draw in draws if draw.key is not None]
        if keys:
            noise = _gumbel(sampling.random_bits(torch.tensor(keys, device=self._device), log_q.shape[1])).to(
                log_q.dtype
            )
            noised = [i for i, draw in enumerate(draws) if draw.key is not None]
            scores = log_q.clone()
            scores[noised] += noise
        top = scores.topk(min(count, scores.shape[1]), dim=1)
        found = (top.indices.cpu().numpy(), log_q.gather(1, top.indices).cpu().numpy(), top.values.cpu().numpy())
        return [Pick(*row) for row in zip(*found, strict=True)]

    @torch.inference_mode()
    def chain(self, chains: Sequence[ChainPass]) -> list[list[tuple[int, float]]]:
        """Computes the rows' tokens, then chains of best ones: (token, log q) of each. All but a chain's last are in
        the cache afterwards.

        One native call where the model has that. Elsewhere every level uses the same tensors again: building a batch
        takes longer than a small model does.
        """
        if self._native is None:
            return self._chain_by_steps(chains)
        if sum([len(chain.token_ids) for chain in chains]) > self._max_pass_tokens:
            parts = [RowPass(chain.token_ids[:-1], chain.start, chain.block_ids) for chain in chains]
            self._read([part for part in parts if part.token_ids])
            starts = [chain.start + len(chain.token_ids) - 1 for chain in chains]
            chains = [
                chain._replace(token_ids=chain.token_ids[-1:], start=start)
                for chain, start in zip(chains, starts, strict=True)
            ]
        return self._native(chains, self._cache.k, self._cache.v)

    def _chain_by_steps(self, chains: Sequence[ChainPass]) -> list[list[tuple[int, float]]]:
        logits = self.compute([RowPass(chain.token_ids, chain.start, chain.block_ids) for chain in chains])
        steps = _ChainSteps(chains, self.block_size, self._num_heads, self._device)
        for depth in range(max(len(chain.keys) for chain in chains)):
            if depth > 0:
                hidden = self._model.forward(steps.batch_at(depth), self._cache)
                logits = self._model.logits(hidden)[:, : self._logits_size]
            if not steps.choose(logits.contiguous(), depth):
                break
        return steps.found

    @torch.inference_mode()
    def laws(self, logits: Tensor, draws: Sequence[Draw]) -> np.ndarray:
        """What the draws are drawn from: [draws, V] float32."""
        q = self._log_q(logits, draws).exp().float().cpu().numpy()
        return np.pad(q, ((0, 0), (0, self._logits_size - q.shape[1])))

    def _log_q(self, logits: Tensor, draws: Sequence[Draw]) -> Tensor:
        rows = torch.tensor([draw.row for draw in draws], device=self._device)
        greedy = [1.0 if draw.temperature < GREEDY_BELOW else draw.temperature for draw in draws]
        temperature = torch.tensor(greedy, device=self._device).unsqueeze(1)
        return (logits[rows] / temperature).log_softmax(dim=1)

    def _batch(self, rows: Sequence[RowPass], pieces: Sequence[_Piece]) -> ForwardBatch:
        block_size = self.block_size
        token_ids, positions, slots = [], [], []
        lengths = np.array([piece.end - piece.begin for piece in pieces])
        seq_lens = np.array([rows[piece.row].start + piece.end for piece in pieces], dtype=np.int32)
        table = np.zeros((len(pieces), -(-int(seq_lens.max()) // block_size)), dtype=np.int32)
        for i, (row, begin, end) in enumerate(pieces):
            given = rows[row]
            used = given.block_ids[: -(-(given.start + end) // block_size)]
            table[i, : len(used)] = used
            position = np.arange(given.start + begin, given.start + end)
            token_ids.append(np.asarray(given.token_ids[begin:end], dtype=np.int64))
            positions.append(position)
            slots.append(table[i, position // block_size].astype(np.int64) * block_size + position % block_size)
        cu_seqlens = torch.from_numpy(np.concatenate(([0], np.cumsum(lengths))).astype(np.int32))
        on_host = torch.from_numpy(seq_lens)
        device = self._device
        return ForwardBatch(
            token_ids=torch.from_numpy(np.concatenate(token_ids)).to(device),
            positions=torch.from_numpy(np.concatenate(positions)).to(device),
            slots=torch.from_numpy(np.concatenate(slots)).to(device),
            cu_seqlens_q=cu_seqlens.to(device),
            seq_lens=on_host.to(device),
            block_table=torch.from_numpy(table).to(device),
            max_seqlen_q=int(lengths.max()),
            attention_plan=kernels.plan_attention(cu_seqlens, on_host, num_kv_heads=self._num_heads, device=device),
        )


class _ChainSteps:
    """Tensors of chains that grow side by side, and what they have chosen. A chain that has ended writes nothing."""

    def __init__(self, chains: Sequence[ChainPass], block_size: int, num_heads: int, device: torch.device) -> None:
        self.found: list[list[tuple[int, float]]] = [[] for _ in chains]
        self._chains = chains
        self._device = device
        self._log_probs = [0.0] * len(chains)
        self._is_open = [True] * len(chains)
        count, depth = len(chains), max(len(chain.keys) for chain in chains)
        starts = np.array([chain.start + len(chain.token_ids) for chain in chains])
        positions = starts + np.arange(depth)[:, None]  # [depth, R]
        table = np.zeros((count, int(positions.max()) // block_size + 1), dtype=np.int32)
        for i, chain in enumerate(chains):
            used = chain.block_ids[: table.shape[1]]
            table[i, : len(used)] = used
        blocks, offsets = np.divmod(positions, block_size)
        self._slot_at = table[np.arange(count), blocks].astype(np.int64) * block_size + offsets
        # what changes from level to level, of the token computed last; on the CPU the batch shares this memory
        self._token_ids, self._slots = np.zeros(count, dtype=np.int64), np.zeros(count, dtype=np.int64)
        self._positions, self._seq_lens = starts - 1, starts.astype(np.int32)
        self._on_host = [
            torch.from_numpy(array) for array in (self._token_ids, self._positions, self._slots, self._seq_lens)
        ]
        self._changing = [tensor.to(device) for tensor in self._on_host]
        each = torch.arange(count + 1, dtype=torch.int32)
        bound = torch.from_numpy(self._seq_lens + np.int32(depth))
        self._batch = ForwardBatch(
            token_ids=self._changing[0],
            positions=self._changing[1],
            slots=self._changing[2],
            cu_seqlens_q=each.to(device),
            seq_lens=self._changing[3],
            block_table=torch.from_numpy(table).to(device),
            max_seqlen_q=1,
            attention_plan=kernels.plan_attention(each, bound, num_kv_heads=num_heads, device=device),
        )
        temperature = torch.tensor([chain.temperature for chain in chains], dtype=torch.float32)
        self._has_noise = any(chain.keys[0] is not None for chain in chains)
        self._temperature = temperature.to(device)
        self._scale = torch.where(temperature < GREEDY_BELOW, 1.0, temperature).unsqueeze(1).to(device)

    def batch_at(self, depth: int) -> ForwardBatch:
        """The batch that computes the tokens chosen last."""
        is_open = np.array(self._is_open)
        self._token_ids[:] = [found[-1][0] for found in self.found]
        self._slots[:] = np.where(is_open, self._slot_at[depth - 1], -1)
        self._positions += is_open  # a chain that has ended may stand at the model's last position
        self._seq_lens += is_open
        if self._device.type != "cpu":
            for there, here in zip(self._changing, self._on_host, strict=True):
                there.copy_(here)
        return self._batch

    def choose(self, logits: Tensor, depth: int) -> bool:
        """Adds a token to every open chain. logits [R, V]. False when none goes on."""
        if self._has_noise:
            keys = [chain.keys[min(depth, len(chain.keys) - 1)] or 0 for chain in self._chains]
            chosen = kernels.sample(
                logits, temperature=self._temperature, keys=torch.tensor(keys, device=self._device)
            ).clamp_(min=0)
            logits = logits / self._scale
        else:
            chosen = kernels.greedy(logits).clamp_(min=0)
        log_q = logits.gather(1, chosen.unsqueeze(1)).squeeze(1) - logits.logsumexp(dim=1)
        for i, (token, value) in enumerate(zip(chosen.tolist(), log_q.tolist(), strict=True)):
            if self._is_open[i]:
                chain = self._chains[i]
                self.found[i].append((token, value))
                self._log_probs[i] += value
                self._is_open[i] = depth + 1 < len(chain.keys) and self._log_probs[i] >= chain.min_log_prob
        return any(self._is_open)


def _forwards(rows: Sequence[RowPass], max_tokens: int) -> list[list[_Piece]]:
    """The rows' tokens in order, in as few forwards of at most so many tokens as that takes."""
    forwards: list[list[_Piece]] = [[]]
    room = max_tokens
    for row, given in enumerate(rows):
        begin = 0
        while begin < len(given.token_ids):
            if room == 0:
                forwards.append([])
                room = max_tokens
            end = min(len(given.token_ids), begin + room)
            forwards[-1].append(_Piece(row, begin, end))
            room -= end - begin
            begin = end
    return forwards


def _gumbel(words: Tensor) -> Tensor:
    u = (words.double() + 0.5) * 2.0**-32
    return -(-u.log()).log()
