"""Recorded decode steps: with a graph that repeats the call, everything but CUDA itself; with CUDA, on a GPU."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor

import kernels
import kernels.backend
from engine.core import EngineCore
from engine.execution import kv_cache
from engine.execution.cuda_graphs import DecodeGraphs, cuda_graph_maker, row_buckets
from engine.execution.runner import ModelRunner
from engine.models import load_model
from engine.models.batch import ForwardBatch, KVCache, Model
from engine.types import EngineRequest
from tests.e2e.driving import core_for, request, run, tokens
from tests.models.families import VOCAB, Case, save

BLOCK_SIZE = 4
NUM_BLOCKS = 40


class RepeatedCall:
    """A graph that makes the call again, after `spoil` has had its way with everything but the recorded inputs."""

    num_records = 0
    num_replays = 0

    def __init__(self, spoil: Callable[[], None] = lambda: None) -> None:
        self._spoil = spoil

    def record(self, call: Callable[[], Tensor]) -> Tensor:
        RepeatedCall.num_records += 1
        self._call = call
        self._out = call().clone()
        return self._out

    def replay(self) -> None:
        RepeatedCall.num_replays += 1
        self._spoil()
        self._out.copy_(self._call())


@pytest.fixture(autouse=True)
def _counts() -> None:
    RepeatedCall.num_records = RepeatedCall.num_replays = 0


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(Case("llama", "Llama").build(), tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def llama(folder: Path) -> Model:
    return load_model(folder, dtype="float32", deterministic=True)


@pytest.fixture(params=["auto", "torch"])
def any_llama(request: pytest.FixtureRequest, folder: Path) -> Iterator[Model]:
    """On every backend that a CPU has: one native call, or operation by operation."""
    with kernels.backend.using(request.param):
        yield load_model(folder, dtype="float32", deterministic=request.param == "auto")


def assert_same(found: Tensor, expected: Tensor) -> None:
    """Bit for bit, or as near as products come whose sums depend on the number of rows."""
    if kernels.backend.select("paged_attention", "cpu") == "cpp":
        assert torch.equal(found, expected)
    torch.testing.assert_close(found, expected)


def graphs_for(model: Model, cache: KVCache, spoil: Callable[[], None] = lambda: None, **options: Any) -> DecodeGraphs:
    return DecodeGraphs(
        lambda batch: model.forward(batch, cache),
        lambda: RepeatedCall(spoil),
        **{
            "max_rows": 8,
            "max_blocks": 20,
            "num_kv_heads": model.spec.num_kv_heads,
            "device": torch.device("cpu"),
            **options,
        },
    )


def filled_cache(model: Model) -> KVCache:
    cache = kv_cache.allocate(model.spec, NUM_BLOCKS, BLOCK_SIZE, torch.float32, torch.device("cpu"))
    generator = torch.Generator().manual_seed(3)
    for pool in (cache.k, cache.v):
        pool.copy_(torch.randn(pool.shape, generator=generator))
    return cache


def decode_batch(seq_lens: list[int], model: Model) -> ForwardBatch:
    """Row r has the blocks 1 + 4 r to 4 + 4 r, and its token is r."""
    lens = torch.tensor(seq_lens, dtype=torch.int32)
    table = torch.arange(1, 1 + 4 * len(seq_lens), dtype=torch.int32).view(-1, 4)
    starts = torch.arange(len(seq_lens) + 1, dtype=torch.int32)
    index, offset = (lens.long() - 1).div(BLOCK_SIZE, rounding_mode="floor"), (lens.long() - 1) % BLOCK_SIZE
    return ForwardBatch(
        token_ids=torch.arange(len(seq_lens)) + 20,
        positions=lens.long() - 1,
        slots=table.gather(1, index[:, None])[:, 0].long() * BLOCK_SIZE + offset,
        cu_seqlens_q=starts,
        seq_lens=lens,
        block_table=table,
        max_seqlen_q=1,
        attention_plan=kernels.plan_attention(starts, seq_lens, num_kv_heads=model.spec.num_kv_heads),
    )


def copy_of(batch: ForwardBatch) -> ForwardBatch:
    names = ("token_ids", "positions", "slots", "cu_seqlens_q", "seq_lens", "block_table")
    return replace(batch, **{name: getattr(batch, name).clone() for name in names})


def slots_of(pool: Tensor) -> Tensor:
    """[NB, L, H_kv, BS, D] -> [NB * BS, L, H_kv, D]"""
    return pool.permute(0, 3, 1, 2, 4).flatten(0, 1)


LENGTHS = [[5], [3, 16, 1], [7, 2, 9, 11, 4], [1, 2, 3, 4, 5, 6, 7, 8], [9, 9], [16, 1, 13, 6, 8, 2, 10]]


@torch.inference_mode()
def test_a_padded_replay_gives_the_bits_of_the_step_itself(any_llama: Model) -> None:
    expected_cache, cache = filled_cache(any_llama), filled_cache(any_llama)
    graphs = graphs_for(any_llama, cache)
    for seq_lens in LENGTHS:
        batch = decode_batch(seq_lens, any_llama)
        unwritten = torch.ones(NUM_BLOCKS * BLOCK_SIZE, dtype=torch.bool).index_fill(0, batch.slots, False)
        before = slots_of(cache.k)[unwritten].clone()
        expected = any_llama.forward(copy_of(batch), expected_cache)
        found = graphs.forward(batch)
        assert found is not None
        assert_same(found, expected)
        assert torch.equal(slots_of(cache.k)[unwritten], before), "a row that fills up has written to the cache"
        assert_same(cache.k, expected_cache.k)
        assert_same(cache.v, expected_cache.v)
    assert RepeatedCall.num_replays == len(LENGTHS)
    assert RepeatedCall.num_records == len({1, 2, 3, 6, 8})


@torch.inference_mode()
def test_a_replay_reads_nothing_of_the_batch_itself(any_llama: Model) -> None:
    cache = filled_cache(any_llama)
    batches: list[ForwardBatch] = []

    def spoil() -> None:
        for tensor in (batches[-1].token_ids, batches[-1].positions, batches[-1].slots, batches[-1].block_table):
            tensor.fill_(1)
        batches[-1].seq_lens.fill_(13)

    graphs = graphs_for(any_llama, cache, spoil)
    for seq_lens in LENGTHS:
        batches.append(decode_batch(seq_lens, any_llama))
        expected = any_llama.forward(copy_of(batches[-1]), cache)
        found = graphs.forward(batches[-1])
        assert found is not None
        assert_same(found, expected)


@torch.inference_mode()
def test_what_does_not_fit_is_left_to_others(llama: Model) -> None:
    graphs = graphs_for(llama, filled_cache(llama), max_rows=4)
    fitting = decode_batch([3, 4], llama)
    assert graphs.forward(fitting) is not None
    anything = cast(Any, object())
    assert graphs.forward(decode_batch([3] * 5, llama)) is None
    assert graphs.forward(replace(fitting, attention=anything)) is None
    assert graphs.forward(replace(fitting, adapters=anything)) is None
    assert graphs.forward(replace(fitting, watcher=anything)) is None
    assert graphs.forward(replace(fitting, token_ids=torch.arange(3))) is None
    assert graphs.forward(replace(fitting, max_seqlen_q=2)) is None


def test_buckets_hold_every_number_of_rows_with_little_waste() -> None:
    assert row_buckets(1) == [1]
    assert row_buckets(8) == [1, 2, 3, 4, 6, 8]
    assert row_buckets(100) == [1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 100]
    for most in (1, 7, 64, 256, 1000):
        sizes = row_buckets(most)
        assert sizes[-1] == most
        for num_rows in range(4, most + 1):
            assert min(size for size in sizes if size >= num_rows) <= num_rows * 1.5


@torch.inference_mode()
def test_long_contexts_take_a_recording_with_more_room(llama: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    graphs = graphs_for(llama, filled_cache(llama))
    for num_pieces in (2, 3, 8, 9, 32, 33):
        monkeypatch.setattr(kernels, "num_decode_items", lambda lens, n=num_pieces: n)
        assert graphs.forward(decode_batch([3, 4], llama)) is not None
    assert RepeatedCall.num_records == len({2, 8, 32, 128})


def test_every_number_of_rows_is_recorded_at_the_start(llama: Model) -> None:
    graphs = graphs_for(llama, filled_cache(llama))
    shares: list[float] = []
    graphs.record_all(shares.append)
    assert graphs.num_recorded == len(row_buckets(8)) == len(shares)
    assert shares == sorted(shares)
    with torch.inference_mode():
        assert graphs.forward(decode_batch([3] * 5, llama)) is not None
    assert RepeatedCall.num_records == len(row_buckets(8)), "what is there is not recorded again"


def test_a_model_that_cannot_be_recorded_runs_without(llama: Model, caplog: pytest.LogCaptureFixture) -> None:
    class Unfit(RepeatedCall):
        def record(self, call: Callable[[], Tensor]) -> Tensor:
            raise RuntimeError("waits for the device")

    def make(*, must_succeed: bool) -> DecodeGraphs:
        return DecodeGraphs(
            lambda batch: batch.token_ids,
            Unfit,
            max_rows=4,
            max_blocks=4,
            num_kv_heads=1,
            device=torch.device("cpu"),
            must_succeed=must_succeed,
        )

    graphs = make(must_succeed=False)
    with caplog.at_level(logging.WARNING):
        graphs.record_all()
        assert graphs.forward(decode_batch([3], llama)) is None
    assert len(caplog.records) == 1
    assert "waits for the device" in caplog.text
    with pytest.raises(RuntimeError, match="waits"):
        make(must_succeed=True).record_all()


def prompt(length: int, seed: int) -> list[int]:
    return torch.randint(20, VOCAB, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def traffic() -> list[EngineRequest]:
    """Rows that come and go at different steps, greedy, sampled, penalised, forked."""
    plain = [request(f"r{i}", prompt(3 + 5 * i, seed=i), max_tokens=4 + 3 * i) for i in range(5)]
    return [
        *plain,
        request("warm", prompt(9, seed=7), max_tokens=12, temperature=0.8, top_k=20, seed=3),
        request("counts", prompt(9, seed=8), max_tokens=12, presence_penalty=0.5),
        request("forks", prompt(11, seed=9), max_tokens=7, temperature=0.9, seed=5, num_choices=2),
    ]


def with_graphs(core: EngineCore) -> EngineCore:
    runner = cast(ModelRunner, core.runner)
    runner._graphs = graphs_for(runner.model, runner.cache)
    return core


@pytest.mark.parametrize("overlap", ["off", "on"])
def test_the_engine_answers_with_graphs_as_without(llama: Model, overlap: str) -> None:
    expected = tokens(run(core_for(llama, budget=30), traffic(), stagger=2))
    core = with_graphs(core_for(llama, budget=30, overlap=overlap))
    assert tokens(run(core, traffic(), stagger=2)) == expected
    assert RepeatedCall.num_replays > 10


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_cuda_replays_what_it_recorded(dtype: str, folder: Path) -> None:
    device = torch.device("cuda")
    model = load_model(folder, dtype=dtype, device=device, deterministic=True)
    caches = [kv_cache.allocate(model.spec, NUM_BLOCKS, BLOCK_SIZE, model.dtype, device) for _ in range(2)]
    graphs = DecodeGraphs(
        lambda batch: model.forward(batch, caches[0]),
        cuda_graph_maker(),
        max_rows=8,
        max_blocks=20,
        num_kv_heads=model.spec.num_kv_heads,
        device=device,
        must_succeed=True,
    )
    graphs.record_all()
    names = ("token_ids", "positions", "slots", "cu_seqlens_q", "seq_lens", "block_table")
    with torch.inference_mode():
        for seq_lens in LENGTHS:
            on_host = decode_batch(seq_lens, model)
            plan = kernels.plan_attention(
                on_host.cu_seqlens_q, seq_lens, num_kv_heads=model.spec.num_kv_heads, device=device
            )
            on_device = {name: getattr(on_host, name).to(device) for name in names}
            batch = replace(on_host, attention_plan=plan, **on_device)
            found = graphs.forward(batch)
            assert found is not None
            assert torch.equal(found, model.forward(batch, caches[1]))
            assert torch.equal(caches[0].k, caches[1].k)
            assert torch.equal(caches[0].v, caches[1].v)
