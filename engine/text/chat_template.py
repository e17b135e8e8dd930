"""Renders chat messages through a model's Jinja template in a sandbox. Knows no tokens beyond their texts.

Behaves as `transformers`' apply_chat_template does: same environment options, filters, globals and variables.
Time is limited by the process that runs this module, see `template_process`.
"""

from __future__ import annotations

import datetime
import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

import jinja2
import jinja2.ext
import jinja2.meta
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

from engine.errors import ConfigError, InvalidParameter, TemplateError
from engine.text.chat_messages import ContentFormat, normalise
from engine.text.protection import Protection, draw_nonce
from engine.text.rendered import RenderedText
from engine.types import ChatPrompt

RESERVED_KWARGS = frozenset(
    {"messages", "tools", "documents", "add_generation_prompt", "continue_final_message", "chat_template", "tokenize"}
    | {"raise_exception", "strftime_now", "range", "dict", "lipsum", "cycler", "joiner", "namespace"}
)
KWARG_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_]{0,63}")
MAX_ERROR_CHARS = 300
PROBE = "PROBE7F3A"


class ChatTemplate:
    """One compiled template."""

    def __init__(self, source: str, named_tokens: Mapping[str, str], control_tokens: Iterable[str]) -> None:
        """Raises ConfigError when the source is not a valid template."""
        self._environment = _environment()
        try:
            self._template = self._environment.from_string(source)
            variables = jinja2.meta.find_undeclared_variables(self._environment.parse(source))
        except (jinja2.TemplateError, RecursionError) as error:
            message = f"the chat template is not valid Jinja: {error}; name another with --chat-template"
            raise ConfigError(message) from None
        self._named_tokens = dict(named_tokens)
        self._takes_tools = "tools" in variables
        self._takes_documents = "documents" in variables
        self._kwarg_names = variables - RESERVED_KWARGS - set(named_tokens)
        self._knows_developer = "developer" in source
        self._protection = Protection(control_tokens)
        self.content_format = self._probe_content_format()

    def render(self, prompt: ChatPrompt, max_chars: int) -> RenderedText:
        """The prompt's text. Raises TemplateError quoting the template, or InvalidParameter naming a field."""
        self._check(prompt)
        messages = normalise(prompt.messages, self.content_format, self._knows_developer)
        given = {
            "messages": messages,
            "tools": prompt.tools,
            "documents": prompt.documents,
            "kwargs": prompt.template_kwargs,
        }
        given, nonce = self._protection.apply(given)
        end_mark = None
        if prompt.continue_final_message:
            end_mark = draw_nonce()
            _append_to_final(given["messages"], end_mark)
        variables = {name: value for name, value in given["kwargs"].items() if name in self._kwarg_names}
        text = self._run(
            {
                **variables,
                **self._named_tokens,
                "messages": given["messages"],
                "tools": given["tools"] or None,
                "documents": given["documents"] or None,
                "add_generation_prompt": prompt.add_generation_prompt,
            },
            max_chars,
        )
        return RenderedText(text if end_mark is None else _cut_at(text, end_mark), nonce)

    def _check(self, prompt: ChatPrompt) -> None:
        if not prompt.messages:
            raise InvalidParameter("messages must hold at least one message", param="messages")
        for name, given, is_taken in (
            ("tools", prompt.tools, self._takes_tools),
            ("documents", prompt.documents, self._takes_documents),
        ):
            if given and not is_taken:
                message = f"this model's chat template has no place for {name}; leave them out"
                raise InvalidParameter(message, param=name)
        for name, value in prompt.template_kwargs.items():
            param = f"chat_template_kwargs.{name[:64]}"
            if name in RESERVED_KWARGS or name in self._named_tokens or not KWARG_NAME.fullmatch(name):
                raise InvalidParameter(f"chat_template_kwargs may not set {name[:64]!r}", param=param)
            if value is not None and not isinstance(value, str | int | float):
                raise InvalidParameter(f"{param} must be a string, a number, a boolean or null", param=param)
        if prompt.continue_final_message:
            if prompt.add_generation_prompt:
                message = "continue_final_message needs add_generation_prompt to be false"
                raise InvalidParameter(message, param="continue_final_message")
            if prompt.messages[-1].get("role") != "assistant":
                message = "continue_final_message needs a last message of the role 'assistant'"
                raise InvalidParameter(message, param="continue_final_message")

    def _run(self, variables: dict[str, Any], max_chars: int) -> str:
        parts = []
        num_chars = 0
        try:
            for part in self._template.generate(variables):
                num_chars += len(part)
                if num_chars > max_chars:
                    raise TemplateError(f"the chat template wrote more than {max_chars} characters", param="messages")
                parts.append(part)
        except TemplateError:
            raise
        except jinja2.TemplateError as error:
            raise TemplateError(f"the chat template refused the messages: {_quote(error)}", param="messages") from None
        except Exception as error:  # a template can raise anything: the types of its operands are the user's
            message = f"the chat template failed on the messages: {type(error).__name__}: {_quote(error)}"
            raise TemplateError(message, param="messages") from None
        return "".join(parts)

    def _probe_content_format(self) -> ContentFormat:
        """Renders one message both ways: the form is taken when the text comes out as text."""
        takes_string = self._shows(PROBE)
        takes_list = self._shows([{"type": "text", "text": PROBE}])
        if takes_list:
            return "both" if takes_string else "list"
        return "string"

    def _shows(self, content: str | list[dict[str, str]]) -> bool:
        variables = {
            **self._named_tokens,
            "messages": [{"role": "user", "content": content}],
            "tools": None,
            "documents": None,
            "add_generation_prompt": True,
        }
        try:
            text = self._run(variables, 1 << 20)
        except TemplateError:
            return False
        # a list that was printed rather than read shows its keys
        return PROBE in text and "'text'" not in text and '"text"' not in text


class _GenerationTag(jinja2.ext.Extension):
    """{% generation %} marks assistant text for training; here it only groups."""

    def __init__(self, environment: jinja2.Environment) -> None:
        super().__init__(environment)
        self.tags = {"generation"}

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body, lineno=line)


def _environment() -> jinja2.sandbox.ImmutableSandboxedEnvironment:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda format: datetime.datetime.now().strftime(format)
    return environment


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own filter escapes for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _quote(error: Exception) -> str:
    """The error's text, without memory addresses and not longer than a message should be."""
    return re.sub(r" at 0x[0-9a-fA-F]+", "", str(error))[:MAX_ERROR_CHARS]


def _append_to_final(messages: list[dict[str, Any]], mark: str) -> None:
    """Marks the end of the last message, so that what the template writes after it can be cut off."""
    last = messages[-1]
    content = last.get("content")
    if isinstance(content, list) and content:
        parts = [dict(part) for part in content]
        parts[-1]["text"] += mark
        last["content"] = parts
    else:
        last["content"] = (content or "") + mark


def _cut_at(text: str, mark: str) -> str:
    end = text.rfind(mark)
    if end < 0:
        raise TemplateError(
            "the chat template leaves the last message out, so it cannot be continued", param="continue_final_message"
        )
    return text[:end]
