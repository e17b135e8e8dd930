"""What every training-free drafter owes: sound trees within the caps for any text, nothing shared between tenants,
nothing kept of requests that are over, and the same guesses from the same tokens."""

from __future__ import annotations

import gc
import subprocess
import sys
import tracemalloc
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.errors import ConfigError
from engine.speculation.base import Drafter
from engine.speculation.catalogue import drafters
from engine.speculation.token_recycling import HIGHEST_TOKEN
from engine.speculation.tree import EMPTY, DraftTree
from tests.speculation.drafting import candidates, guess, view

NAMES = ("ngram", "suffix", "token_recycling", "lookahead", "aded", "goose")
LEARNING = ("suffix", "token_recycling", "lookahead", "aded", "goose")
every = pytest.mark.parametrize("name", NAMES)

TEXT = st.lists(st.integers(0, 4), min_size=1, max_size=30)


def run(drafter: Drafter, text: list[int], num_prompt_tokens: int, seed: int, *, tenant: str = "") -> list[DraftTree]:
    """The drafts of a request whose every token is known; random steps, candidates and merged-in nodes."""
    random = Random(seed)
    key, found = f"{tenant}/{seed}", []
    done = max(1, num_prompt_tokens)
    drafter.admit(key, text[:done], tenant)
    while done < len(text):
        cap, depth = random.randrange(20), random.randrange(8)
        (tree,) = drafter.propose(
            [view(text[:done], num_prompt_tokens, key=key, tenant=tenant, max_depth=depth)], [cap]
        )
        assert tree.problem() is None
        assert len(tree) <= cap
        assert max(tree.depths, default=0) <= depth
        assert set(tree.sources) <= {drafter.name}
        found.append(tree)
        new_tokens = text[done : done + random.randint(1, 3)]
        rows = [[random.randrange(5) for _ in range(8)] for _ in range(len(tree) + 1)]
        drafter.on_commit(key, tree, (), new_tokens, candidates(rows))
        done += len(new_tokens)
    return found


@every
@settings(deadline=None, max_examples=25)
@given(text=TEXT, share=st.floats(0, 1), seed=st.integers(0, 99))
def test_trees_are_sound_bounded_and_the_same_again(name: str, text: list[int], share: float, seed: int) -> None:
    num_prompt_tokens = int(share * len(text))
    first = run(drafters.create(name), text, num_prompt_tokens, seed)
    assert run(drafters.create(name), text, num_prompt_tokens, seed) == first


@every
def test_tokens_of_one_tenant_are_never_drafted_for_another(name: str) -> None:
    drafter, random = drafters.create(name), Random(7)
    drafted: dict[str, set[int]] = {"a": set(), "b": set()}
    for number in range(6):
        for tenant, low in (("a", 0), ("b", 100)):
            # half of the text are tokens that both have, so that there is something to find
            text = [random.choice([low, low + 1, 50, 51, 52, 53]) for _ in range(60)]
            done = 30
            drafter.admit(f"{tenant}{number}", text[:done], tenant)
            while done < len(text):
                tree = guess(drafter, text[:done], num_prompt_tokens=30, key=f"{tenant}{number}", tenant=tenant)
                drafted[tenant].update(tree.tokens)
                rows = candidates([[low, 50, low + 1]] * (len(tree) + 1))
                drafter.on_commit(f"{tenant}{number}", tree, (), text[done : done + 2], rows)
                done += 2
            drafter.drop(f"{tenant}{number}")
    assert drafted["a"] & {0, 1}, "the test must see drafts at all"
    assert not drafted["a"] & {100, 101}
    assert not drafted["b"] & {0, 1}


@every
def test_nothing_is_kept_of_requests_that_are_over(name: str) -> None:
    drafter, random = drafters.create(name), Random(5)
    for number in range(20):
        run(drafter, [random.randrange(5) for _ in range(40)], 10, number, tenant=f"t{number % 3}")
    learnt_and_held = drafter.state_bytes
    assert learnt_and_held > 0
    for number in range(20):
        drafter.drop(f"t{number % 3}/{number}")
    assert not drafter._requests
    if name in LEARNING:
        for number in range(3):
            drafter.forget(f"t{number}")
    assert drafter.state_bytes == 0


