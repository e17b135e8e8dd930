"""Template children: killed when slow, replaced when dead, never in each other's way."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest
import pytest_asyncio

from engine.errors import ConfigError, InvalidParameter, TemplateError
from engine.text.template_process import TemplateProcess
from engine.types import ChatPrompt

# "slow" never ends within the test, "big" writes too much, "fat" needs more memory than the child may have.
SOURCE = """
{%- set text = messages[0].content -%}
{%- if text == 'slow' -%}{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}{%- endif -%}
{%- if text == 'fat' -%}{{ ('x' * 4000000000) | length }}{%- endif -%}
{%- if text == 'big' -%}{% for a in range(99999) %}xxxxxxxxxx{% endfor %}{%- endif -%}
{%- if text == 'refused' -%}{{ raise_exception('only plain text') }}{%- endif -%}
<|turn|>{{ text }}"""

Start = Callable[..., Awaitable[TemplateProcess]]


@pytest_asyncio.fixture
async def start() -> AsyncIterator[Start]:
    started: list[TemplateProcess] = []

    async def begin(source: str = SOURCE, timeout_s: float = 1.0) -> TemplateProcess:
        process = TemplateProcess(source, {}, ["<|turn|>"], timeout_s=timeout_s, max_chars=100_000)
        started.append(process)
        await process.start()
        return process

    yield begin
    for process in started:
        await process.close()


async def render(process: TemplateProcess, text: str) -> str:
    return (await process.render(ChatPrompt(messages=[{"role": "user", "content": text}]))).plain()


async def test_renders_in_a_child_and_brings_its_errors_back(start: Start) -> None:
    process = await start()
    assert await render(process, "hello <|turn|>") == "<|turn|>hello <|turn|>"
    with pytest.raises(TemplateError, match="only plain text"):
        await render(process, "refused")
    with pytest.raises(TemplateError, match="more than 100000 characters"):
        await render(process, "big")
    with pytest.raises(InvalidParameter) as caught:
        await process.render(ChatPrompt(messages=[{"role": "user", "content": 3}]))
    assert caught.value.param == "messages.0.content"
    with pytest.raises(InvalidParameter, match="surrogates"):
        await render(process, "\ud800")
    assert await render(process, "still here") == "<|turn|>still here"


async def test_a_render_that_does_not_end_is_killed_and_holds_nobody_up(start: Start) -> None:
    process = await start(timeout_s=1.0)
    await asyncio.gather(render(process, "a"), render(process, "b"))  # both children run
    started = time.monotonic()
    slow = asyncio.create_task(render(process, "slow"))
    await asyncio.sleep(0.05)
    assert await render(process, "quick") == "<|turn|>quick"
    assert not slow.done()
    with pytest.raises(TemplateError, match="within 1 s"):
        await slow
    assert time.monotonic() - started < 3.0
    assert await render(process, "again") == "<|turn|>again"


async def test_a_render_that_needs_too_much_memory_fails_alone(start: Start) -> None:
    process = await start()
    with pytest.raises(TemplateError, match="MemoryError"):
        await render(process, "fat")
    assert await render(process, "again") == "<|turn|>again"


async def test_a_caller_that_leaves_does_not_mix_up_answers(start: Start) -> None:
    process = await start()
    for number in range(5):
        leaving = asyncio.create_task(render(process, "left behind"))
        await asyncio.sleep(0)
        leaving.cancel()
        assert await render(process, str(number)) == f"<|turn|>{number}"


async def test_close_ends_the_children_in_the_middle_of_a_render(start: Start) -> None:
    process = await start(timeout_s=30.0)
    slow = asyncio.create_task(render(process, "slow"))
    await asyncio.sleep(0.1)
    await process.close()
    with pytest.raises(asyncio.CancelledError):
        await slow


async def test_a_broken_template_is_found_at_the_start(start: Start) -> None:
    with pytest.raises(ConfigError, match="not valid Jinja"):
        await start("{% for %}")


async def test_a_request_can_bring_its_own_template_which_is_forgotten_after_it(start: Start) -> None:
    process = await start()
    messages = [{"role": "user", "content": "hi <|turn|>"}]
    own = await process.render(ChatPrompt(messages=messages, template="own: {{ messages[0].content }}"))
    assert own.plain() == "own: hi <|turn|>"
    assert "<|turn|>" not in own.text, "it protects control tokens as the model's own does"
    assert (await process.render(ChatPrompt(messages=messages[:1]))).plain() == "<|turn|>hi <|turn|>"
    with pytest.raises(InvalidParameter, match="not valid Jinja") as caught:
        await process.render(ChatPrompt(messages=messages, template="{% if"))
    assert caught.value.param == "chat_template"
    assert "--chat-template" not in str(caught.value)
