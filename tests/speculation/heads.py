"""Heads of random weights and a runner that only takes notes: what tests of the eagle drafter share."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from random import Random

import torch

from engine.config import CacheConfig, Config, ModelConfig, SchedulerConfig, SpeculationConfig
from engine.execution.eagle.files import Head, HeadShape
from engine.execution.eagle.module import HeadModule
from engine.speculation.eagle import Candidates, HeadPass

WIDTH = 32


def save_model(path: Path, vocab_size: int = 300) -> Path:
    """A random Llama of two layers."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=WIDTH,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.3,
        tie_word_embeddings=False,
    )
    LlamaForCausalLM(config).save_pretrained(path)
    return path


def random_head(digest: str, width: int = WIDTH) -> Head:
    torch.manual_seed(1)
    shape = HeadShape(
        hidden_size=width, intermediate_size=48, num_heads=4, num_kv_heads=2, head_dim=8, max_positions=256
    )
    module = HeadModule(shape, 256)
    with torch.no_grad():
        for name, weight in module.named_parameters():
            if weight.ndim == 2 and name != "fc.weight":
                weight.mul_(2.0)  # so that attention and feed-forward count
    return Head(target=digest, shape=shape, weights=module.weights(), acceptance=(0.5,))


def config_for(model: Path | str, head: Path | str = "auto", **options: int) -> Config:
    """A small server: blocks of 8 tokens, guesses whatever they cost. options: num_blocks, budget, draft_tokens."""
    return Config(
        model=ModelConfig(model=str(model), max_model_len=128),
        cache=CacheConfig(block_size=8, num_blocks=options.get("num_blocks", 256)),
        scheduler=SchedulerConfig(max_num_seqs=16, max_num_batched_tokens=options.get("budget", 512)),
        speculation=SpeculationConfig(
            speculative_eagle_head=str(head),
            speculative_draft_model="none",
            speculative_budget="fixed",
            speculative_max_rows=64,
            speculative_draft_cache_tokens=options.get("draft_tokens", 4096),
        ),
    )


class NotingRunner:
    """Implements HeadRunner: keeps what it is given, by slot, and drafts at random."""

    block_size = 8

    def __init__(self, num_blocks: int = 64, max_len: int = 200, vocab_size: int = 50) -> None:
        self.num_blocks = num_blocks
        self.max_len = max_len
        self.slots: dict[int, tuple[int, float]] = {}  # slot -> token, first number of the hidden state
        self.contexts: list[list[tuple[int, float]]] = []  # of the last call, pass by pass
        self._random = Random(3)
        self._vocab_size = vocab_size

    def draft(self, passes: Sequence[HeadPass], count: int) -> list[list[Candidates]]:
        self.contexts = []
        found = []
        for entry in passes:
            assert len(entry.token_ids) == len(entry.hidden) > 0
            end = entry.start + len(entry.token_ids)
            assert end + len(entry.keys) - 1 <= min(self.max_len, len(entry.block_ids) * self.block_size)
            assert 0 not in entry.block_ids
            slots = [
                entry.block_ids[i // self.block_size] * self.block_size + i % self.block_size
                for i in range(end + len(entry.keys) - 1)
            ]
            for i, (token, row) in enumerate(zip(entry.token_ids, entry.hidden, strict=True)):
                self.slots[slots[entry.start + i]] = (token, float(row[0]))
            for slot in slots[end:]:
                self.slots[slot] = (-1, -1.0)  # drafted: nobody may take it for true later
            self.contexts.append([self.slots[slot] for slot in slots[:end]])
            found.append([self._candidates(count) for _ in entry.keys[: self._random.randint(1, len(entry.keys))]])
        return found

    def _candidates(self, count: int) -> Candidates:
        tokens = self._random.sample(range(self._vocab_size), count)
        shares = sorted((self._random.random() / count for _ in tokens), reverse=True)
        return Candidates(tokens, [float(torch.tensor(max(share, 1e-6)).log()) for share in shares])

    @property
    def num_bytes(self) -> int:
        return 1000
