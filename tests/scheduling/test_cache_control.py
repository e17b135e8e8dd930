"""Operators' actions on the prefix cache: pins hold under pressure and end, clearing clears, misses have a reason."""

from __future__ import annotations

from typing import Any

import pytest

from engine.control import Controls
from engine.errors import InvalidParameter, UnsupportedParameter
from tests.scheduling.harness import Harness

PREFIX = list(range(10, 22))  # three blocks of four


class Operated(Harness):
    """A harness with an operator."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"num_blocks": 24, "max_pinned_blocks": 6, **options})
        self.controls = Controls()
        self.scheduler.cache_control.offer(self.controls)

    def call(self, name: str, **payload: Any) -> dict[str, Any]:
        return self.controls.call(f"cache_{name}", payload)

    def answer(self, prompt: list[int], **options: Any) -> Any:
        """Runs one request alone. Returns its first output."""
        request_id = self.add(prompt, max_tokens=1, **options)
        self.run()
        return self.streams[request_id, 0].outputs[0]

    def squeeze(self) -> None:
        """Traffic that would push everything idle out of the pool."""
        for start in range(1000, 1200, 40):
            self.answer(list(range(start, start + 40)))


def test_a_pinned_prefix_survives_pressure_and_an_unpinned_one_does_not() -> None:
    for is_pinned in (True, False):
        harness = Operated()
        harness.answer([*PREFIX, 1])
        if is_pinned:
            answer = harness.call("pin", token_ids=PREFIX)
            assert (answer["pinned_blocks"], answer["prefix_blocks"]) == (3, 3)
        harness.squeeze()
        output = harness.answer([*PREFIX, 1])
        assert output.num_cached_tokens == (12 if is_pinned else 0)
        assert output.cache_miss == (None if is_pinned else "evicted")
        assert harness.call("stats")["blocks"]["pinned"] == (3 if is_pinned else 0)


def test_unpinning_and_the_end_of_the_time_give_the_blocks_back() -> None:
    harness = Operated()
    harness.answer([*PREFIX, 1])
    pin = harness.call("pin", token_ids=PREFIX)
    assert harness.call("unpin", pin_id=pin["pin_id"]) == {"unpinned_blocks": 3}
    with pytest.raises(InvalidParameter, match="no such pin"):
        harness.call("unpin", pin_id=pin["pin_id"])
    harness.call("pin", token_ids=PREFIX, ttl_s=10.0)
    assert harness.call("stats")["pins"][0]["expires_in_s"] == 10.0
    harness.now = 10.0
    harness.squeeze()  # steps take expired pins off without being asked
    assert harness.answer([*PREFIX, 1]).num_cached_tokens == 0
    assert harness.call("stats")["pins"] == []


def test_pins_are_bounded_and_what_is_not_cached_is_not_pinned() -> None:
    harness = Operated(max_pinned_blocks=2)
    assert harness.call("pin", token_ids=PREFIX) == {"pin_id": None, "pinned_blocks": 0, "prefix_blocks": 3}
    harness.answer([*PREFIX, 1])
    with pytest.raises(InvalidParameter, match="pins may hold 2"):
        harness.call("pin", token_ids=PREFIX)
    assert harness.call("stats")["blocks"]["pinned"] == 0


def test_clearing_a_prefix_takes_what_begins_with_it_and_nothing_else() -> None:
    harness = Operated(max_pinned_blocks=8)
    harness.answer([*PREFIX, 1, 1, 1, 1, 9])
    harness.answer([*PREFIX[:8], 2, 2, 2, 2, 9])
    harness.call("pin", token_ids=PREFIX)
    assert harness.call("clear", token_ids=PREFIX) == {"cleared_blocks": 2}
    assert harness.call("stats")["pins"] == []
    assert harness.answer([*PREFIX, 1]).num_cached_tokens == 8
    assert harness.answer([*PREFIX[:8], 2, 2, 2, 2, 9]).num_cached_tokens == 12
    assert harness.call("clear", token_ids=[5] * 8) == {"cleared_blocks": 0}


def test_clearing_a_tenant_or_one_of_its_salts_leaves_the_others() -> None:
    harness = Operated()
    owners: list[dict[str, str]] = [{"tenant": "a"}, {"tenant": "a", "cache_salt": "s"}, {"tenant": "b"}]
    for owner in owners:
        harness.answer([*PREFIX, 1], **owner)
    assert harness.call("clear", tenant="a", cache_salt="s") == {"cleared_blocks": 3}
    assert [harness.answer([*PREFIX, 1], **owner).num_cached_tokens for owner in owners] == [12, 0, 12]
    harness.call("clear", tenant="a")
    assert [harness.answer([*PREFIX, 1], **owner).num_cached_tokens for owner in owners] == [0, 0, 12]
    assert harness.call("reset")["cleared_blocks"] > 0
    assert harness.call("stats")["resets"] == 1
    assert harness.answer([*PREFIX, 1], tenant="b").num_cached_tokens == 0


def test_every_miss_has_its_reason_and_a_whole_hit_has_none() -> None:
    harness = Operated()
    miss = [harness.answer([*PREFIX, 1]).cache_miss]
    miss.append(harness.answer([*PREFIX, 1]).cache_miss)
    miss.append(harness.answer([1, 2]).cache_miss)
    miss.append(harness.answer([*PREFIX, 1], cache_salt="other").cache_miss)
    miss.append(harness.answer([*PREFIX, 1], prompt_logprobs=0).cache_miss)
    miss.append(harness.answer([*PREFIX, 1], tenant="another").cache_miss)
    assert miss == ["cold", None, "too_short", "salt", "whole_prompt", "cold"]
    harness.call("clear", tenant="")
    assert harness.answer([*PREFIX, 1]).cache_miss == "evicted"
    counts = harness.call("stats")["misses"]
    assert {reason: count for reason, count in counts.items() if count} == {
        "cold": 2,
        "too_short": 1,
        "whole_prompt": 1,
        "salt": 1,
        "evicted": 1,
    }


def test_without_a_prefix_cache_the_actions_say_so() -> None:
    harness = Operated(prefix_cache=False)
    assert harness.answer([*PREFIX, 1]).cache_miss == "disabled"
    with pytest.raises(UnsupportedParameter, match="prefix cache is off"):
        harness.call("stats")
