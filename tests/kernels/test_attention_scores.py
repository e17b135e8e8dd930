"""Attention scores: every implementation against the definition, exactness across batches, and hand-checked numbers."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from engine import noise
from kernels import attention_scores, backend, native, paged_attention, testing
from kernels.attention_scores import cpp_impl
from kernels.attention_scores.noise import head_keys
from kernels.sampling.reference import gumbel, token_word
from tests.kernels.test_paged_attention import FLOAT_DTYPES, MIXED, Batch, make_batch

IMPLEMENTATIONS = testing.implementations("attention_scores")

needs_cpp = pytest.mark.skipif("cpp" not in IMPLEMENTATIONS, reason="needs the native library")


def weights_of(batch: Batch, num_channels: int = 2) -> Tensor:
    """Weights of which about a third are zero in all channels."""
    generator = torch.Generator().manual_seed(5)
    weights = torch.rand(num_channels, len(batch.q), generator=generator)
    return (weights * (torch.arange(len(batch.q)) % 3 > 0)).to(batch.q.device)


def run(batch: Batch, weights: Tensor, *, sinks: bool = False, **options: Any) -> Tensor:
    """The scores after the attention that gives their lse, both by the implementation in use."""
    shared = {name: options[name] for name in ("window", "soft_cap") if name in options}
    tensors = batch.q, batch.k_cache, batch.v_cache, batch.block_table, batch.seq_lens, batch.cu_seqlens_q
    sink = torch.linspace(-1, 2, batch.q.shape[1], device=batch.q.device) if sinks else None
    _, lse = paged_attention(*tensors, scale=batch.scale, sinks=sink, return_lse=True, **shared)
    cached = batch.q, batch.k_cache, batch.block_table, batch.seq_lens, batch.cu_seqlens_q
    return attention_scores(*cached, lse, weights, scale=batch.scale, **options)


def noisy(batch: Batch) -> dict[str, Any]:
    num_tokens, device = len(batch.q), batch.q.device
    return {
        "kind": "noisy",
        "noise_keys": torch.tensor([noise.row_key(7, 0, i) for i in range(num_tokens)], dtype=torch.int64).to(device),
        "temperature": torch.linspace(1, 2, num_tokens, device=device),
        "layer": 3,
    }


def assert_agrees(batch: Batch, name: str, options: dict[str, Any], factor: float = 1.0) -> None:
    options = dict(options)
    is_noisy = options.get("kind") == "noisy"
    weights = weights_of(batch)
    with backend.using("reference"):
        expected = run(batch, weights, **{**options, **(noisy(batch) if is_noisy else {})})
    there = batch.to(testing.device_of(name))
    with backend.using(name):
        scores = run(there, weights.to(there.q.device), **{**options, **(noisy(there) if is_noisy else {})})
    assert scores.shape == expected.shape
    torch.testing.assert_close(scores.cpu(), expected, atol=1e-5 * factor, rtol=2e-5 * factor)


# name -> arguments of make_batch, options
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "mixed": ({"rows": MIXED}, {}),
    "empty batch": ({"rows": []}, {}),
    "no queries": ({"rows": [(0, 5), (0, 0)]}, {}),
    "mha": ({"rows": MIXED, "heads": (3, 3)}, {}),
    "mqa": ({"rows": MIXED, "heads": (7, 1)}, {}),
    "odd dims": ({"rows": MIXED, "dims": (20, 20)}, {}),
    "block of 1": ({"rows": [(1, 9), (3, 5)], "block_size": 1}, {}),
    "block of 64": ({"rows": [(1, 37), (5, 130)], "block_size": 64}, {}),
    "window": ({"rows": MIXED}, {"window": 9}),
    "window of 1": ({"rows": MIXED}, {"window": 1}),
    "soft cap": ({"rows": MIXED}, {"soft_cap": 2.0}),
    "sinks": ({"rows": MIXED}, {"sinks": True}),
    "everything": ({"rows": MIXED, "heads": (6, 2), "dims": (24, 16)}, {"window": 20, "soft_cap": 3.0, "sinks": True}),
    "per head": ({"rows": [(1, 37), (7, 40), (2, 2)], "per_head": True}, {"window": 30}),
    "long": ({"rows": [(1, 700), (3, 515)], "heads": (2, 1)}, {}),
    "sees nothing": ({"rows": [(3, 1), (2, 0)]}, {}),
}


# The definition of noise is slow, and so is Triton's interpreter: there a kind runs where it has something of its own.
NOISY_CASES = "mixed", "empty batch", "everything", "per head", "sees nothing"
INTERPRETED = {
    "sum": ("mixed", "odd dims", "window", "soft cap", "per head", "sees nothing"),
    "count": ("everything",),
    "noisy": ("everything", "per head"),
}


def runs(name: str, case: str, kind: str) -> bool:
    if name == "triton" and testing.device_of(name).type == "cpu":
        return case in INTERPRETED[kind]
    return kind != "noisy" or case in NOISY_CASES


@pytest.mark.parametrize(
    ("name", "case", "kind"),
    [(n, c, k) for n in IMPLEMENTATIONS for c in CASES for k in INTERPRETED if runs(n, c, k)],
)
def test_agrees_with_the_definition(name: str, case: str, kind: str) -> None:
    arguments, options = CASES[case]
    assert_agrees(make_batch(**arguments), name, {**options, "kind": kind})


@pytest.mark.parametrize("cache_dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("same_dtype", [True, False], ids=["q as cache", "q float32"])
@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_takes_16_bit_caches(name: str, cache_dtype: torch.dtype, same_dtype: bool) -> None:
    if not testing.runs_dtype(name, cache_dtype):
        pytest.skip("the interpreter computes bfloat16 wrongly")
    dtype = cache_dtype if same_dtype else torch.float32
    for dims in [(32, 32), (24, 20)]:
        batch = make_batch([(1, 37), (5, 21), (1, 90)], dtype=dtype, cache_dtype=cache_dtype, dims=dims)
        assert_agrees(batch, name, {})


@pytest.mark.parametrize("kind", ["sum", "noisy"])
@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_the_sum_of_a_query_is_one(name: str, kind: str) -> None:
    batch = make_batch([(4, 90), (1, 33)]).to(testing.device_of(name))
    ones = torch.ones(1, 5, device=batch.q.device)
    with backend.using(name):
        scores = run(batch, ones, **(noisy(batch) if kind == "noisy" else {})).cpu()
    torch.testing.assert_close(scores.sum(-1), torch.tensor([[[8.0, 8.0], [2.0, 2.0]]]))  # queries times G heads
    assert not scores[0, 1, :, 33:].any(), "something beyond the end of the row"


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_a_row_does_not_depend_on_its_batch(name: str) -> None:
    rows = [(1, 37), (0, 20), (5, 61), (33, 70)]
    batch = make_batch(rows)
    device = testing.device_of(name)
    weights = weights_of(batch, num_channels=1)
    with backend.using(name):
        together = run(batch.to(device), weights.to(device)).cpu()
        for row, (count, seq_len) in enumerate(rows):
            start = int(batch.cu_seqlens_q[row])
            own = weights[:, start : start + count].contiguous().to(device)
            alone = run(batch.only(row, 0, count).to(device), own).cpu()
            assert torch.equal(alone[:, 0], together[:, row, :, :seq_len])


@needs_cpp
def test_noisy_logits_that_find_no_room_are_made_again_with_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    for arguments, options in (CASES["everything"], CASES["per head"], CASES["long"]):
        batch = make_batch(**arguments)
        window = {name: value for name, value in options.items() if name == "window"}
        results = []
        for room in (cpp_impl.NOISY_BYTES, 0):
            monkeypatch.setattr(cpp_impl, "NOISY_BYTES", room)
            with backend.using("cpp"):
                results.append(run(batch, weights_of(batch), **noisy(batch), **window))
        assert torch.equal(*results)


@needs_cpp
@pytest.mark.parametrize("kind", ["sum", "count", "noisy"])
def test_the_number_of_threads_changes_no_bit(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    batch = make_batch([(1, 1500), (40, 900), (1, 30)], heads=(4, 2))
    results = []
    with backend.using("cpp"):
        for num_threads in (1, 2, 5):
            monkeypatch.setattr(native, "num_threads", lambda n=num_threads: n)
            results.append(run(batch, weights_of(batch), **(noisy(batch) if kind == "noisy" else {"kind": kind})))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@needs_cpp
@pytest.mark.parametrize("kind", ["sum", "count", "noisy"])
@pytest.mark.parametrize("cache_dtype", FLOAT_DTYPES)
def test_sums_passed_on_are_those_of_one_call_bit_for_bit(cache_dtype: torch.dtype, kind: str) -> None:
    batch = make_batch([(130, 500)], heads=(6, 2), dims=(24, 24), cache_dtype=cache_dtype)
    weights = weights_of(batch)
    options = noisy(batch) if kind == "noisy" else {"kind": kind}
    with backend.using("cpp"):
        whole = run(batch, weights, **options)
        for chunk in (1, 7, 64):
            sums = torch.zeros_like(whole)
            for first in range(0, 130, chunk):
                last = min(130, first + chunk)
                own = dict(options)
                for key in ("noise_keys", "temperature"):
                    if key in own:
                        own[key] = own[key][first:last]
                run(batch.only(0, first, last), weights[:, first:last].contiguous(), out=sums, **own)
            assert torch.equal(sums, whole)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_without_weights_nothing_is_read(name: str) -> None:
    batch = make_batch([(2, 20), (1, 17)]).to(testing.device_of(name))
    batch.k_cache.fill_(torch.nan)
    before = torch.rand(3, 2, 2, 20, device=batch.q.device)
    after = before.clone()
    with backend.using(name):
        assert run(batch, torch.zeros(3, 3, device=batch.q.device), out=after) is after
    assert torch.equal(after, before)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_uniform_attention_is_not_below_the_mean(name: str) -> None:
    batch = make_batch([(30, 90)], heads=(4, 2))
    batch.k_cache[:] = batch.k_cache[batch.block_table[0, 0], :, :1].clone()
    batch = batch.to(testing.device_of(name))
    with backend.using(name):
        assert not run(batch, torch.ones(1, 30, device=batch.q.device), kind="count").any()


# Causal probabilities of one head and six tokens, and what follows from them.
PROBABILITIES = [
    [1.0],
    [0.6, 0.4],
    [0.5, 0.3, 0.2],
    [0.4, 0.1, 0.4, 0.1],
    [0.3, 0.05, 0.4, 0.05, 0.2],
    [0.3, 0.05, 0.1, 0.35, 0.1, 0.1],
]


def six_tokens(device: torch.device) -> Batch:
    """Keys are one-hot and queries logarithms, so that the probabilities of real attention are those of the table."""
    dim = 16
    q, cache = torch.zeros(6, 1, dim), torch.zeros(2, 1, 4, dim)
    for i, row in enumerate(PROBABILITIES):
        q[i, 0, : len(row)] = math.sqrt(dim) * torch.tensor(row).log()
        cache[i // 4, 0, i % 4, i] = 1
    ints = {"dtype": torch.int32}
    table, lens, starts = torch.tensor([[0, 1]], **ints), torch.tensor([6], **ints), torch.tensor([0, 6], **ints)
    return Batch(q, cache, cache.clone(), table, lens, starts).to(device)


HAND_CHECKED = [
    ("sum", [1, 1, 1, 1, 1, 1], [3.1, 0.9, 1.1, 0.5, 0.3, 0.1]),
    ("sum", [0.5 ** (5 - i) for i in range(6)], [0.68125, 0.1625, 0.425, 0.4, 0.2, 0.1]),
    ("sum", [0.25 ** (5 - i) for i in range(6)], [0.41113, 0.075, 0.22813, 0.36875, 0.15, 0.1]),
    ("sum", [0, 0, 0, 0, 0, 1], [0.3, 0.05, 0.1, 0.35, 0.1, 0.1]),
    ("sum", [0, 0, 0, 0, 1, 1], [0.6, 0.1, 0.5, 0.4, 0.3, 0.1]),
    ("sum", [0, 0, 0, 0, 0.5, 0.5], [0.3, 0.05, 0.25, 0.2, 0.15, 0.05]),
    ("count", [1, 1, 1, 1, 1, 1], [0, 5, 2, 2, 1, 1]),
]


@pytest.mark.parametrize(("kind", "weights", "expected"), HAND_CHECKED)
@pytest.mark.parametrize("name", [*IMPLEMENTATIONS, "reference"])
def test_hand_checked_scores(name: str, kind: str, weights: list[float], expected: list[float]) -> None:
    batch = six_tokens(testing.device_of(name))
    with backend.using(name):
        scores = run(batch, torch.tensor([weights], dtype=torch.float32, device=batch.q.device), kind=kind)
    torch.testing.assert_close(scores.flatten().cpu(), torch.tensor(expected).float(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("temperature", "expected"), [(1.0, [0.0900, 0.2447, 0.6652]), (2.0, [0.1863, 0.3072, 0.5065])]
)
@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_noise_is_added_before_the_temperature(name: str, temperature: float, expected: list[float]) -> None:
    """Keys that take the noise off again leave logits 1, 2, 3, of which the softmax is known."""
    key = torch.tensor([11], dtype=torch.int64)
    of_head = int(head_keys(key, 2, 1))
    gumbels = [gumbel(token_word(of_head, slot)) for slot in range(3)]
    cache = torch.zeros(1, 1, 4, 8)
    cache[0, 0, :3, 0] = torch.tensor([1.0, 2.0, 3.0]) - torch.tensor(gumbels)
    q = torch.zeros(1, 1, 8)
    q[0, 0, 0] = 1
    device = testing.device_of(name)
    ints = {"dtype": torch.int32, "device": device}
    with backend.using(name):
        scores = attention_scores(
            q.to(device),
            cache.to(device),
            torch.tensor([[0]], **ints),
            torch.tensor([3], **ints),
            torch.tensor([0, 1], **ints),
            torch.zeros(1, 1, device=device),
            torch.ones(1, 1, device=device),
            scale=1.0,
            kind="noisy",
            noise_keys=key.to(device),
            layer=2,
            temperature=torch.tensor([temperature], device=device),
        )
    torch.testing.assert_close(scores.flatten().cpu(), torch.tensor(expected), atol=1e-4, rtol=0)


def test_keys_of_heads_are_the_subkeys_of_their_layer() -> None:
    keys = [noise.row_key(1, 0, 5), noise.row_key(-3, 2, 0), -1]
    expected = [[noise.subkey(noise.subkey(key, 4), head) for head in range(3)] for key in keys]
    assert head_keys(torch.tensor(keys), 4, 3).tolist() == expected


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "max"}, "unknown kind 'max'; known: sum, count, noisy"),
        ({"kind": "noisy"}, "noise_keys is None, the kind 'noisy' needs"),
        ({"temperature": torch.ones(8)}, "are for the kind 'noisy', not 'sum'"),
        ({"weights": torch.ones(8)}, r"weights is \[8\]"),
        ({"lse": torch.zeros(7, 4)}, r"lse is \[7, 4\]"),
        ({"q": torch.zeros(8, 5, 16)}, "does not fit 2 kv heads"),
        ({"seq_lens": torch.zeros(3, dtype=torch.int32)}, "need R, R and R"),
        ({"out": torch.zeros(1, 2, 3, 20)}, r"need \[1, 2, 2\]"),
    ],
)
def test_disagreeing_inputs_are_refused_by_name(change: dict[str, Any], message: str) -> None:
    batch = make_batch([(1, 20), (7, 20)])
    names = "q", "k_cache", "block_table", "seq_lens", "cu_seqlens_q"
    arguments = {name: getattr(batch, name) for name in names}
    arguments |= {"lse": torch.zeros(8, 4), "weights": torch.ones(1, 8), "scale": 1.0}
    with pytest.raises(ValueError, match=message):
        attention_scores(**{**arguments, **change})
