"""Scores of every policy on a matrix small enough to check by hand, and what each keeps because of them."""

from __future__ import annotations

import math

import pytest
import torch

from engine.compression import registry
from engine.compression.a2sf import A2SF
from engine.compression.ems import EMS
from engine.compression.h2o import H2O
from engine.compression.keyformer import Keyformer
from engine.compression.scissorhands import Scissorhands
from engine.compression.snapkv import SnapKV
from engine.compression.tova import TOVA
from engine.compression.vatp import VATP
from tests.compression.views import F6, SHAPE, accumulated, kept, view_of

NORMS = torch.tensor([0.2, 1, 0.5, 2, 1, 1])
CHUNKS = [[6], [1] * 6, [2, 3, 1], [5, 1]]


def close(found: torch.Tensor, expected: list[float]) -> None:
    torch.testing.assert_close(found, torch.tensor(expected), atol=6e-5, rtol=0)


@pytest.mark.parametrize("chunks", CHUNKS)
def test_h2o_sums_each_column(chunks):
    policy = H2O(budget=3)
    scores = accumulated(policy, F6, chunks=chunks)
    close(policy.importance(view_of(scores, 3))[0, 0], [3.1, 0.9, 1.1, 0.5, 0.3, 0.1])


@pytest.mark.parametrize("chunks", CHUNKS)
@pytest.mark.parametrize(
    ("alpha", "expected"),
    [
        (1.0, [3.1, 0.9, 1.1, 0.5, 0.3, 0.1]),
        (0.5, [0.68125, 0.1625, 0.425, 0.4, 0.2, 0.1]),
        (0.25, [0.41113, 0.075, 0.22813, 0.36875, 0.15, 0.1]),
        (0.0, [0.3, 0.05, 0.1, 0.35, 0.1, 0.1]),
    ],
)
def test_a2sf_forgets(alpha, expected, chunks):
    close(accumulated(A2SF(budget=3, num_recent=1, alpha=alpha), F6, chunks=chunks)[0], expected)


@pytest.mark.parametrize("alpha", [0.1, 0.5, 0.9])
def test_the_recursion_of_a2sf_is_its_closed_form(alpha):
    torch.manual_seed(0)
    attention = torch.rand(40, 40, dtype=torch.float64).tril().softmax(-1).tril()
    recursion = torch.zeros(40, dtype=torch.float64)
    for row in attention:
        recursion = alpha * recursion + row
    policy = A2SF(budget=20, alpha=alpha)
    for chunks in ([40], [7, 13, 20], [1] * 40):
        found = accumulated(policy, attention, chunks=chunks)[0].double()
        # queries that are left out weigh less than 1e-4 each
        torch.testing.assert_close(found, recursion, atol=1.01e-4 / (1 - alpha), rtol=1e-6)


def test_a2sf_needs_no_more_queries_than_weigh_something():
    plan = A2SF(budget=100, alpha=0.95).plan(1000, SHAPE)
    assert plan.num_queries == math.ceil(math.log(1e-4) / math.log(0.95)) == 180
    weights = A2SF(budget=100, alpha=0.95).query_weights(torch.arange(1000), 1000, 1000)[0]
    assert weights.nonzero().flatten().tolist() == list(range(820, 1000))
    assert A2SF(budget=100, alpha=1).plan(1000, SHAPE).num_queries == 1000
    assert A2SF(budget=100, alpha=0).plan(1000, SHAPE).num_queries == 1
    assert A2SF(budget=100, alpha=0.01).plan(1000, SHAPE).num_queries == 2


def test_a2sf_is_h2o_at_alpha_1_and_tova_at_0():
    torch.manual_seed(1)
    attention = torch.rand(50, 50, dtype=torch.float64).tril().softmax(-1).tril()
    h2o, tova = H2O(budget=20, recent_share=0.05), TOVA(budget=20)
    for alpha, other in ((1, h2o), (0, tova)):
        policy = A2SF(budget=20, num_recent=1, alpha=alpha)
        ours, theirs = accumulated(policy, attention, chunks=[30, 20]), accumulated(other, attention, chunks=[50])
        torch.testing.assert_close(ours, theirs)
        assert kept(policy, view_of(ours, 20)) == kept(other, view_of(theirs, 20))


@pytest.mark.parametrize("chunks", CHUNKS)
def test_tova_looks_at_the_last_query_alone(chunks):
    close(accumulated(TOVA(budget=3), F6, chunks=chunks)[0], [0.3, 0.05, 0.1, 0.35, 0.1, 0.1])


