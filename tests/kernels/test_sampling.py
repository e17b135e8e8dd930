"""Sampling: the same bits everywhere, the right distribution, the stated kept sets, and rows that do not mix."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from engine.noise import row_key
from kernels import backend, sampling, testing
from kernels.sampling import reference

IMPLEMENTATIONS = testing.implementations("sampling")
NEG, INF, NAN = -math.inf, math.inf, math.nan


@pytest.fixture(params=IMPLEMENTATIONS)
def name(request):
    with backend.using(request.param):
        yield request.param


@pytest.fixture(params=[each for each in IMPLEMENTATIONS if each != "triton"])
def own(request):
    """Implementations with filters of their own: Triton borrows torch's, and is compared with the reference."""
    with backend.using(request.param):
        yield request.param


def rows_for(name: str, count: int) -> int:
    """Triton's interpreter takes some ten milliseconds per row."""
    return min(count, 6) if name == "triton" and not torch.cuda.is_available() else count


def on(name: str, **tensors: Tensor) -> dict[str, Tensor]:
    return {key: value.to(testing.device_of(name)) for key, value in tensors.items()}


def random_keys(count: int, seed: int = 0) -> Tensor:
    return torch.randint(-(2**63), 2**63 - 1, (count,), generator=torch.Generator().manual_seed(seed))


def position_keys(count: int, *, seed: int = 7, choice: int = 0) -> Tensor:
    return torch.tensor([row_key(seed, choice, index) for index in range(count)])


def pick(values: list, count: int, seed: int) -> Tensor:
    return torch.tensor(values)[torch.randint(len(values), (count,), generator=torch.Generator().manual_seed(seed))]


def choose(name: str, logits: Tensor, **params: Tensor) -> Tensor:
    count = logits.shape[0]
    params = {"temperature": torch.ones(count), "keys": random_keys(count), **params}
    return sampling.sample(logits.to(testing.device_of(name)), **on(name, **params)).cpu()


# ---- the noise ----


def test_philox_agrees_with_the_published_test_vector():
    assert reference.philox4x32(0, 0) == (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)


@pytest.mark.parametrize("num_tokens", [0, 1, 203, 1030])
def test_random_bits_are_the_same_everywhere(name, num_tokens):
    keys = torch.cat([torch.tensor([0, 1, -1, 2**63 - 1, -(2**63)]), random_keys(2)])
    found = sampling.random_bits(keys.to(testing.device_of(name)), num_tokens).cpu()
    assert torch.equal(found, reference.random_bits(keys, num_tokens))


def test_noise_is_accurate_to_1e_5_in_both_tails(name):
    """Token a must win or lose against token b when its logit makes up for the difference of noise but for 1e-5."""
    count = rows_for(name, 60)
    keys = random_keys(count)
    words = reference.random_bits(keys, 400)
    best, worst = words.argmax(dim=1), words.argmin(dim=1)
    for delta in (1e-5, -1e-5):
        logits = torch.full((count, 400), NEG)
        for row in range(count):
            high, low = (reference.gumbel(words[row, column].item()) for column in (best[row], worst[row]))
            logits[row, best[row]] = low - high + delta
            logits[row, worst[row]] = 0.0
        expected = best if delta > 0 else worst
        assert torch.equal(choose(name, logits, keys=keys), expected)


def test_the_largest_word_gives_finite_noise_below_the_bound_of_the_leader_rule():
    assert reference.gumbel(0xFFFFFFFF) < 22.88
    assert reference.gumbel(0) > -3.2


# ---- agreement with the definition ----


