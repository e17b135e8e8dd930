"""The promise of speculation: the same tokens with it and without, whoever guesses and whatever else happens."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch

from engine.core import EngineCore
from engine.models import load_model
from engine.models.batch import ForwardBatch, KVCache, Model
from engine.scheduling.invariants import check_invariants
from engine.scheduling.plan import StepPlan, StepResult
from engine.speculation.base import Taps
from engine.speculation.tree import DraftTree
from engine.types import EngineRequest
from tests.e2e.driving import BLOCK_SIZE, Answer, core_for, request, run, tokens
from tests.speculation import hostile
from tests.speculation.hostile import Guess, Scripted, equip, speculating

Answers = dict[tuple[str, int], Answer]

NUM_OUTPUTS = 14
SMALL_POOL = 20
EOS = 2


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=300,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.3,
        eos_token_id=EOS,
        tie_word_embeddings=False,
    )
    path: Path = tmp_path_factory.mktemp("random")
    LlamaForCausalLM(config).save_pretrained(path)
    return load_model(path, device=torch.device("cpu"), dtype="float32", deterministic=True)


def traffic() -> list[EngineRequest]:
    """Every kind of row state, prompts around block borders, some with a shared beginning."""
    generator = random.Random(7)
    shared = [generator.randrange(20, 300) for _ in range(2 * BLOCK_SIZE + 2)]
    styles: list[dict[str, object]] = [
        {},
        {"temperature": 0.8, "seed": 11, "logprobs": 2},
        {"temperature": 1.0, "seed": 5, "top_p": 0.9, "top_k": 40},
        {"repetition_penalty": 1.3, "presence_penalty": 0.5, "frequency_penalty": 0.2, "logprobs": 0},
        {"temperature": 0.7, "seed": 3, "min_p": 0.05, "num_choices": 3},
        {"temperature": 0.9, "seed": 4, "typical_p": 0.9, "logit_bias": {25: 2.0}},
        {"temperature": 1.0, "seed": 6, "bad_words_ids": tuple((i, j) for i in range(40) for j in range(9))},
        {
            "temperature": 1.2,
            "seed": 9,
            "stop_token_ids": tuple(range(0, 300, 7)),
            "min_tokens": 7,
            "prompt_logprobs": 1,
        },
        {"temperature": 1.5, "seed": 8, "ignore_eos": False, "max_tokens": 40},
    ]
    lengths = (1, BLOCK_SIZE - 1, BLOCK_SIZE, BLOCK_SIZE + 1, 2 * BLOCK_SIZE + 3, 5, 2 * BLOCK_SIZE, 3, 9)
    requests = []
    for i, (length, style) in enumerate(zip(lengths, styles, strict=True)):
        own = [generator.randrange(20, 300) for _ in range(length)]
        prompt = shared + own if i % 2 == 0 else own
        requests.append(request(f"r{i}", prompt, **{"max_tokens": NUM_OUTPUTS, **style}))
    return requests


@pytest.fixture(scope="module")
def expected(model: Model) -> Answers:
    return run(core_for(model), traffic())


def assert_same(got: Answers, expected: Answers) -> None:
    assert tokens(got) == tokens(expected)
    for key, answer in got.items():
        assert answer.finish_reason == expected[key].finish_reason
        assert answer.logprobs == expected[key].logprobs


def guesses(expected: Answers) -> dict[str, Guess]:
    truth = tokens(expected)
    return {
        "nothing": hostile.nothing,
        "random_chain": hostile.random_chain(300),
        "random_tree": hostile.random_tree(300),
        "too_deep": hostile.too_deep,
        "with_ends": hostile.with_ends(EOS),
        "unknown_tokens": hostile.unknown_tokens,
        "twins": hostile.twins,
        "raising": hostile.raising,
        "oracle": hostile.oracle(truth),
        "oracle_tree": hostile.oracle(truth, num_wrong=3),
    }


NAMES = (
    *("nothing", "random_chain", "random_tree", "too_deep", "with_ends"),
    *("unknown_tokens", "twins", "raising", "oracle", "oracle_tree"),
)


@pytest.mark.parametrize("name", NAMES)
def test_no_drafter_changes_an_output(model: Model, expected: Answers, name: str) -> None:
    drafter = Scripted(guesses(expected)[name])
    core = equip(core_for(model), drafter)
    assert_same(run(core, speculating(traffic())), expected)
    check_invariants(core.scheduler)
    assert_nothing_is_left(core, drafter)
    if name.startswith("oracle"):
        num_tokens = sum(len(answer.token_ids) for answer in expected.values())
        assert drafter.num_accepted > num_tokens // 2, "right guesses save steps"


@pytest.mark.parametrize(
    ("budget", "num_blocks"), [(3, 256), (BLOCK_SIZE + 1, 256), (20, SMALL_POOL), (512, SMALL_POOL)]
)
@pytest.mark.parametrize("max_nodes", [1, 5, 40])
def test_chunks_preemption_and_prefix_hits_change_nothing(
    model: Model, expected: Answers, budget: int, num_blocks: int, max_nodes: int
) -> None:
    drafter = Scripted(hostile.oracle(tokens(expected), num_wrong=2))
    core = equip(core_for(model, budget=budget, num_blocks=num_blocks), drafter)
    got = run(core, speculating(traffic(), max_nodes), stagger=0 if num_blocks == SMALL_POOL else 2)
    assert_same(got, expected)
    assert_nothing_is_left(core, drafter)
    if num_blocks == SMALL_POOL and budget == 512:
        assert sum(answer.num_preemptions for answer in got.values()) > 0, "the pool was meant to be too small"
    again = run(core, speculating(traffic(), max_nodes))  # now the prefix cache has their beginnings
    assert_same(again, expected)
    assert num_blocks == SMALL_POOL or sum(answer.num_cached_tokens for answer in again.values()) > 0


def test_drafts_never_preempt_and_never_lack_blocks_themselves(model: Model, expected: Answers) -> None:
    """With as many blocks as the plain run holds at its peak, nobody gives way because somebody guessed."""
    plain = core_for(model, num_blocks=64)
    run(plain, traffic())
    drafter = Scripted(hostile.random_tree(300))
    core = equip(core_for(model, num_blocks=64), drafter)
    run(core, speculating(traffic(), 64))
    assert core.scheduler.stats().num_preemptions == plain.scheduler.stats().num_preemptions == 0


def test_accepted_tokens_leave_the_cache_as_plain_decoding_does(model: Model) -> None:
    """Keys and values of a text whose tree paths had to be moved equal those of the same text without a draft."""
    one = request("a", [20 + i for i in range(BLOCK_SIZE + 3)], max_tokens=30)
    plain = core_for(model, num_blocks=32)
    expected = run(plain, [one])
    drafter = Scripted(hostile.oracle(tokens(expected), num_wrong=3))
    core = equip(core_for(model, num_blocks=32), drafter)
    run(core, speculating([one], 16))
    assert drafter.num_accepted > 15
    num_tokens = BLOCK_SIZE + 3 + 29
    for mine, theirs in zip(cached(core, num_tokens), cached(plain, num_tokens), strict=True):
        assert torch.equal(mine, theirs)


def cached(core: EngineCore, num_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values of row 0's tokens, [L, H_kv, n, D]."""
    table = core.runner._rows.block_ids(0)[: -(-num_tokens // BLOCK_SIZE)].tolist()
    pools = core.runner.cache.k, core.runner.cache.v
    k, v = (pool[table].permute(1, 2, 0, 3, 4).flatten(2, 3)[:, :, :num_tokens] for pool in pools)
    return k, v


@pytest.mark.parametrize("num_nodes", [1, 2, 7, 33, 64])
def test_every_node_of_a_tree_is_computed_as_if_its_path_were_the_text(model: Model, num_nodes: int) -> None:
    """Hidden states of a random tree's rows have the bits of the same path as a chain."""
    one = request("a", [20 + i for i in range(BLOCK_SIZE + 3)], max_tokens=70)
    generator = random.Random(num_nodes)
    tree = hostile.tree_of([generator.randrange(300) for _ in range(num_nodes)], generator)
    rows = hidden_rows(model, one, tree)
    for node in sorted({0, len(tree) // 2, len(tree) - 1}):
        path = tree.path(node)
        chain = hidden_rows(model, one, DraftTree.chain([tree.tokens[i] for i in path], source=hostile.NAME))
        assert np.array_equal(rows[0], chain[0])
        for place, i in enumerate(path, start=1):
            assert np.array_equal(rows[i + 1], chain[place])


def hidden_rows(model: Model, one: EngineRequest, tree: DraftTree) -> np.ndarray:
    """[1 + nodes, C]: what the model makes of the first draft, the root first."""
    drafter = Scripted(lambda view, cap, generator: tree, Taps(hidden_last=True))
    core = equip(core_for(model), drafter)
    core.add(speculating([one], 64)[0])
    while not any(checked.tokens for checked, _ in drafter.taps):
        core.step()
    checked, taps = next((checked, taps) for checked, taps in drafter.taps if checked.tokens)
    assert checked.tokens == tree.tokens
    assert taps.hidden is not None
    return taps.hidden


def test_steps_that_fail_and_are_run_again_in_parts_change_nothing(
    model: Model, expected: Answers, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = model.forward

    def only_one_row(batch: ForwardBatch, cache: KVCache) -> torch.Tensor:
        if len(batch.seq_lens) > 1:
            raise RuntimeError("more than one row at a time is too much")
        return forward(batch, cache)

    monkeypatch.setattr(model, "forward", only_one_row)
    drafter = Scripted(hostile.oracle(tokens(expected), num_wrong=2))
    core = equip(core_for(model, num_blocks=SMALL_POOL), drafter)
    assert_same(run(core, speculating(traffic())), expected)
    assert_nothing_is_left(core, drafter)


def test_aborted_and_preempted_requests_leave_nothing_with_drafters(model: Model, expected: Answers) -> None:
    drafter = Scripted(hostile.random_tree(300))
    core = equip(core_for(model, num_blocks=SMALL_POOL), drafter)
    generator = random.Random(3)
    for turn in range(12):
        for i, one in enumerate(speculating(traffic())):
            core.add(msgspec.structs.replace(one, request_id=f"t{turn}-{i}"))
        for _ in range(generator.randrange(1, 9)):
            core.step()
        for i in range(9):
            if generator.random() < 0.7:
                core.abort(f"t{turn}-{i}")
        check_invariants(core.scheduler)
        while core.has_work:
            core.step()
    assert_nothing_is_left(core, drafter)


def test_every_drafter_that_can_be_asked_for_changes_nothing(model: Model, expected: Answers) -> None:
    for name in core_for(model).scheduler._speculation.offered:
        core = core_for(model)
        requests = [
            msgspec.structs.replace(one, speculative={"drafters": [name], "max_nodes": 12}) for one in traffic()
        ]
        assert_same(run(core, requests), expected)
        assert core.speculation.num_known == 0


def test_taps_show_the_targets_best_tokens_at_every_node(model: Model, expected: Answers) -> None:
    drafter = Scripted(hostile.oracle(tokens(expected), num_wrong=2), Taps(topk=3, hidden_last=True))
    run(equip(core_for(model), drafter), speculating([traffic()[0]]))
    greedy = expected["r0", 0].token_ids
    place = 1
    assert drafter.taps
    for tree, taps in drafter.taps[1:]:  # the first token came from the prompt
        assert taps.topk_ids.shape == (1 + len(tree), 3)
        assert taps.hidden.shape[0] == 1 + len(tree)
        assert taps.topk_ids[0, 0] == greedy[place], "greedy choices are the best token of their row"
        place += 1
        node = -1
        while (node := tree.child(node, greedy[place - 1])) >= 0:
            assert taps.topk_ids[node + 1, 0] == greedy[place]
            place += 1


class Listener(Scripted):
    """Counts what it is told, and keeps what it knew at the end."""

    def __init__(self, needs: Taps | None = None) -> None:
        super().__init__(hostile.random_tree(300), needs)
        self.num_told = 0
        self.outputs: list[list[int]] = []

    def on_commit(self, key: str, *args: Any) -> None:
        self.num_told += 1
        super().on_commit(key, *args)

    def drop(self, key: str) -> None:
        self.outputs.append(list(self.known[key]))
        super().drop(key)


def test_drafters_that_rest_cost_nothing(model: Model, expected: Answers) -> None:
    """Where the load leaves no room for guesses, drafters do not even hear of a request."""
    drafter = Listener(Taps(topk=3))
    core = equip(core_for(model), drafter, max_rows=0)
    asked = [one for one in traffic() if one.num_choices == 1][:5]
    tapped = Counter[int]()
    execute = core.runner.execute

    def counted(plan: StepPlan) -> StepResult:
        tapped.update(chunk.row for chunk in plan.chunks if chunk.taps is not None)
        return execute(plan)

    core.runner.execute = counted  # type: ignore[method-assign]
    answers = run(core, speculating(asked))
    assert_same(answers, {key: answer for key, answer in expected.items() if key in answers})
    assert drafter.num_told == 0
    assert drafter.outputs == []
    assert max(tapped.values(), default=0) <= 1, "no step is taken off the plain path for who does not guess"
    assert_nothing_is_left(core, drafter)


def test_the_output_tells_what_speculation_did(model: Model, expected: Answers) -> None:
    core = equip(core_for(model), Scripted(hostile.oracle(tokens(expected))))
    core.add(speculating([traffic()[0]])[0])
    last = None
    while core.has_work:
        for output in core.step():
            last = output.speculative
    assert last is not None
    assert last.steps == 2  # the first token comes from the prompt; then 8 guesses and one more, then 4 and the last
    assert last.accepted == last.drafted == NUM_OUTPUTS - 1 - 2
    assert last.by_source == {hostile.NAME: (last.drafted, last.accepted)}
    stats = core.stats()
    assert (stats.spec_steps, stats.spec_emitted) == (2, NUM_OUTPUTS - 1)
    assert stats.spec_drafted == stats.spec_accepted == {hostile.NAME: last.drafted}
    assert stats.spec_reached_at_depth[0] == stats.spec_accepted_at_depth[0] == 2


def assert_nothing_is_left(core: EngineCore, drafter: Scripted) -> None:
    counts = core.scheduler.cache.pool.counts
    assert counts.active == 0
    assert core.speculation is not None
    assert core.speculation.num_known == 0
    assert drafter.known == {}
