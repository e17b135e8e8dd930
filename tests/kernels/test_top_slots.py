"""The highest scores: every implementation chooses what the definition chooses, and ties go to the later slot."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kernels import backend, testing, top_slots

IMPLEMENTATIONS = testing.implementations("top_slots")
ALL = [*IMPLEMENTATIONS, "reference"]
NAN = float("nan")


def choose(name: str, scores: Tensor, num_kept: list[int], lengths: list[int]) -> Tensor:
    device = testing.device_of(name)
    ints = {"dtype": torch.int64, "device": device}
    with backend.using(name):
        return top_slots(scores.to(device), torch.tensor(num_kept, **ints), torch.tensor(lengths, **ints)).cpu()


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize(
    ("scores", "count", "expected"),
    [
        ([3.1, 0.9, 1.1, 0.5, 0.3, 0.1], 3, [0, 1, 2]),
        ([1.0, 1.0, 1.0, 1.0], 2, [2, 3]),
        ([0.0, -0.0, 0.0], 2, [1, 2]),
        ([5.0, 1.0, 5.0, 1.0, 0.0], 3, [0, 2, 3]),
        ([-1.0, -3.0, -2.0], 1, [0]),
        ([NAN, -torch.inf, NAN, 2.0], 2, [1, 3]),
        ([NAN, NAN, 1.0], 2, [1, 2]),
        ([torch.inf, 1.0, torch.inf], 1, [2]),
        ([1.0, 2.0], 5, [0, 1]),
        ([1.0, 2.0], 0, []),
    ],
)
def test_hand_checked_choices(name: str, scores: list[float], count: int, expected: list[int]) -> None:
    assert choose(name, torch.tensor([scores]), [count], [len(scores)])[0].tolist() == expected


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_agrees_with_the_definition_where_rows_differ(name: str) -> None:
    generator = torch.Generator().manual_seed(0)
    wide = torch.randint(-4, 5, (6, 400), generator=generator) / 2  # many ties
    scores = wide[:, :301]  # rows lie further apart than they are long
    scores[3] = torch.randn(301, generator=generator)
    num_kept, lengths = [40, 0, 7, 64, 300, 9], [301, 20, 7, 300, 5, 0]
    found = choose(name, scores, num_kept, lengths)
    assert found.shape == (6, 300)
    assert torch.equal(found, choose("reference", scores, num_kept, lengths))
    assert [int((row >= 0).sum()) for row in found] == [40, 0, 7, 64, 5, 0]


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("shape", [(0, 5), (3, 0)])
def test_nothing_to_choose_from(name: str, shape: tuple[int, int]) -> None:
    found = choose(name, torch.zeros(shape), [2] * shape[0], [0] * shape[0])
    assert found.shape == (shape[0], 0)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_what_lies_beyond_a_length_is_never_chosen(name: str) -> None:
    assert choose(name, torch.tensor([[1.0, 2.0, 9.0], [1.0, 2.0, 3.0]]), [2, 2], [1, 2]).tolist() == [[0, -1], [0, 1]]


def test_wrong_arguments_are_named() -> None:
    kept = torch.tensor([1])
    with pytest.raises(ValueError, match=r"scores is \[3\]"):
        top_slots(torch.zeros(3), kept, kept)
    with pytest.raises(ValueError, match=r"lengths is \[2\]"):
        top_slots(torch.zeros(1, 3), kept, torch.tensor([1, 2]))
