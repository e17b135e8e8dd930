"""Chains in one native call are those of the operations called one by one: tokens equal, values up to rounding."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from engine import noise
from engine.execution.draft_model import DraftLanguageModel
from engine.mimir import model_path
from engine.models import load_model
from engine.models.decoder import Decoder
from engine.speculation.draft_rows import ChainPass, RowPass
from kernels import backend

NUM_BLOCKS, BLOCK_SIZE = 64, 8

pytestmark = pytest.mark.skipif(backend.select("linear", "cpu") != "cpp", reason="needs the native library")


@pytest.fixture(scope="module")
def model() -> Decoder:
    loaded = load_model(model_path("mimir-draft"))
    assert isinstance(loaded, Decoder)
    return loaded


def runner_on(
    model: Decoder, *, is_native: bool, logits_size: int = 4096, max_pass_tokens: int = 64
) -> DraftLanguageModel:
    runner = DraftLanguageModel(
        model, num_blocks=NUM_BLOCKS, block_size=BLOCK_SIZE, logits_size=logits_size, max_pass_tokens=max_pass_tokens
    )
    assert runner._native is not None
    if not is_native:
        runner._native = None
    return runner


def chains_of(lengths: list[int], depths: list[int], temperatures: list[float], min_log_prob: float) -> list[ChainPass]:
    """Random texts, each in blocks of its own."""
    rng = np.random.default_rng(sum(lengths))
    free = iter(rng.permutation(np.arange(1, NUM_BLOCKS)).tolist())
    chains = []
    for i, (length, depth, temperature) in enumerate(zip(lengths, depths, temperatures, strict=True)):
        blocks = [next(free) for _ in range(-(-(length + depth - 1) // BLOCK_SIZE))]
        keys = noise.row_keys(i, 0, 0, depth) if temperature > 0 else [None] * depth
        chains.append(ChainPass(rng.integers(10, 4000, length).tolist(), 0, blocks, temperature, keys, min_log_prob))
    return chains


CASES = [
    pytest.param([9], [6], [0.0], -math.inf, id="greedy"),
    pytest.param([9], [6], [1.0], -math.inf, id="noise"),
    pytest.param([1, 17, 8, 30], [6, 1, 9, 4], [0.0, 0.7, 1.3, 0.2], -math.inf, id="ragged"),
    pytest.param([3, 12, 5, 7, 20], [9, 9, 9, 9, 9], [0.0, 1.0, 0.0, 0.4, 2.0], -4.0, id="ends-early"),
    pytest.param([40, 50], [5, 5], [0.0, 0.8], -math.inf, id="longer-than-a-pass"),
]


@pytest.mark.parametrize(("lengths", "depths", "temperatures", "least"), CASES)
def test_a_native_chain_is_that_of_the_single_operations(
    model: Decoder, lengths: list[int], depths: list[int], temperatures: list[float], least: float
) -> None:
    chains = chains_of(lengths, depths, temperatures, least)
    native, plain = (runner_on(model, is_native=is_native) for is_native in (True, False))
    ours, theirs = native.chain(chains), plain.chain(chains)
    for own, other, chain in zip(ours, theirs, chains, strict=True):
        assert [token for token, _ in own] == [token for token, _ in other]
        assert [value for _, value in own] == pytest.approx([value for _, value in other], abs=2e-5)
        assert len(own) <= len(chain.keys)
    if math.isfinite(least):
        assert len({len(own) for own in ours}) > 1, "the case should have chains of several lengths"
    # and the cache afterwards: what follows each chain is the same
    following = []
    for runner, found in ((native, ours), (plain, theirs)):
        passes = [
            RowPass([own[-1][0]], len(chain.token_ids) + len(own) - 1, [*chain.block_ids, NUM_BLOCKS - 1])
            for own, chain in zip(found, chains, strict=True)
        ]
        following.append(torch.cat([runner.compute([one]) for one in passes]))
    assert (following[0] - following[1]).abs().max() < 1e-4


def test_only_columns_of_the_target_are_chosen(model: Decoder) -> None:
    chains = chains_of([9, 4], [6, 6], [0.0, 1.5], -math.inf)
    for size in (50, 1003, 5000):
        native, plain = (runner_on(model, is_native=is_native, logits_size=size) for is_native in (True, False))
        ours, theirs = native.chain(chains), plain.chain(chains)
        for own, other in zip(ours, theirs, strict=True):
            assert [token for token, _ in own] == [token for token, _ in other]
            assert max(token for token, _ in own) < size
            assert [value for _, value in own] == pytest.approx([value for _, value in other], abs=2e-5)


def test_heads_that_scale_and_cap_their_logits_do_so_in_a_chain(model: Decoder) -> None:
    """The caps of Gemma and the divisor of Granite, put on this model."""
    chains = chains_of([9, 4], [5, 5], [0.0, 1.0], -math.inf)
    config = model.config
    try:
        model.config = replace(config, logits_divisor=1.7, logits_soft_cap=3.0)
        native, plain = (runner_on(model, is_native=is_native) for is_native in (True, False))
        for own, other in zip(native.chain(chains), plain.chain(chains), strict=True):
            assert [token for token, _ in own] == [token for token, _ in other]
            assert [value for _, value in own] == pytest.approx([value for _, value in other], abs=2e-5)
    finally:
        model.config = config


def test_a_token_outside_of_the_vocabulary_is_refused_before_anything_is_written(model: Decoder) -> None:
    runner = runner_on(model, is_native=True)
    (chain,) = chains_of([5], [3], [0.0], -math.inf)
    with pytest.raises(IndexError, match="token id 4096 is outside"):
        runner.chain([chain._replace(token_ids=[10, 4096])])
    assert float(runner._cache.k.abs().sum()) == 0.0


def test_keys_of_several_places_are_those_of_each() -> None:
    expected = [noise.row_key(-5, 2, 7 + i) for i in range(6)]
    assert noise.row_keys(-5, 2, 7, 6) == expected
