"""The order of tokens, and what every policy that ranks them promises: properties over random scores."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.compression import registry
from engine.compression.scoring import ScoringPolicy, indices, pool, protect, ranks, top_k
from tests.compression.views import view_of

RANKING = [name for name in registry.names() if issubclass(registry.entry(name).policy, ScoringPolicy)]
LEVELS = st.sampled_from([0.0, 0.25, 0.5, 1.0])  # few, so that there are ties; exact in every floating-point type


def best(scores: list[float], count: int) -> list[int]:
    """The definition: score descending, position descending; the answer in ascending order."""
    order = sorted(range(len(scores)), key=lambda i: (-scores[i], -i))
    return sorted(order[:count])


@settings(max_examples=60, deadline=None)
@given(st.lists(LEVELS, min_size=1, max_size=24), st.integers(1, 30))
def test_top_k_takes_the_best_and_of_equals_the_newest(scores, count):
    expected = best(scores, min(count, len(scores)))
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        assert top_k(torch.tensor(scores, dtype=dtype), count).tolist() == expected


def test_rows_that_keep_fewer_end_with_minus_one():
    scores = torch.tensor([[3.0, 1.0, 2.0, 0.0], [0.0, 1.0, 2.0, 3.0]])
    assert top_k(scores, torch.tensor([3, 1])).tolist() == [[0, 1, 2], [3, -1, -1]]


def test_ranks_are_places_in_the_order():
    assert ranks(torch.tensor([1.0, 3.0, 1.0, 2.0])).tolist() == [3, 0, 2, 1]


def test_indices_are_where_the_mask_holds():
    mask = torch.tensor([[True, False, True], [False, False, False]])
    assert indices(mask, 2).tolist() == [[0, 2], [-1, -1]]


@pytest.mark.parametrize("top", [1.0, 3e38])
def test_protected_tokens_stay_however_large_the_scores_are(top):
    scores = protect(torch.tensor([0.0, top, top]), torch.tensor([True, False, False]))
    assert top_k(scores, 1).tolist() == [0]


def test_pooling_with_a_kernel_of_one_changes_nothing():
    scores = torch.rand(2, 3, 7)
    assert pool(scores, 1, "avg") is scores
    torch.testing.assert_close(pool(scores, 3, "avg")[..., 0], (scores[..., 0] + scores[..., 1]) / 3)
    assert torch.equal(pool(scores, 3, "max")[..., 0], scores[..., :2].amax(-1))


@st.composite
def views(draw, num_heads=2):
    num_slots = draw(st.integers(40, 90))
    num_kept = draw(st.integers(33, num_slots))
    seed = draw(st.integers(0, 2**31))
    generator = torch.Generator().manual_seed(seed)
    # one token in three is gone already
    positions = torch.randperm(num_slots * 3 // 2, generator=generator)[:num_slots].sort().values
    shape = 2, num_heads, num_slots
    return view_of(
        torch.randint(0, 6, (2, *shape), generator=generator) / 4,
        num_kept,
        positions=positions,
        seed=seed,
        keys=torch.randn(*shape, 8, generator=generator),
        values=torch.randn(*shape, 8, generator=generator),
    )


def policy_for(name: str) -> ScoringPolicy:
    options = {} if name == "razor_attention" else {"ratio": 0.5}
    policy = registry.create(name, options)
    assert isinstance(policy, ScoringPolicy)
    return policy


@pytest.mark.parametrize("name", RANKING)
@settings(max_examples=8, deadline=None)
@given(views())
def test_kept_tokens_are_ascending_unique_and_as_many_as_asked(name, view):
    index = policy_for(name).keep(view).index
    assert index.shape == (2, 2, int(view.num_kept.max()))
    assert bool((index.diff(dim=-1) > 0).all())
    assert int(index.min()) >= 0
    assert int(index.max()) < view.positions.shape[-1]


@pytest.mark.parametrize("name", RANKING)
@settings(max_examples=8, deadline=None)
@given(views())
def test_protected_tokens_stay_where_there_is_room(name, view):
    policy = policy_for(name)
    protected = policy.protected(view)
    index = policy.keep(view).index
    stays = torch.zeros_like(protected).scatter(-1, index, True)
    assert bool((protected.sum(-1) <= view.num_kept).all())
    assert bool((stays | ~protected).all())
    # the newest token is never the one to go
    assert bool(stays[..., -1].all())


@pytest.mark.parametrize("name", [name for name in RANKING if name not in ("random", "kvcrush")])
@settings(max_examples=8, deadline=None)
@given(views(num_heads=3))
def test_heads_that_change_places_keep_what_they_kept(name, view):
    policy = policy_for(name)
    order = torch.tensor([2, 0, 1])
    changed = view_of(
        view.scores[:, :, order],
        view.num_kept[:, order],
        positions=view.positions[:, order],
        seed=view.seed,
        keys=torch.stack([view.keys(layer)[order] for layer in range(2)]),
        values=torch.stack([view.values(layer)[order] for layer in range(2)]),
    )
    assert torch.equal(policy.keep(changed).index, policy.keep(view).index[:, order])


@pytest.mark.parametrize("name", RANKING)
def test_a_choice_is_a_function_of_its_view(name):
    policy = policy_for(name)
    torch.manual_seed(0)
    view = view_of(torch.rand(2, 2, 2, 60), 40, values=torch.rand(2, 2, 60, 4), seed=5)
    first = policy.keep(view).index
    torch.manual_seed(1)
    torch.rand(3)
    assert torch.equal(policy.keep(view).index, first)


@pytest.mark.parametrize("name", RANKING)
def test_whoever_may_keep_everything_does(name):
    view = view_of(torch.rand(2, 2, 2, 50), 50, keys=torch.rand(2, 2, 50, 4))
    keep = policy_for(name).keep(view)
    assert torch.equal(keep.index, torch.arange(50).expand(2, 2, 50))
    assert keep.merge_to is None


@pytest.mark.parametrize("name", RANKING)
def test_one_token_is_enough_to_go_on(name):
    assert policy_for(name).keep(view_of(torch.rand(2, 1, 1, 20), 1)).index.shape == (1, 1, 1)


@pytest.mark.parametrize("name", [name for name in RANKING if name not in ("ems", "snapkv", "pyramidkv")])
def test_heads_of_different_length_keep_only_what_they_have(name):
    """Noise lies beyond the slots of a head that has fewer."""
    scores = torch.rand(2, 1, 2, 40)
    scores[:, 0, 1, 24:] = 1e9
    positions = torch.arange(40).expand(1, 2, 40).clone()
    positions[0, 1, :24] += 16
    positions[0, 1, 24:] = -1
    view = view_of(
        scores,
        torch.tensor([[20, 10]]),
        positions=positions,
        num_present=torch.tensor([[40, 24]]),
        num_tokens=40,
        values=torch.ones(1, 2, 40, 4),
    )
    index = policy_for(name).keep(view).index[0, 1]
    assert index[10:].tolist() == [-1] * 10
    assert 0 <= int(index[:10].min()) < int(index[:10].max()) < 24
    assert int(index[9]) == 23