@pytest.mark.parametrize(("name", "options"), [("ngram", {}), ("suffix", {"shared_mib": 0})])
@settings(deadline=None, max_examples=25)
@given(text=TEXT, split=st.integers(0, 30))
def test_state_is_rebuilt_from_the_tokens_alone(name: str, options: dict, text: list[int], split: int) -> None:
    followed = drafters.create(name, **options)
    for end in range(max(1, min(split, len(text))), len(text) + 1):
        tree = guess(followed, text[:end], num_prompt_tokens=1)
    assert guess(drafters.create(name, **options), text, num_prompt_tokens=1) == tree
    # the request lost its newest tokens, as no drafter expects
    assert guess(followed, text[:1]) == guess(drafters.create(name, **options), text[:1])


@every
def test_state_bytes_are_what_is_really_held(name: str) -> None:
    random = Random(0)
    phrases = [[random.randrange(300, 4000) for _ in range(4)] for _ in range(200)]
    texts = [[token for _ in range(100) for token in random.choice(phrases)] for _ in range(2)]
    gc.collect()
    tracemalloc.start()
    try:
        drafter = drafters.create(name)
        before, _ = tracemalloc.get_traced_memory()
        for number, text in enumerate(texts):
            for end in range(300, 400, 2):
                tree = guess(drafter, text[:end], num_prompt_tokens=300, key=str(number))
                rows = [[random.randrange(4000) for _ in range(8)] for _ in range(len(tree) + 1)]
                drafter.on_commit(str(number), tree, (), text[end : end + 2], candidates(rows))
        del tree, rows
        gc.collect()
        held = tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()
    assert held / 1.6 <= drafter.state_bytes <= held * 1.6


@every
def test_a_child_guesses_like_a_request_of_its_own(name: str) -> None:
    prompt = [1, 2, 3, 4, 1, 2, 3, 5, 1, 2]
    forked, fresh = drafters.create(name), drafters.create(name)
    forked.admit("parent", prompt, "")
    forked.fork("parent", "child")
    assert guess(forked, [*prompt, 3], num_prompt_tokens=len(prompt), key="child") == guess(
        fresh, [*prompt, 3], num_prompt_tokens=len(prompt)
    )


@every
@pytest.mark.parametrize(
    "text",
    [
        [],
        [0],
        [0] * 300,
        [HIGHEST_TOKEN] * 5,
        [HIGHEST_TOKEN, 0] * 50,
        [1 << 40, 7, 1 << 40, 7],
        [i % 17 for i in range(2000)],
    ],
    ids=["empty", "one token", "one token often", "highest token", "both ends", "beyond 32 bits", "periodic"],
)
def test_hostile_texts_yield_sound_trees(name: str, text: list[int]) -> None:
    drafter = drafters.create(name)
    drafter.admit("request", text, "")
    for cap in (0, 1, 5, 1000):
        assert guess(drafter, text, cap=cap, max_depth=12).problem() is None
        assert len(guess(drafter, text, cap=cap, max_depth=12)) <= cap
        assert guess(drafter, text, cap=cap, max_depth=0) == EMPTY
    drafter.on_commit("request", EMPTY, (), (), candidates([[1, 2]]))
    drafter.on_commit("unknown", EMPTY, (), (3,), candidates([[1, 2]]))
    drafter.drop("unknown")
    drafter.drop("request")


@every
def test_wrong_options_are_refused_by_name(name: str) -> None:
    with pytest.raises(ConfigError, match=f"drafter {name}: .*no_such_option"):
        drafters.create(name, no_such_option=1)
    options = drafters.create(name).options
    for field in type(options).__dataclass_fields__:
        for wrong in (-1000, "4", True, None, float("inf")):
            with pytest.raises(ConfigError):
                drafters.create(name, **{field: wrong})


def test_drafters_load_without_torch() -> None:
    code = "import sys; import engine.speculation.catalogue; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