@pytest.mark.parametrize(
    ("kernel", "pooling", "expected"),
    [
        (1, "avg", [0.6, 0.1, 0.5, 0.4]),
        (3, "avg", [0.23333, 0.4, 0.33333, 0.3]),
        (3, "max", [0.6, 0.6, 0.5, 0.5]),
    ],
)
def test_snapkv_sums_the_window_and_smooths_what_is_before_it(kernel, pooling, expected):
    policy = SnapKV(budget=3, window=2, kernel=kernel, pooling=pooling)
    for chunks in CHUNKS:
        view = view_of(accumulated(policy, F6, chunks=chunks), 3)
        close(policy.importance(view)[0, 0, :4], expected)


def test_smoothing_changes_what_snapkv_keeps():
    for kernel, expected in ((1, [0, 4, 5]), (3, [1, 4, 5])):
        policy = SnapKV(budget=3, window=2, kernel=kernel)
        assert kept(policy, view_of(accumulated(policy, F6), 3)) == expected


@pytest.mark.parametrize("chunks", CHUNKS)
def test_scissorhands_counts_how_often_a_token_is_ignored(chunks):
    policy = Scissorhands(budget=5, window=6, num_recent=1)
    scores = accumulated(policy, F6, chunks=chunks)
    assert scores[0].tolist() == [0, 5, 2, 2, 1, 1]
    # the most ignored goes first
    assert kept(policy, view_of(scores, 5)) == [0, 2, 3, 4, 5]


def test_scissorhands_counts_the_last_queries_only():
    scores = accumulated(Scissorhands(budget=5, window=2, num_recent=1), F6)
    assert scores[0].tolist() == [0, 2, 1, 1, 1, 1]


@pytest.mark.parametrize("seed", range(3))
def test_choices_on_random_attention_are_those_of_the_formulas(seed):
    """Two query heads share a kv head: their probabilities are summed."""
    torch.manual_seed(seed)
    num_tokens, num_kept = 70, 30
    logits = torch.randn(2, num_tokens, num_tokens, dtype=torch.float64) * 2
    visible = torch.ones(num_tokens, num_tokens, dtype=torch.bool).tril()
    attention = logits.masked_fill(~visible, -torch.inf).softmax(-1).sum(0)
    a = attention.tolist()

    def column(token: int, first: int, weight=lambda query: 1.0) -> float:
        return sum(weight(query) * a[query][token] for query in range(first, num_tokens))

    def best(scores: list[float], count: int, always: list[int]) -> list[int]:
        others = [token for token in range(len(scores)) if token not in always]
        return sorted(sorted(others, key=lambda token: -scores[token])[:count] + always)

    tokens = range(num_tokens)
    window = [0.0, 0.0, *[column(token, 62) if token < 62 else 0.0 for token in tokens], 0.0, 0.0]
    smooth = [sum(window[token : token + 5]) / 5 for token in tokens]
    expected = {
        H2O(budget=num_kept): best([column(k, 0) for k in tokens], 15, list(range(55, 70))),
        TOVA(budget=num_kept): best([a[-1][k] for k in tokens], 29, [69]),
        A2SF(budget=num_kept, alpha=0.9): best(
            [column(k, 0, lambda query: 0.9 ** (69 - query)) for k in tokens], 14, list(range(54, 70))
        ),
        SnapKV(budget=num_kept, window=8): best(smooth, 22, list(range(62, 70))),
    }
    for policy, tokens_kept in expected.items():
        assert kept(policy, view_of(accumulated(policy, attention, chunks=[33, 37]), num_kept)) == tokens_kept


def test_snapkv_of_a_prompt_shorter_than_its_window_keeps_the_end():
    policy = SnapKV(ratio=0.5, window=32)
    scores = accumulated(policy, F6)
    assert policy.plan(6, SHAPE).kept == (3,)
    assert kept(policy, view_of(scores, 3)) == [3, 4, 5]


def test_two_best_and_the_last():
    h2o = H2O(budget=3, recent_share=1 / 3)
    assert kept(h2o, view_of(accumulated(h2o, F6), 3)) == [0, 2, 5]
    for alpha, expected in ((0.5, [0, 2, 5]), (0.25, [0, 3, 5])):
        policy = A2SF(budget=3, num_recent=1, alpha=alpha)
        assert kept(policy, view_of(accumulated(policy, F6), 3)) == expected


def values_of_norm(norms: torch.Tensor) -> torch.Tensor:
    """[1, 1, n, 4], of mixed signs."""
    return (norms.unsqueeze(1) * torch.tensor([0.25, -0.25, -0.25, 0.25])).reshape(1, 1, -1, 4)


