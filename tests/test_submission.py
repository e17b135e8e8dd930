"""Around a request's way to the core: room in the queue, codes that cross the border, ordered faults."""

from __future__ import annotations

import pytest

from engine import errors
from engine.client_admission import Admission
from engine.config import SchedulerConfig
from engine.error_codes import to_exception
from engine.errors import ConfigError, QueueFull
from engine.faults import Faults, InjectedFault
from engine.types import EngineStats


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_the_queue_counts_what_the_core_has_not_reported_yet() -> None:
    admission = Admission(SchedulerConfig(max_num_seqs=2, max_waiting_requests=3, max_waiting_pools=1.0), Clock())
    for _ in range(5):
        admission.check_queue(10, pool_tokens=1000)
        admission.sent(1, 10)
    with pytest.raises(QueueFull, match="5 requests wait"):
        admission.check_queue(10, pool_tokens=1000)
    admission.report(EngineStats(num_running=2, num_waiting=2, waiting_tokens=20), num_received=4)
    with pytest.raises(QueueFull, match="3 requests wait"):
        admission.check_queue(10, pool_tokens=1000)
    admission.report(EngineStats(num_running=2, num_waiting=2, waiting_tokens=20), num_received=5)
    admission.check_queue(10, pool_tokens=1000)
    with pytest.raises(QueueFull, match="20 prompt tokens wait and this request has 90"):
        admission.check_queue(90, pool_tokens=100)
    admission.reset()
    admission.check_queue(5000, pool_tokens=100)


def test_the_time_to_come_back_follows_the_rate_at_which_the_queue_moves() -> None:
    clock = Clock()
    admission = Admission(SchedulerConfig(max_num_seqs=1, max_waiting_requests=0), clock)

    def retry_after_s(num_waiting: int) -> int:
        admission.report(EngineStats(num_running=1, num_waiting=num_waiting), 0)
        with pytest.raises(QueueFull) as caught:
            admission.check_queue(1, pool_tokens=1000)
        return caught.value.retry_after_s

    assert retry_after_s(5) == 1, "nothing is known yet"
    for _ in range(20):
        admission.started()
    assert retry_after_s(9) == 5, "two a second, ten to go"
    assert retry_after_s(500) == 30
    clock.now += 60
    assert retry_after_s(1) == 30, "the queue stands still"


def test_every_code_comes_back_as_its_own_class() -> None:
    for name in ("PromptTooLong", "TemplateError", "QueueFull", "NotReady", "EngineDead", "NumericalError"):
        error_type = getattr(errors, name)
        assert type(to_exception(error_type.code)) is error_type
    assert type(to_exception("deadline_exceeded")) is errors.DeadlineExceeded
    assert type(to_exception("server_overloaded")) is errors.CapacityError
    assert isinstance(to_exception("invalid_value", "text"), errors.RequestError)
    full = to_exception("queue_full", "text", retry_after_s=7)
    assert isinstance(full, QueueFull)
    assert (str(full), full.retry_after_s) == ("text", 7)
    unknown = to_exception("something_new")
    assert isinstance(unknown, errors.EngineError)
    assert unknown.code == "something_new"


def test_ordered_faults_fire_as_often_as_ordered() -> None:
    faults = Faults.parse("engine_kill:3:1, tokenizer:label=x:2 ,detok:1.0:1")
    assert [faults.fires("engine_kill", step=step) for step in (1, 2, 3, 4)] == [False, False, True, False]
    assert [faults.fires("tokenizer", label=label) for label in "yxxx"] == [False, True, True, False]
    with pytest.raises(InjectedFault):
        faults.check("detok")
    faults.check("detok")
    for spec in ("nothing:1:1", "detok:1", "detok:x:1", "detok:1:x"):
        with pytest.raises(ConfigError, match="fault"):
            Faults.parse(spec)
