"""Child process that renders chat templates: one frame in, one frame out, until its input ends.

A process of its own because a template that does not end can only be stopped by killing what runs it.
Started as `python -m engine.text.template_worker` by `template_process`.
"""

from __future__ import annotations

import resource
import sys

import msgspec

from engine.child_loop import answer_frames
from engine.errors import ConfigError, RequestError
from engine.text.chat_template import ChatTemplate
from engine.text.rendered import RenderedText
from engine.types import ChatPrompt

MAX_MEMORY_BYTES = 1 << 30


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


class Worker:
    """What the process knows between frames: the server's template, once it is set up."""

    def __init__(self) -> None:
        self._setup: Setup | None = None
        self._template: ChatTemplate | None = None

    def answer(self, message: Setup | Render) -> Rendered | Failed:
        if isinstance(message, Setup):
            self._setup = message
            self._template, answer = _set_up(message)
            return answer
        return _render(self._template, self._setup, message)


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


def main() -> int:
    resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY_BYTES, MAX_MEMORY_BYTES))
    return answer_frames(Setup | Render, Worker().answer)


if __name__ == "__main__":
    sys.exit(main())