def test_vatp_multiplies_by_the_norm_of_the_value():
    base = H2O(budget=3, recent_share=1 / 3)
    view = view_of(accumulated(base, F6), 3, values=values_of_norm(NORMS))
    close(VATP(base=base).importance(view)[0, 0], [0.62, 0.9, 0.55, 1.0, 0.3, 0.1])
    assert kept(VATP(base=base, num_first=0), view) == [1, 3, 5]
    assert kept(VATP(base=base, num_first=1), view) == [0, 3, 5]


@pytest.mark.parametrize("name", registry.entry("vatp").bases)
def test_vatp_with_equal_norms_is_its_base(name):
    torch.manual_seed(2)
    scores = torch.rand(1, 2, 2, 80)
    base = registry.create(name, {"budget": 40})
    view = view_of(scores, 40, values=torch.ones(2, 2, 80, 4))
    assert torch.equal(VATP(base=base, num_first=0).keep(view).index, base.keep(view).index)  # type: ignore[arg-type]


def test_vatp_leaves_half_of_the_room_to_the_scores():
    base = H2O(budget=8, recent_share=0.5)
    scores = torch.arange(40.0)
    view = view_of(scores, 8, values=torch.ones(1, 1, 40, 4))
    assert kept(VATP(base=base, num_first=20), view) == [0, 1, 34, 35, 36, 37, 38, 39]


def test_the_global_part_of_ems_is_attention_per_query_that_saw_the_token():
    policy = EMS(budget=3, window=2)
    scores = accumulated(policy, F6)
    overall = torch.tensor([0.51667, 0.18, 0.275, 0.16667, 0.15, 0.1])
    local = torch.tensor([0.6 / 2, 0.1 / 2, 0.5 / 2, 0.4 / 2, 0.3 / 2, 0.1])
    expected = torch.maximum(overall / overall.mean(), local / local.mean())
    close(policy.importance(view_of(scores, 3))[0, 0], expected.tolist())


def test_h2o_online_evicts_token_1_then_token_3():
    """Four tokens of prompt, room for two heavy and two recent ones, one token per step."""
    policy = H2O(budget=4, recent_share=0.5, period=1)
    plan = policy.plan(4, SHAPE)
    assert (plan.first_point, plan.period, plan.kept) == (5, 1, (4,))
    present = [0, 1, 2, 3]
    scores = accumulated(policy, F6, point=4)[0].double()
    close(scores.float(), [2.5, 0.8, 0.6, 0.1])
    steps = (
        (4, 1, [2.8, 0.85, 1.0, 0.15, 0.2]),
        (5, 3, [3.11579, 1.10526, 0.51842, 0.30526, 0.10526]),
    )
    for token, dropped, expected in steps:
        present.append(token)
        row = F6[token, present] / F6[token, present].sum()
        assert policy.query_weights(torch.tensor([token]), 4, token + 1).tolist() == [[1.0]]
        scores = torch.cat([scores, torch.zeros(1, dtype=torch.float64)]) + row
        close(scores.float(), expected)
        view = view_of(scores, 4, positions=torch.tensor(present), num_prompt_tokens=4)
        index = policy.keep(view).index[0, 0]
        assert set(present) - {present[i] for i in index} == {dropped}
        present, scores = [present[i] for i in index], scores[index]
    assert present == [0, 2, 4, 5]


def test_keyformer_without_noise_is_h2o():
    torch.manual_seed(3)
    attention = torch.rand(64, 64, dtype=torch.float64).tril().softmax(-1).tril()
    ours, theirs = Keyformer(budget=20, noise=False), H2O(budget=20, recent_share=0.3)
    assert ours.evidence == theirs.evidence
    a, b = accumulated(ours, attention, chunks=[60, 4]), accumulated(theirs, attention, chunks=[60, 4])
    assert torch.equal(a, b)
    assert kept(ours, view_of(a, 20)) == kept(theirs, view_of(b, 20))


def test_the_temperature_of_keyformer_rises_over_the_output_and_then_stays():
    policy = Keyformer(ramp_tokens=4, tau_start=1.0, tau_end=2.0)
    assert policy.evidence.kind == "noisy"
    taus = policy.temperatures(torch.arange(7, 17), 10).tolist()
    assert taus == [1.0, 1.0, 1.0, 1.25, 1.5, 1.75, 2.0, 2.0, 2.0, 2.0]
    logits = torch.tensor([1.0, 2.0, 3.0])
    close((logits / taus[0]).softmax(0), [0.0900, 0.2447, 0.6652])
    close((logits / taus[-1]).softmax(0), [0.1863, 0.3072, 0.5065])
