"""The bundled draft model behind the drafters: its paged passes say what the model says on its own."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import kernels
from engine.execution.draft_model import DraftLanguageModel
from engine.mimir import model_path
from engine.models import load_model
from engine.models.batch import Model
from engine.speculation import draft_model, dyspec, multi_draft, rsd, sequoia, spectr
from engine.speculation.base import NO_TAPS, RequestView, drafters
from engine.speculation.draft_cache import DraftCache
from engine.speculation.draft_rows import Draw, RowPass
from engine.speculation.model_drafter import ModelDrafter
from engine.speculation.verifiers import KeyedChance, verify
from tests.e2e.driving import core_for, request, run
from tests.speculation.toys import context_of

MODULES = (draft_model, dyspec, multi_draft, rsd, sequoia, spectr)  # imported: they register themselves
NUM_BLOCKS = 96


@pytest.fixture(scope="module")
def model() -> Model:
    return load_model(model_path("mimir-draft"))


@pytest.fixture(scope="module")
def prompts(model: Model) -> list[list[int]]:
    rng = np.random.default_rng(3)
    return [rng.integers(10, model.vocab_size, size=size).tolist() for size in (5, 17, 40, 8)]


def attached(name: str, model: Model, **options: float) -> tuple[ModelDrafter, DraftLanguageModel, DraftCache]:
    runner = DraftLanguageModel(model, num_blocks=NUM_BLOCKS, block_size=8, logits_size=4096, max_pass_tokens=32)
    cache = DraftCache(NUM_BLOCKS, 8)
    drafter = drafters.create(name, **options)
    assert isinstance(drafter, ModelDrafter)
    drafter.attach(runner, cache)
    return drafter, runner, cache


def test_greedy_chains_are_what_a_server_of_the_draft_model_generates(model: Model, prompts: list[list[int]]) -> None:
    """Ragged prompts in one batch, long ones in several passes, caps of their own; three drafts accepted whole."""
    core = core_for(model)
    answers = run(core, [request(f"r{i}", prompt, max_tokens=24) for i, prompt in enumerate(prompts)])
    drafter, _, cache = attached("draft_model", model, min_value=0.0)
    texts = [list(prompt) for prompt in prompts]
    for _ in range(3):
        views = [RequestView(f"r{i}", text, 4) for i, text in enumerate(texts)]
        trees = drafter.propose(views, [6, 3, 1, 5])
        for i, (text, tree) in enumerate(zip(texts, trees, strict=True)):
            done = len(text) - len(prompts[i])
            assert list(tree.tokens) == answers[f"r{i}", 0].token_ids[done : done + len(tree)]
            assert len(tree) == [6, 3, 1, 5][i]
            bonus = answers[f"r{i}", 0].token_ids[done + len(tree)]
            new = [*tree.tokens, bonus]
            drafter.on_commit(f"r{i}", tree, tuple(range(len(tree))), new, NO_TAPS)
            text += new
    for i in range(len(prompts)):
        drafter.drop(f"r{i}")
    assert cache.pool.counts.free == NUM_BLOCKS - 1


@pytest.mark.parametrize("name", ["draft_model", "dyspec", "rsd_c", "rsd_s", "sequoia", "spectr", "multi_draft"])
def test_rows_of_q_after_partial_acceptances_are_those_of_a_full_recomputation(
    name: str, model: Model, prompts: list[list[int]]
) -> None:
    drafter, _, cache = attached(name, model)
    alone = DraftLanguageModel(model, num_blocks=NUM_BLOCKS, block_size=8, logits_size=4096)
    rng = np.random.default_rng(5)
    text = list(prompts[1])
    for _ in range(4):
        view = RequestView("a", text, 4, temperature=0.8, samples=True, seed=11)
        (tree,) = drafter.propose([view], [8])
        assert tree.q is not None
        for parent in set(tree.parents):
            context = [*text, *context_of(tree, parent)]
            logits = alone.compute([RowPass(context, 0, list(range(1, NUM_BLOCKS)))])
            law = alone.laws(logits, [Draw(0, 0.8, None)])[0]
            assert np.abs(tree.q[parent + 1] - law).max() < 1e-5
        path = tree.path(int(rng.integers(-1, len(tree))))
        new = [*(tree.tokens[node] for node in path), int(rng.integers(10, 4000))]
        drafter.on_commit("a", tree, path, new, NO_TAPS)
        text += new
    drafter.drop("a")
    assert cache.pool.counts.free == NUM_BLOCKS - 1
    assert cache.pool.violations() == []


@pytest.mark.parametrize("name", ["draft_model", "rsd_c", "rsd_s", "dyspec", "spectr", "multi_draft"])
def test_a_draft_of_the_target_itself_is_accepted_to_the_end(name: str, model: Model, prompts: list[list[int]]) -> None:
    """Also across forgetting: catches every cache that is one token behind."""
    drafter, _, _ = attached(name, model)
    alone = DraftLanguageModel(model, num_blocks=NUM_BLOCKS, block_size=8, logits_size=4096)
    text = list(prompts[0])
    for step in range(5):
        view = RequestView("a", text, 4, temperature=0.9, samples=True, seed=step)
        (tree,) = drafter.propose([view], [8])

        def p(node: int) -> np.ndarray:
            context = [*text, *context_of(tree, node)]  # noqa: B023 used in this turn of the loop
            return alone.laws(alone.compute([RowPass(context, 0, list(range(1, NUM_BLOCKS)))]), [Draw(0, 0.9, None)])[0]

        verdict = verify(drafter.verifier, tree, p, KeyedChance(step, 0, len(text)))
        leaf = verdict.path[-1]
        assert leaf not in tree.parents
        new = [*(tree.tokens[node] for node in verdict.path), verdict.token]
        drafter.on_commit("a", tree, verdict.path, new, NO_TAPS)
        text += new
        if step == 2:
            drafter.drop("a")


def test_drafts_for_the_walk_are_what_the_sampler_would_choose(model: Model, prompts: list[list[int]]) -> None:
    """The server's own noise: seeded requests of a target like the drafter accept everything."""
    core = core_for(model)
    asked = request("r", prompts[1], max_tokens=7, temperature=0.9, seed=123)
    expected = run(core, [asked])["r", 0].token_ids
    drafter, _, _ = attached("draft_model", model, min_value=0.0)
    view = RequestView("r", prompts[1], len(prompts[1]), temperature=0.9, seed=123)
    (tree,) = drafter.propose([view], [6])
    assert list(tree.tokens) == expected[:6]


