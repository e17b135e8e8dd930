"""Child process that renders chat templates: one frame in, one frame out, until its input ends.

A process of its own because a template that does not end can only be stopped by killing what runs it.
Started as `python -m engine.text.template_worker` by `template_process`.
"""

from __future__ import annotations

import os
import resource
import sys

import msgspec

from engine import ipc
from engine.errors import ConfigError, RequestError
from engine.text.chat_template import ChatTemplate
from engine.text.rendered import RenderedText
from engine.types import ChatPrompt

MAX_MEMORY_BYTES = 1 << 30
READ_BYTES = 1 << 18


class Setup(msgspec.Struct, frozen=True, tag=True):
    """The first message: what to compile."""

    source: str
    named_tokens: dict[str, str]
    control_tokens: list[str]


class Render(msgspec.Struct, frozen=True, tag=True):
    prompt: ChatPrompt
    max_chars: int


class Rendered(msgspec.Struct, frozen=True, tag=True):
    rendered: RenderedText


class Failed(msgspec.Struct, frozen=True, tag=True):
    """`kind` names the exception class: TemplateError, InvalidParameter or ConfigError."""

    kind: str
    message: str
    param: str | None = None


def main() -> int:
    os.umask(0o077)
    resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY_BYTES, MAX_MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    messages: ipc.Decoder[Setup | Render] = ipc.Decoder(Setup | Render)
    setup: Setup | None = None
    template: ChatTemplate | None = None
    while data := os.read(sys.stdin.fileno(), READ_BYTES):
        for message in messages.feed(data):
            if isinstance(message, Setup):
                setup = message
                template, answer = _set_up(message)
            else:
                answer = _render(template, setup, message)
            try:
                _write(ipc.encode(answer))
            except BrokenPipeError:  # the front end is gone, and nobody waits for this
                return 0
    return 0


def _set_up(setup: Setup) -> tuple[ChatTemplate | None, Rendered | Failed]:
    try:
        template = ChatTemplate(setup.source, setup.named_tokens, setup.control_tokens)
    except ConfigError as error:
        return None, Failed("ConfigError", str(error))
    return template, Rendered(RenderedText(""))


def _render(template: ChatTemplate | None, setup: Setup | None, request: Render) -> Rendered | Failed:
    if template is None or setup is None:
        return Failed("ConfigError", "no chat template was set up")
    source = request.prompt.template
    try:
        if source is not None:
            template = ChatTemplate(source, setup.named_tokens, setup.control_tokens)
        return Rendered(template.render(request.prompt, request.max_chars))
    except RequestError as error:
        return Failed(type(error).__name__, str(error), error.param)
    except ConfigError as error:  # of the request's own template
        return Failed("InvalidParameter", str(error).partition("; name another")[0], "chat_template")


def _write(data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(sys.stdout.fileno(), view) :]


if __name__ == "__main__":
    sys.exit(main())
