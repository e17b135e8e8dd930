"""The client's side of a pooling request: one result, errors, restarts and leaving."""

from __future__ import annotations

import asyncio

import pytest

from engine.errors import CapacityError, EngineError, KvasirError, NumericalError
from engine.pooled_stream import PooledStream
from engine.types import EngineRequest, PoolingParams, SamplingParams, TokenOutput

Aborts = list[tuple[str, int | None]]


def stream_of(*, deadline_s: float | None = None) -> tuple[PooledStream, Aborts]:
    aborts: Aborts = []
    request = EngineRequest(
        request_id="a",
        prompt_token_ids=[1, 2, 3],
        sampling=SamplingParams(max_tokens=1),
        pooling=PoolingParams(),
        deadline_s=deadline_s,
    )
    return PooledStream(request, lambda request_id, choice: aborts.append((request_id, choice))), aborts


def output(**fields: object) -> TokenOutput:
    return TokenOutput(request_id="a", **fields)  # type: ignore[arg-type]


async def test_the_result_comes_once_and_also_after_a_restart() -> None:
    stream, aborts = stream_of()
    waiting = asyncio.create_task(stream.result())
    stream.restart()
    assert (stream.is_done, stream.num_restarts, stream.done_choices) == (False, 1, [])
    stream.push(output(pooled=b"\0" * 8, pooled_shape=(2,), num_cached_tokens=2, finish_reason="stop"))
    stream.push(output(pooled=b"\1" * 8, pooled_shape=(2,), finish_reason="stop"))
    result = await waiting
    assert (result.data, result.shape, result.num_prompt_tokens, result.num_cached_tokens) == (b"\0" * 8, (2,), 3, 2)
    stream.close()
    assert (aborts, stream.is_done, stream.has_progressed) == ([], True, True)


@pytest.mark.parametrize(
    ("code", "kind"),
    [("numerical_error", NumericalError), ("server_overloaded", CapacityError), (None, EngineError)],
)
async def test_an_error_of_the_engine_is_raised(code: str | None, kind: type[KvasirError]) -> None:
    stream, _ = stream_of()
    stream.push(output(finish_reason="error", error=code))
    with pytest.raises(kind):
        await stream.result()


async def test_leaving_tells_the_core() -> None:
    stream, aborts = stream_of()
    stream.close()
    stream.close()
    assert aborts == [("a", None)]


async def test_a_restart_gets_what_is_left_of_the_time() -> None:
    stream, _ = stream_of(deadline_s=1e-9)
    assert stream.to_send().deadline_s == 0.0
    endless, _ = stream_of()
    assert endless.to_send() is endless.request