@pytest.mark.parametrize(
    "active", [(), ("top_k",), ("top_p",), ("min_p",), ("typical_p",), ("top_k", "top_p", "min_p", "typical_p")]
)
@pytest.mark.parametrize("num_tokens", [1, 203])
def test_choices_equal_the_reference(name, active, num_tokens):
    rows = rows_for(name, 48)
    generator = torch.Generator().manual_seed(num_tokens)
    logits = torch.randn(rows, num_tokens, generator=generator) * 4
    logits[1] = logits[1].round()  # ties
    logits[2] = 0.0
    logits[3, num_tokens // 2 :] = -40.0
    logits[4, : num_tokens // 2] = NEG
    temperature = torch.rand(rows, generator=generator) * 2
    temperature[::7] = 0.0
    temperature[5] = 1e-4
    values = {
        "top_k": pick([-1, 0, 1, 2, 5, 50, 300], rows, 1),
        "top_p": pick([0.0, 0.1, 0.5, 0.9, 0.99, 1.0], rows, 2),
        "min_p": pick([0.0, 0.01, 0.2, 1.0], rows, 3),
        "typical_p": pick([0.1, 0.5, 0.9, 1.0], rows, 4),
    }
    params = {key: value if key in active else None for key, value in values.items()}
    keys = random_keys(rows)
    expected = reference.sample(logits, temperature, *params.values(), keys)
    given = {key: value for key, value in params.items() if value is not None}
    assert torch.equal(choose(name, logits, temperature=temperature, keys=keys, **given), expected)


@pytest.mark.skipif("cpp" not in IMPLEMENTATIONS, reason="needs the native library")
@pytest.mark.parametrize("shape", ["peaked", "flat", "tied", "equal"])
def test_selection_without_sorting_equals_sorting_on_large_vocabularies(shape):
    rows, num_tokens = 8, 6000
    generator = torch.Generator().manual_seed(5)
    logits = torch.randn(rows, num_tokens, generator=generator)
    if shape == "peaked":
        logits[:, 1000:1040] += torch.linspace(20, 6, 40)
    elif shape == "tied":
        logits = logits.round()
    elif shape == "equal":
        logits = torch.zeros_like(logits)
    settings = [
        {},
        {"top_k": pick([1, 50, 93, 94, 95, 3000, 5999, 6000], rows, 1)},
        {"top_p": pick([0.0, 0.3, 0.95, 0.999, 0.9999999], rows, 2)},
        {"min_p": pick([0.001, 0.05, 0.5], rows, 3)},
        {"typical_p": pick([0.2, 0.9], rows, 4)},
        {"top_k": pick([200, 3000], rows, 5), "top_p": torch.full((rows,), 0.9), "typical_p": torch.full((rows,), 0.9)},
    ]
    for params in settings:
        with backend.using("torch"):
            expected = choose("torch", logits, **params)
        with backend.using("cpp"):
            assert torch.equal(choose("cpp", logits, **params), expected), params


def test_greedy_takes_the_lowest_of_equal_logits(name):
    logits = torch.full((3, 37), -1.0)
    logits[0, [5, 9, 36]] = 2.0
    logits[1, 36] = 3.0
    device = testing.device_of(name)
    assert sampling.greedy(logits.to(device)).tolist() == [5, 36, 0]
    zero = torch.zeros(3)
    assert choose(name, logits, temperature=zero, top_p=zero).tolist() == [5, 36, 0]


def test_unfit_rows_give_minus_one_and_leave_the_others_alone(name):
    clean = torch.randn(6, 70, generator=torch.Generator().manual_seed(0))
    broken = clean.clone()
    broken[1, 69] = NAN
    broken[2, 3] = INF
    broken[4] = NEG
    temperature = torch.tensor([1.0, 1.0, 0.0, 0.0, 1.0, 0.7])
    for filters in ({}, {"top_p": torch.full((6,), 0.9)}):
        expected = choose(name, clean, temperature=temperature, **filters)
        found = choose(name, broken, temperature=temperature, **filters)
        assert found[[1, 2, 4]].tolist() == [-1, -1, -1]
        assert torch.equal(found[[0, 3, 5]], expected[[0, 3, 5]])


def test_a_row_does_not_depend_on_its_neighbours_and_logits_stay_as_they_are(name):
    logits = testing.strided(torch.randn(9, 130, generator=torch.Generator().manual_seed(3)))
    before = logits.clone()
    params = {
        "temperature": pick([0.0, 0.5, 1.5], 9, 0),
        "keys": random_keys(9),
        "top_k": pick([0, 10], 9, 1),
        "top_p": pick([0.8, 1.0], 9, 2),
    }
    together = choose(name, logits, **params)
    for row in range(9):
        alone = choose(name, logits[row : row + 1], **{key: value[row : row + 1] for key, value in params.items()})
        assert alone.item() == together[row].item()
    assert torch.equal(logits, before)


def test_no_rows_give_no_tokens(name):
    assert choose(name, torch.zeros(0, 11)).shape == (0,)
    assert sampling.greedy(torch.zeros(0, 11, device=testing.device_of(name))).shape == (0,)


# ---- the kept sets ----


def kept_set(name: str, logits: list[float], *, count: int = 600, **params: float) -> set[int]:
    """Tokens that ever come out."""
    types = {"top_k": torch.int64}
    rows = {key: torch.full((count,), value, dtype=types.get(key, torch.float32)) for key, value in params.items()}
    return set(choose(name, torch.tensor(logits).expand(count, -1).contiguous(), **rows).tolist())


def logits_of(probabilities: list[float]) -> list[float]:
    return [math.log(p) for p in probabilities]


SKEWED = logits_of([0.05, 0.5, 0.15, 0.3])


def test_top_k_keeps_exactly_k_with_ties_by_lower_id(own):
    assert kept_set(own, SKEWED, top_k=2) == {1, 3}
    assert kept_set(own, [0.0] * 6, top_k=3) == {0, 1, 2}
    assert kept_set(own, SKEWED, top_k=0) == kept_set(own, SKEWED, top_k=99) == {0, 1, 2, 3}


def test_top_p_keeps_the_smallest_prefix_that_reaches_the_mass(own):
    assert kept_set(own, SKEWED, top_p=0.49) == {1}
    assert kept_set(own, SKEWED, top_p=0.79) == {1, 3}
    assert kept_set(own, SKEWED, top_p=0.81) == {1, 2, 3}
    assert kept_set(own, [0.0] * 8, top_p=0.49) == {0, 1, 2, 3}


def test_top_p_zero_keeps_the_best_only(own):
    assert kept_set(own, SKEWED, top_p=0.0) == {1}


def test_top_p_works_on_what_top_k_left(own):
    # of 0.5 and 0.3 alone, the first already has 0.625 of the mass
    assert kept_set(own, SKEWED, top_k=2, top_p=0.6) == {1}
    assert kept_set(own, SKEWED, top_k=3, top_p=0.6) == {1, 3}


def test_min_p_is_relative_to_the_best(own):
    assert kept_set(own, SKEWED, min_p=0.31) == {1, 3}
    assert kept_set(own, SKEWED, min_p=0.29) == {1, 2, 3}
    assert kept_set(own, [0.0, 0.0, -0.1], min_p=1.0) == {0, 1}


def test_typical_p_prefers_tokens_of_average_surprise_to_the_best_one(own):
    # entropy 1.14 nats: 0.3 (1.20) is closest, then 0.5 (0.69), then 0.15 (1.90)
    assert kept_set(own, SKEWED, typical_p=0.29) == {3}
    assert kept_set(own, SKEWED, typical_p=0.79) == {1, 3}
    assert kept_set(own, SKEWED, typical_p=0.81) == {1, 2, 3}


def test_typical_p_works_on_what_the_other_filters_left(own):
    # 0.5 and 0.3 renormalised: entropy 0.66; surprises 0.47 and 0.98
    assert kept_set(own, SKEWED, top_k=2, typical_p=0.5) == {1}
    assert kept_set(own, SKEWED, min_p=0.31, typical_p=0.5) == {1}


def test_filters_follow_the_temperature(own):
    # squared and renormalised, 0.5 has 0.68 of the mass
    assert kept_set(own, SKEWED, temperature=0.5, top_p=0.6) == {1}
    assert kept_set(own, SKEWED, temperature=1.0, top_p=0.6) == {1, 3}


# ---- the distribution ----


def chi_square(observed: Tensor, expected: Tensor) -> float:
    return ((observed - expected) ** 2 / expected).sum().item()


def p_value_is_tiny(statistic: float, degrees: int) -> bool:
    """Whether a chi-square value is beyond the 1 - 1e-5 quantile (Wilson and Hilferty's approximation)."""
    z = ((statistic / degrees) ** (1 / 3) - (1 - 2 / (9 * degrees))) / math.sqrt(2 / (9 * degrees))
    return z > 4.265


SHAPE = torch.tensor([1.0, 0.2, -0.5, 2.0, 0.9, -2.0, 1.4, 0.0])
DRAWS = 20000


def histogram(name: str, temperature: float, **params: Tensor) -> Tensor:
    logits = SHAPE.expand(DRAWS, -1).contiguous()
    ids = choose(name, logits, temperature=torch.full((DRAWS,), temperature), keys=position_keys(DRAWS), **params)
    return ids.bincount(minlength=len(SHAPE)).double()


def test_draws_at_successive_positions_follow_the_softmax(own):
    observed = histogram(own, 0.8)
    expected = (SHAPE.double() / 0.8).softmax(0) * observed.sum()
    assert not p_value_is_tiny(chi_square(observed, expected), 7)


def test_the_chi_square_test_notices_a_temperature_wrong_by_a_tenth():
    with backend.using("torch"):
        observed = histogram("torch", 0.88)
    expected = (SHAPE.double() / 0.8).softmax(0) * observed.sum()
    assert p_value_is_tiny(chi_square(observed, expected), 7)


def test_the_chi_square_test_notices_noise_that_is_not_gumbel():
    uniform = sampling.random_bits(position_keys(DRAWS), len(SHAPE)).double() / 2**32
    observed = (SHAPE / 0.8 + uniform).argmax(dim=1).bincount(minlength=len(SHAPE)).double()
    expected = (SHAPE.double() / 0.8).softmax(0) * observed.sum()
    assert p_value_is_tiny(chi_square(observed, expected), 7)


def test_filtered_draws_follow_the_renormalised_softmax(own):
    observed = histogram(own, 1.0, top_k=torch.full((DRAWS,), 4), top_p=torch.full((DRAWS,), 0.97))
    kept = [0, 3, 4, 6]
    assert observed.sum() == observed[kept].sum()
    expected = SHAPE[kept].double().softmax(0) * DRAWS
    assert not p_value_is_tiny(chi_square(observed[kept], expected), 3)


def dependence(first: Tensor, second: Tensor) -> float:
    """Chi-square of the contingency table of two series of tokens; (8 - 1)^2 degrees of freedom."""
    table = (first * 8 + second).bincount(minlength=64).double().reshape(8, 8)
    expected = table.sum(1, keepdim=True) * table.sum(0, keepdim=True) / table.sum()
    return chi_square(table, expected)


def test_positions_and_choices_are_independent():
    logits, ones = torch.zeros(DRAWS, 8), torch.ones(DRAWS)
    by_choice = [
        sampling.sample(logits, temperature=ones, keys=position_keys(DRAWS, choice=choice)) for choice in (0, 1)
    ]
    by_seed = sampling.sample(logits, temperature=ones, keys=position_keys(DRAWS, seed=8))
    assert not p_value_is_tiny(dependence(by_choice[0][:-1], by_choice[0][1:]), 49)
    assert not p_value_is_tiny(dependence(*by_choice), 49)
    assert not p_value_is_tiny(dependence(by_choice[0], by_seed), 49)


def test_the_independence_test_notices_keys_that_forget_the_choice():
    ids = sampling.sample(torch.zeros(DRAWS, 8), temperature=torch.ones(DRAWS), keys=position_keys(DRAWS))
    assert p_value_is_tiny(dependence(ids, ids), 49)


# ---- penalties, masks, log-probabilities ----


def test_penalties_equal_the_reference_and_touch_no_other_row(name):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(5, 43, generator=generator) * 3
    logits[3, :4] = torch.tensor([NEG, NAN, INF, 0.0])
    counts = torch.randint(0, 3, (4, 43), generator=generator, dtype=torch.int32)
    in_prompt = torch.randint(0, 2, (4, 43), generator=generator, dtype=torch.uint8)
    args = {
        "rows": torch.tensor([3, 0, 4]),
        "slots": torch.tensor([1, 3, 0]),
        "output_counts": counts,
        "prompt_mask": in_prompt,
        "repetition": torch.tensor([1.0, 1.3, 0.7]),
        "presence": torch.tensor([0.5, 0.0, -2.0]),
        "frequency": torch.tensor([0.0, 1.1, 2.0]),
    }
    expected = logits.clone()
    reference.apply_penalties(expected, *args.values())
    found = testing.strided(logits).to(testing.device_of(name))
    sampling.apply_penalties(found, **on(name, **args))
    torch.testing.assert_close(found.cpu(), expected, rtol=1e-6, atol=1e-6, equal_nan=True)
    assert torch.equal(found[1:3].cpu(), logits[1:3])


@pytest.mark.parametrize("num_tokens", [1, 31, 32, 70])
def test_bitmask_forbids_unset_bits_and_never_hides_nan(name, num_tokens):
    generator = torch.Generator().manual_seed(num_tokens)
    logits = torch.randn(3, num_tokens, generator=generator)
    logits[2, -1] = NAN
    mask = torch.randint(-(2**31), 2**31 - 1, (3, (num_tokens + 31) // 32), generator=generator, dtype=torch.int32)
    mask[1] = -1
    mask[2] = 0
    expected = logits.clone()
    reference.apply_token_bitmask(expected, mask)
    found = logits.to(testing.device_of(name))
    sampling.apply_token_bitmask(found, mask.to(found.device))
    torch.testing.assert_close(found.cpu(), expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(("num_tokens", "top_n"), [(1, 1), (19, 0), (203, 5), (203, 203), (3000, 20)])
def test_log_probs_ranks_and_best_tokens_equal_the_reference(name, num_tokens, top_n):
    generator = torch.Generator().manual_seed(num_tokens)
    logits = torch.randn(7, num_tokens, generator=generator) * 5
    logits[1] = logits[1].round()
    logits[2, num_tokens // 2 + 1 :] = NEG
    logits[3, 0] = NAN
    logits[4] = NEG
    ids = torch.randint(0, num_tokens, (7,), generator=generator)
    ids[6] = -1
    expected = reference.log_probs_of(logits, ids, top_n)
    found = sampling.log_probs_of(testing.strided(logits).to(testing.device_of(name)), **on(name, ids=ids), top_n=top_n)
    assert torch.equal(found.ranks.cpu(), expected.ranks)
    assert torch.equal(found.top_ids.cpu(), expected.top_ids)
    for actual, wanted in ((found.log_probs, expected.log_probs), (found.top_log_probs, expected.top_log_probs)):
        torch.testing.assert_close(actual.cpu(), wanted, rtol=2e-6, atol=2e-6, equal_nan=True)


# ---- the checks ----


def test_wrong_arguments_are_refused_with_shape_and_type():
    logits, keys, ones = torch.zeros(2, 5), torch.zeros(2, dtype=torch.int64), torch.ones(2)
    with pytest.raises(ValueError, match=r"logits must be \[N, V\] float32"):
        sampling.greedy(logits.double())
    with pytest.raises(ValueError, match=r"temperature must be contiguous torch.float32 \[2\], got .*\(3,\)"):
        sampling.sample(logits, temperature=torch.ones(3), keys=keys)
    with pytest.raises(ValueError, match=r"top_k must be contiguous torch.int64"):
        sampling.sample(logits, temperature=ones, keys=keys, top_k=ones)
    with pytest.raises(ValueError, match=r"top_n is 6, allowed are 0 to 5"):
        sampling.log_probs_of(logits, keys, 6)
    with pytest.raises(ValueError, match=r"mask must be contiguous int32 \(2, 1\)"):
        sampling.apply_token_bitmask(logits, torch.zeros(2, 2, dtype=torch.int32))


def test_probabilities_are_those_of_what_the_filters_leave() -> None:
    generator = torch.Generator().manual_seed(2)
    logits = torch.randn(4, 50, generator=generator)
    temperature = torch.tensor([0.5, 1.0, 1.0, 2.0])
    top_k = torch.tensor([0, 3, 0, 0])
    top_p = torch.tensor([1.0, 1.0, 0.6, 1.0])
    p = sampling.probabilities(logits, temperature=temperature, top_k=top_k, top_p=top_p)
    assert torch.allclose(p[0], (logits[0].double() / 0.5).softmax(0))
    best = logits[1].topk(3)
    assert torch.allclose(p[1, best.indices], best.values.double().softmax(0))
    assert int((p[1] > 0).sum()) == 3
    ordered = logits[2].double().softmax(0).sort(descending=True).values
    kept = int((ordered.cumsum(0) < 0.6).sum()) + 1
    assert torch.allclose(p[2].sort(descending=True).values[:kept], ordered[:kept] / ordered[:kept].sum())
    assert torch.allclose(p.sum(1), torch.ones(4, dtype=torch.float64))
    logits[0, 7] = float("nan")
    assert bool(sampling.probabilities(logits, temperature=temperature)[0].isnan().all())
