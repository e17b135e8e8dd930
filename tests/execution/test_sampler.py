"""The sampler: order of processing, incremental state, independence of the batch, errors that stay in their row."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

import kernels
from engine import noise
from engine.execution import sampler as sampler_module
from engine.execution.logprobs import prompt_logprobs
from engine.execution.sampler import SampleOutput, Sampler
from engine.types import SamplingParams
from kernels import backend, native

V = 50
EOS = 49
GREEDY = {"temperature": 0.0}


@pytest.fixture(params=["torch", "cpp"], autouse=True)
def _backend(request):
    if request.param == "cpp" and native.library() is None:
        pytest.skip("needs the native library")
    with backend.using(request.param):
        yield


def make(*params: SamplingParams, prompt: Sequence[int] = (1, 2, 3), outputs: Sequence[int] = ()) -> Sampler:
    """A sampler whose row i has params[i]."""
    sampler = Sampler(V, 8, "cpu", [EOS])
    for row, each in enumerate(params):
        sampler.add_row(row, each, 0, [*prompt, *outputs], len(prompt))
    return sampler


def random_logits(rows: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, V, generator=torch.Generator().manual_seed(seed)) * 3


def ramp() -> Tensor:
    """One row in which a higher id is more likely: 49, then 48, ..."""
    return torch.arange(V, dtype=torch.float32).reshape(1, V) / 10


def one(sampler: Sampler, logits: Tensor, output_index: int = 0, bitmask: Tensor | None = None) -> int:
    output = sampler.sample(logits.clone(), [0], [output_index], bitmask)
    assert output.errors == [None]
    return output.token_ids[0]


# ---- plain rows ----


def test_greedy_rows_are_one_kernel_call(monkeypatch):
    calls = []
    monkeypatch.setattr(kernels, "greedy", lambda logits: calls.append("greedy") or logits.argmax(dim=1))
    monkeypatch.setattr(kernels, "sample", lambda *args, **kwargs: calls.append("sample"))
    sampler = make(*[SamplingParams(temperature=0.0, top_p=0.5, top_k=3)] * 4)
    logits = random_logits(4)
    assert sampler.sample(logits, [0, 1, 2, 3], [0] * 4) == SampleOutput(logits.argmax(1).tolist(), None, [None] * 4)
    assert calls == ["greedy"]


def test_draws_are_those_of_the_kernel_under_the_key_of_seed_choice_and_output_index():
    logits = random_logits(3)
    sampler = Sampler(V, 8, "cpu", [])
    for row, (seed, choice) in enumerate([(7, 0), (7, 1), (-3, 0)]):
        sampler.add_row(row + 2, SamplingParams(seed=seed, top_p=0.9), choice, [1], 1)
    keys = torch.tensor([noise.row_key(7, 0, 4), noise.row_key(7, 1, 9), noise.row_key(-3, 0, 0)])
    expected = kernels.sample(logits, temperature=torch.ones(3), keys=keys, top_p=torch.full((3,), 0.9))
    assert sampler.sample(logits, [2, 3, 4], [4, 9, 0]).token_ids == expected.tolist()


def test_vectorised_keys_equal_the_plain_ones():
    seeds, choices, indices = [0, 5, -9, 2**62], [0, 3, 1, 15], [0, 7, 100_000, 2**31]
    streams = np.array([noise.stream_key(s, c) for s, c in zip(seeds, choices, strict=True)], dtype=np.uint64)
    expected = [noise.row_key(s, c, i) for s, c, i in zip(seeds, choices, indices, strict=True)]
    assert sampler_module._row_keys(streams, indices).tolist() == expected


MIXED = [
    SamplingParams(temperature=0.0),
    SamplingParams(temperature=0.7, seed=1),
    SamplingParams(top_k=5, top_p=0.8, seed=2, logprobs=3),
    SamplingParams(min_p=0.1, typical_p=0.7, seed=3),
    SamplingParams(temperature=0.0, repetition_penalty=1.5, frequency_penalty=0.5, logprobs=0),
    SamplingParams(seed=4, presence_penalty=1.0, logit_bias={4: 5.0}, min_tokens=3),
    SamplingParams(seed=5, allowed_token_ids=(1, 2, 3, 4), bad_words_ids=((2, 3), (1,))),
]


def test_a_row_chooses_the_same_alone_and_in_any_batch():
    together, alone = make(*MIXED), make(*MIXED)
    for step in range(6):
        logits = random_logits(len(MIXED), seed=step)
        order = torch.randperm(len(MIXED), generator=torch.Generator().manual_seed(step)).tolist()
        batch = together.sample(logits[order].clone(), order, [step] * len(order))
        for position, row in enumerate(order):
            single = alone.sample(logits[row : row + 1].clone(), [row], [step])
            assert single.token_ids[0] == batch.token_ids[position], MIXED[row]
            logprobs = single.logprobs[0] if single.logprobs else None
            assert logprobs == (batch.logprobs[position] if batch.logprobs else None)


def test_a_row_that_returns_after_preemption_goes_on_as_if_nothing_had_happened():
    steady, preempted = make(*MIXED), make(*MIXED)
    outputs: list[list[int]] = [[] for _ in MIXED]
    rows = list(range(len(MIXED)))
    for step in range(6):
        if step == 3:
            for row in rows:
                preempted.remove_row(row)
            for row, params in enumerate(MIXED):
                preempted.add_row(row, params, 0, [1, 2, 3, *outputs[row]], 3)
        logits = random_logits(len(MIXED), seed=step)
        expected = steady.sample(logits.clone(), rows, [step] * len(rows)).token_ids
        assert preempted.sample(logits.clone(), rows, [step] * len(rows)).token_ids == expected
        for row, token_id in enumerate(expected):
            outputs[row].append(token_id)


def test_a_row_forgets_everything_when_it_is_removed():
    sampler = make(MIXED[5], MIXED[6])
    sampler.sample(random_logits(2), [0, 1], [0, 0])
    for row in (0, 1):
        sampler.remove_row(row)
        sampler.add_row(row, SamplingParams(temperature=0.0), 0, [1], 1)
    logits = random_logits(2, seed=1)
    assert sampler.sample(logits.clone(), [0, 1], [0, 0]).token_ids == logits.argmax(1).tolist()


def test_a_row_that_cannot_be_added_leaves_the_row_usable(monkeypatch):
    penalised = SamplingParams(temperature=0.0, presence_penalty=2.0, bad_words_ids=((1, 2),))
    sampler = Sampler(V, 8, "cpu", [EOS])
    with monkeypatch.context() as patch:
        patch.setattr(torch, "cat", lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError("no room for counts")))
        with pytest.raises(torch.OutOfMemoryError):
            sampler.add_row(0, penalised, 0, [1], 1)
    sampler.remove_row(0)
    for _ in range(2):  # 49 was counted once, so 48 is next; removing the row forgets that
        sampler.add_row(0, penalised, 0, [1], 1)
        assert [one(sampler, ramp(), i) for i in range(2)] == [49, 48]
        sampler.remove_row(0)


def test_no_rows_give_an_empty_output():
    assert make().sample(torch.zeros(0, V), [], []) == SampleOutput([], None, [])


# ---- bias, allowed ids, bad words, min_tokens, grammar ----


def test_logit_bias_adds_clamps_bans_and_makes_exclusive():
    assert one(make(SamplingParams(logit_bias={7: 4.1}, **GREEDY)), ramp()) == EOS
    assert one(make(SamplingParams(logit_bias={7: 4.3}, **GREEDY)), ramp()) == 7
    assert one(make(SamplingParams(logit_bias={49: -100.0, 48: -1e5}, **GREEDY)), ramp()) == 47
    assert one(make(SamplingParams(logit_bias={3: 100.0, 5: 1e9}, **GREEDY)), ramp()) == 5
    huge = ramp()
    huge[0, 40] = 1e4  # exclusive whatever the logits, and bans hold against any of them
    assert one(make(SamplingParams(logit_bias={3: 100.0, 5: 1e9}, **GREEDY)), huge) == 5
    assert one(make(SamplingParams(logit_bias={40: -100.0}, **GREEDY)), huge) == EOS


def test_only_allowed_ids_are_chosen():
    sampler = make(SamplingParams(allowed_token_ids=(3, 9, 4), seed=1, temperature=2.0))
    assert {one(sampler, ramp(), index) for index in range(60)} == {3, 4, 9}
    both = SamplingParams(allowed_token_ids=(3, 9), logit_bias={9: -100.0}, **GREEDY)
    assert one(make(both), ramp()) == 3


def test_bad_words_are_banned_only_where_they_would_be_completed():
    params = SamplingParams(bad_words_ids=((48,), (47, 49), (2, 3, 47)), **GREEDY)
    sampler = make(params)  # the prompt ends with 2, 3
    assert one(sampler, ramp()) == EOS  # 48 is always banned; 47 would complete, but 49 is better
    no_49 = ramp()
    no_49[0, 49] = -math.inf
    assert one(make(params), no_49) == 46
    sampler.commit([0], [47])
    assert one(sampler, ramp()) == 47  # 49 after 47 is banned now, 2 3 is over


def test_min_tokens_masks_end_of_sequence_and_stop_ids_until_reached():
    sampler = make(SamplingParams(min_tokens=2, stop_token_ids=(48,), **GREEDY))
    assert [one(sampler, ramp(), index) for index in range(4)] == [47, 47, 49, 49]


def test_min_tokens_with_ignore_eos_masks_stop_ids_only():
    sampler = make(SamplingParams(min_tokens=2, stop_token_ids=(48,), ignore_eos=True, **GREEDY))
    assert one(sampler, ramp() - torch.nn.functional.one_hot(torch.tensor(EOS), V) * 0.15, 0) == EOS
    assert one(make(SamplingParams(ignore_eos=True, **GREEDY)), ramp()) == EOS


def test_bad_words_and_min_tokens_give_way_where_they_leave_nothing():
    assert one(make(SamplingParams(allowed_token_ids=(EOS,), min_tokens=5, **GREEDY)), ramp()) == EOS
    params = SamplingParams(allowed_token_ids=(5, 6), bad_words_ids=((5,), (6,)), seed=3)
    assert one(make(params), ramp()) in (5, 6)


def words(*token_ids: int) -> list[int]:
    found = [0] * 2
    for token_id in token_ids:
        found[token_id // 32] |= 1 << (token_id % 32)
    return [word - 2**32 if word >= 2**31 else word for word in found]


def test_a_bitmask_restricts_each_row_and_meets_the_other_masks():
    sampler = make(SamplingParams(**GREEDY), SamplingParams(bad_words_ids=((31,),), **GREEDY))
    bitmask = torch.tensor([words(3, 31), words(31, 4)], dtype=torch.int32)
    assert sampler.sample(ramp().repeat(2, 1), [0, 1], [0, 0], bitmask).token_ids == [31, 4]


# ---- penalties ----


def test_presence_and_frequency_count_generated_tokens_only():
    # the best token is in the prompt: no effect; generated once: -1; twice: another -0.5
    presence = make(SamplingParams(presence_penalty=1.0, **GREEDY), prompt=(49,))
    assert [one(presence, ramp(), index) for index in range(3)] == [49, 48, 47]
    frequency = make(SamplingParams(frequency_penalty=0.15, **GREEDY), prompt=(49,))
    # 49 falls to 4.75, below 48 at 4.8, which then falls to 4.65
    assert [one(frequency, ramp(), index) for index in range(3)] == [49, 48, 49]


def test_repetition_counts_the_prompt_too_and_pushes_negative_logits_down():
    assert one(make(SamplingParams(repetition_penalty=2.0, **GREEDY), prompt=(49, 48)), ramp()) == 47
    assert one(make(SamplingParams(repetition_penalty=2.0, **GREEDY), prompt=(49,)), ramp() - 10) == 48


def test_bias_is_applied_before_penalties():
    params = SamplingParams(logit_bias={47: 1.0}, repetition_penalty=2.0, allowed_token_ids=(47, 48), **GREEDY)
    logits = ramp()
    logits[0, 48] = 3.1
    logits[0, 47] = 4.4  # (4.4 + 1) / 2 = 2.7 loses against 3.1; 4.4 / 2 + 1 = 3.2 would win
    assert one(make(params, prompt=(47,)), logits) == 48


def test_penalties_equal_a_recount_of_all_tokens_over_a_long_run():
    params = SamplingParams(presence_penalty=0.4, frequency_penalty=0.3, repetition_penalty=1.2, seed=11)
    prompt = [1, 2, 2, 40]
    sampler = make(params, prompt=prompt)
    outputs: list[int] = []
    for step in range(40):
        logits = random_logits(1, seed=step)
        x = logits[0].clone()
        counts = torch.bincount(torch.tensor(outputs, dtype=torch.int64), minlength=V)
        seen = (counts > 0) | (torch.bincount(torch.tensor(prompt), minlength=V) > 0)
        x = torch.where(seen, torch.where(x > 0, x / 1.2, x * 1.2), x) - 0.3 * counts - 0.4 * (counts > 0)
        key = torch.tensor([noise.row_key(11, 0, step)])
        expected = kernels.sample(x.reshape(1, V), temperature=torch.ones(1), keys=key).item()
        outputs.append(one(sampler, logits, step))
        assert outputs[-1] == expected


def test_penalty_slots_are_reused_and_grow_with_demand():
    sampler = Sampler(V, 8, "cpu", [EOS])
    params = SamplingParams(presence_penalty=2.0, **GREEDY)
    for _ in range(3):
        for row in range(8):
            sampler.add_row(row, params, 0, [1], 1)
        rows = list(range(8))
        assert sampler.sample(ramp().repeat(8, 1), rows, [0] * 8).token_ids == [49] * 8
        assert sampler.sample(ramp().repeat(8, 1), rows, [1] * 8).token_ids == [48] * 8
        for row in rows:
            sampler.remove_row(row)
    assert sampler._penalties._output_counts.shape == (8, V)


# ---- speculation ----


def test_choose_counts_nothing_until_commit_and_takes_a_row_at_several_positions():
    sampler = make(SamplingParams(seed=5), SamplingParams(presence_penalty=2.0, **GREEDY))
    logits = random_logits(3)
    path = sampler.choose(logits.clone(), [0, 0, 0], [4, 5, 6]).token_ids
    assert path == [sampler.choose(logits[i : i + 1].clone(), [0], [4 + i]).token_ids[0] for i in range(3)]
    assert [sampler.choose(ramp(), [1], [0]).token_ids[0] for _ in range(2)] == [49, 49]
    sampler.commit([1], [49])
    assert sampler.choose(ramp(), [1], [1]).token_ids == [48]


# ---- log-probabilities ----


def test_logprobs_are_raw_and_only_for_rows_that_ask():
    logits = random_logits(3)
    expected = logits.double().log_softmax(dim=1)
    sampler = make(
        SamplingParams(**GREEDY),
        SamplingParams(seed=1, temperature=0.3, logprobs=2, logit_bias={9: 50.0}, repetition_penalty=2.0),
        SamplingParams(logprobs=0, **GREEDY),
    )
    output = sampler.sample(logits.clone(), [0, 1, 2], [0, 0, 0])
    assert output.token_ids[1] == 9
    assert output.logprobs is not None
    nothing, biased, plain = output.logprobs
    assert nothing is None
    assert biased is not None
    assert biased.token_id == 9
    assert biased.logprob == pytest.approx(expected[1, 9].item(), abs=1e-5)
    assert biased.rank == (logits[1] > logits[1, 9]).sum().item() + 1
    assert biased.top_ids == logits[1].topk(2).indices.tolist()
    assert biased.top_logprobs == pytest.approx(expected[1].topk(2).values.tolist(), abs=1e-5)
    assert plain is not None
    assert (plain.rank, plain.top_ids, plain.top_logprobs) == (1, [], [])


def test_prompt_logprobs_are_those_of_the_tokens_that_follow():
    logits, ids = random_logits(4), torch.tensor([0, 7, 49, 7])
    entries = prompt_logprobs(logits, ids, 3)
    expected = logits.double().log_softmax(dim=1)
    assert [entry.token_id for entry in entries] == ids.tolist()
    assert [entry.logprob for entry in entries] == pytest.approx(
        expected.gather(1, ids.unsqueeze(1)).squeeze(1).tolist(), abs=1e-5
    )
    assert [entry.top_ids for entry in entries] == logits.topk(3).indices.tolist()
    assert prompt_logprobs(logits[:0], ids[:0], 3) == []


# ---- faults ----


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_row_that_is_not_finite_fails_alone_even_where_masks_cover_it(value):
    params = [
        SamplingParams(seed=1, logprobs=1),
        SamplingParams(seed=2, allowed_token_ids=(1, 2), min_tokens=2, logprobs=1),
        SamplingParams(seed=3, logit_bias={20: -100.0}, presence_penalty=1.0),
        SamplingParams(**GREEDY),
    ]
    clean, broken = make(*params), make(*params)
    logits = random_logits(4)
    expected = clean.sample(logits.clone(), [0, 1, 2, 3], [0] * 4)
    logits[:3, 20] = value
    output = broken.sample(logits, [0, 1, 2, 3], [0] * 4)
    assert output.token_ids == [-1, -1, -1, expected.token_ids[3]]
    assert output.errors == ["numerical_error"] * 3 + [None]
    assert output.logprobs == [None] * 4


def test_masks_that_leave_nothing_are_told_from_broken_logits():
    nothing = torch.zeros(1, 2, dtype=torch.int32)
    assert make(SamplingParams(**GREEDY)).sample(ramp(), [0], [0], nothing).errors == ["invalid_value"]
    everything_low = torch.full((1, V), -math.inf)
    assert make(SamplingParams(**GREEDY)).sample(everything_low, [0], [0]).errors == ["numerical_error"]


def test_a_failed_row_is_not_counted():
    sampler = make(SamplingParams(presence_penalty=1.0, bad_words_ids=((1, 2),), **GREEDY))
    broken = ramp()
    broken[0, 0] = math.nan
    assert sampler.sample(broken, [0], [0]).token_ids == [-1]
    assert one(sampler, ramp(), 0) == EOS