def test_chains_of_different_lengths_end_where_they_should(model: Model, prompts: list[list[int]]) -> None:
    """One stops at the model's last position while the others go on; all as if each were alone."""
    drafter, runner, _ = attached("draft_model", model, min_value=0.0, max_depth=9)
    runner.max_len = len(prompts[2]) + 2
    views = [RequestView(f"r{i}", prompt, 4, temperature=0.5 * i, seed=i) for i, prompt in enumerate(prompts)]
    together = drafter.propose(views, [9, 4, 9, 1])
    assert [len(tree) for tree in together] == [9, 4, 2, 1]
    for view, tree in zip(views, together, strict=True):
        alone, runner, _ = attached("draft_model", model, min_value=0.0, max_depth=9)
        runner.max_len = len(prompts[2]) + 2
        (own,) = alone.propose([view], [len(tree)])
        assert own.tokens == tree.tokens
        assert own.values == pytest.approx(tree.values, rel=1e-4)


def test_columns_that_only_one_of_the_models_has_are_cut_or_get_no_mass(model: Model) -> None:
    for size in (1000, 5000):
        runner = DraftLanguageModel(model, num_blocks=8, block_size=8, logits_size=size)
        logits = runner.compute([RowPass([10, 11, 12], 0, [1])])
        law = runner.laws(logits, [Draw(0, 1.0, None)])
        assert law.shape == (1, size)
        assert law.sum() == pytest.approx(1.0, abs=1e-4)
        assert runner.pick(logits, [Draw(0, 1.0, 5)], 4)[0].token_ids.max() < min(size, 4096)


def test_draws_of_one_row_with_different_keys_are_independent_and_follow_q(model: Model) -> None:
    runner = DraftLanguageModel(model, num_blocks=8, block_size=8, logits_size=4096)
    logits = runner.compute([RowPass([10, 11, 12], 0, [1])])
    law = runner.laws(logits, [Draw(0, 0.7, None)])[0]
    picks = runner.pick(logits, [Draw(0, 0.7, key) for key in range(1_000)], 2)
    best = int(law.argmax())
    share = np.mean([pick.token_ids[0] == best for pick in picks])
    assert share == pytest.approx(law[best], abs=4 * float(np.sqrt(law[best] / 1_000)))
    assert all(pick.token_ids[0] != pick.token_ids[1] for pick in picks)
    assert torch.equal(kernels.greedy(logits), torch.tensor([best]))
