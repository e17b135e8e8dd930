"""Evict, then merge: who joins whom, and who is gone."""

from __future__ import annotations

import torch

from engine.compression.ems import EMS, closest
from tests.compression.views import view_of


def random_view(num_slots: int = 60, num_kept: int = 20):
    torch.manual_seed(0)
    return view_of(torch.rand(2, 2, 3, num_slots), num_kept, keys=torch.randn(2, 3, num_slots, 4))


def test_above_similarity_1_nothing_merges_and_the_same_tokens_stay():
    view = random_view()
    merging, evicting = EMS(budget=20, window=4, similarity=0.5), EMS(budget=20, window=4, similarity=1.5)
    assert torch.equal(merging.keep(view).index, evicting.keep(view).index)
    assert evicting.keep(view).merge_to is None
    assert EMS(budget=20, window=4, merge_share=0).keep(view).merge_to is None


def test_candidates_join_the_most_similar_centre_and_the_rest_is_gone():
    view = random_view()
    policy = EMS(budget=20, window=4, similarity=0.6, merge_share=0.5)
    keep = policy.keep(view)
    assert keep.merge_to is not None
    importance = policy.importance(view)
    for layer in range(2):
        keys = view.keys(layer)
        for head in range(3):
            centres = keep.index[layer, head].tolist()
            others = [i for i in range(60) if i not in centres]
            best = sorted(others, key=lambda i: (-float(importance[layer, head, i]), -i))[:20]
            for i in range(60):
                cosines = [torch.cosine_similarity(keys[head, i], keys[head, c], dim=0) for c in centres]
                place = int(torch.stack(cosines).argmax())
                expected = place if i in best and cosines[place] >= 0.6 else -1
                assert int(keep.merge_to[layer, head, i]) == expected


def test_a_token_joins_its_duplicate():
    keys = torch.eye(6).unsqueeze(0)
    keys[0, 4] = keys[0, 1]
    joined = closest(keys, torch.tensor([[0, 1, 2]]), torch.tensor([[3, 4]]), 0.99)
    assert joined.tolist() == [[-1, -1, -1, -1, 1, -1]]
    # so the mean of the class is the key that was there
    assert torch.equal((keys[0, 4] + keys[0, 1]) / 2, keys[0, 1])


def test_of_two_equally_similar_centres_the_earlier_is_joined():
    keys = torch.ones(1, 3, 4)
    assert closest(keys, torch.tensor([[0, 1]]), torch.tensor([[2]]), 0.9).tolist() == [[-1, -1, 0]]


def test_padding_neither_joins_nor_is_joined():
    keys = torch.ones(2, 4, 4)
    joined = closest(keys, torch.tensor([[0, -1], [1, 2]]), torch.tensor([[3, -1], [3, 0]]), 0.9)
    assert joined.tolist() == [[-1, -1, -1, 0], [0, -1, -1, 0]]


def test_many_candidates_are_taken_in_parts_with_the_same_result(monkeypatch):
    view = random_view()
    policy = EMS(budget=20, window=4, similarity=0.5, merge_share=1)
    whole = policy.keep(view).merge_to
    monkeypatch.setattr("engine.compression.ems.MOST_SIMILARITIES", 120)
    parts = policy.keep(view).merge_to
    assert whole is not None
    assert parts is not None
    assert torch.equal(whole, parts)


def test_the_local_queries_are_the_window_and_the_global_ones_all():
    weights = EMS(budget=20, window=4).query_weights(torch.arange(5, 12), 10, 10)
    assert weights.tolist() == [[1] * 7, [0, 1, 1, 1, 1, 0, 0]]
