"""LLM: the engine inside the caller's process, for scripts and notebooks. No server, no child process, no asyncio.

from engine.llm import LLM
from engine.types import SamplingParams

with LLM(model="mimir") as llm:
    answers = llm.generate(["def add(a, b):", "import os"], SamplingParams(max_tokens=20, temperature=0.0))
    print(answers[0].text)
    print(llm.chat([{"role": "user", "content": "Hello!"}])[0].text)
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from engine.config import Config, sections
from engine.config_load import load
from engine.constraints.grammar import compile_constraint
from engine.constraints.limits import ConstraintLimits
from engine.constraints.vocabulary import Vocabulary
from engine.errors import ConfigError, InvalidParameter, KvasirError, ModelNotFound, QueueFull
from engine.faults import Faults
from engine.launch import resolve_model_path
from engine.stream import RequestStream
from engine.submission import build, context_limit, truncate
from engine.text.bad_words import token_sequences
from engine.text.chat_template import ChatTemplate
from engine.text.tokenizer import Tokenizer
from engine.types import (
    ChatPrompt,
    Constraint,
    FinishReason,
    GenerationRequest,
    LogprobEntry,
    ModelInfo,
    SamplingParams,
    TextOutput,
)

if TYPE_CHECKING:
    from engine.core import EngineCore

    Build = Callable[[Config], tuple[EngineCore, ModelInfo]]

NO_TIME_LIMIT_S = 1e9
MAX_TEMPLATE_CHARS = 1 << 26

Message = dict[str, Any]


@dataclass
class Choice:
    """One answer to one prompt."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[LogprobEntry] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None


@dataclass
class Answer:
    """All answers to one prompt; `text` and `token_ids` are those of the first.

    error   why the engine failed on this prompt; choices that had not ended then have the finish reason "error"
    """

    prompt_token_ids: list[int]
    choices: list[Choice]
    num_cached_tokens: int = 0
    prompt_logprobs: list[LogprobEntry | None] | None = None
    error: str | None = None

    @property
    def text(self) -> str:
        return self.choices[0].text

    @property
    def token_ids(self) -> list[int]:
        return self.choices[0].token_ids


class LLM:
    """A loaded model. Prompts given together run as one continuously batched load."""

    def __init__(self, model: str = "mimir", *, build_core: Build | None = None, **options: Any) -> None:
        """
        model        a folder with safetensors and config.json, or the name of a bundled model
        options      any option of the engine by its name, for instance dtype="float32", max_model_len=4096
        build_core   replaces the loading of the model in tests
        Raises ConfigError.
        """
        self.config = _offline_config({"model": model, **options})
        if build_core is None:
            from engine.launch import build_core as load_core

            build_core = load_core
        folder = self.config.model.tokenizer or resolve_model_path(self.config.model.model)
        self.tokenizer = Tokenizer.from_folder(Path(folder), self.config.model.chat_template)
        self._core, self.info = build_core(self.config)
        self._template: ChatTemplate | None = None
        self._vocabulary: Vocabulary | None = None
        self._serial = itertools.count()

    def __enter__(self) -> LLM:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Gives the model's memory back. The object cannot be used afterwards."""
        del self._core

    def generate(
        self,
        prompts: str | Sequence[str | Sequence[int]],
        sampling: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        show_progress: bool = False,
        **request_options: Any,
    ) -> list[Answer]:
        """Continues every prompt; answers come in the order of the prompts.

        prompts           a text, texts, or token id sequences
        sampling          for all prompts, or one per prompt; draws depend on its `seed` alone
        request_options   further fields of GenerationRequest, for instance stop=("\\n",), num_choices=4 or
                          constraint=Constraint("regex", "[0-9]+")
        Raises RequestError for a prompt or parameter that cannot be served; nothing has run then.
        """
        texts = [prompts] if isinstance(prompts, str) else list(prompts)
        prompt_ids = [self._ids(text) for text in texts]
        return self._run(prompt_ids, sampling, show_progress, request_options)

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        tools: list[dict[str, Any]] | None = None,
        template_kwargs: dict[str, Any] | None = None,
        show_progress: bool = False,
        **request_options: Any,
    ) -> list[Answer]:
        """Answers one conversation, or several at once, through the model's chat template.

        max_tokens <= 0 in `sampling`, and no sampling at all, mean: as much as fits.
        Raises RequestError, which TemplateError is, and ConfigError when the model has no chat template.
        """
        conversations: list[Any] = list(messages)
        if conversations and isinstance(conversations[0], dict):
            conversations = [conversations]
        prompt_ids = []
        for conversation in conversations:
            prompt = ChatPrompt(messages=list(conversation), tools=tools, template_kwargs=template_kwargs or {})
            rendered = self._chat_template().render(prompt, MAX_TEMPLATE_CHARS)
            prompt_ids.append(self.tokenizer.encode_rendered(rendered))
        sampling = sampling if sampling is not None else SamplingParams(max_tokens=0)
        return self._run(prompt_ids, sampling, show_progress, request_options)

    def _ids(self, prompt: str | Sequence[int]) -> list[int]:
        return self.tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt)

    def _chat_template(self) -> ChatTemplate:
        if self._template is None:
            files = self.tokenizer.files
            if files.chat_template is None:
                raise ConfigError("this model has no chat template; use generate, or give chat_template=FILE")
            self._template = ChatTemplate(files.chat_template, files.named_tokens, self.tokenizer.control_tokens)
        return self._template

    def _run(
        self,
        prompts: list[list[int]],
        sampling: SamplingParams | Sequence[SamplingParams] | None,
        show_progress: bool,
        request_options: dict[str, Any],
    ) -> list[Answer]:
        params = _per_prompt(sampling, len(prompts))
        streams = [self._open(ids, params[i], request_options) for i, ids in enumerate(prompts)]
        answers = [_Collector(stream) for stream in streams]
        by_id = {stream.request.request_id: collector for stream, collector in zip(streams, answers, strict=True)}
        waiting = list(reversed(streams))
        with tqdm(total=len(streams), disable=not show_progress, unit="request") as bar:
            try:
                while waiting or self._core.has_work:
                    self._feed(waiting)
                    for output in self._core.advance():
                        collector = by_id[output.request_id]
                        collector.stream.push(output)
                        bar.update(collector.collect())
            finally:  # an error or interrupt must not leave requests behind for the next call
                for stream in streams:
                    stream.close()
        return [collector.answer for collector in answers]

    def _feed(self, waiting: list[RequestStream]) -> None:
        """Hands over as many requests as the core's queue takes."""
        try:
            while waiting:
                self._core.add(waiting[-1].request)
                waiting.pop()
        except QueueFull:
            if not self._core.has_work:
                raise

    def _open(self, token_ids: list[int], sampling: SamplingParams, request_options: dict[str, Any]) -> RequestStream:
        given = GenerationRequest(prompt=token_ids, sampling=sampling, seed_given=True, **request_options)
        bad_words = token_sequences(self.tokenizer, given.bad_words)
        token_ids = truncate(token_ids, given, context_limit(self.info))
        request = build(
            given,
            f"offline-{next(self._serial)}",
            token_ids,
            bad_words,
            self.info,
            is_strict=False,
            grammar=None if given.constraint is None else self._grammar(given.constraint),
            adapter=self._adapter(given.adapter),
        )
        return RequestStream(
            self.tokenizer,
            given,
            request,
            eos_token_ids=frozenset(self.info.eos_token_ids),
            faults=Faults({}),
            abort=self._core.abort,
        )

    def _adapter(self, name: str) -> str:
        """The key of an adapter of the option `lora_adapters`. Raises ModelNotFound."""
        keys = {"": "", **{adapter.name: adapter.key for adapter in self.info.adapters}}
        if name not in keys:
            raise ModelNotFound(f"no adapter {name!r} is loaded; name it in lora_adapters", param="adapter")
        return keys[name]

    def _grammar(self, constraint: Constraint) -> str:
        """Raises InvalidParameter and SchemaTooComplex."""
        if self._vocabulary is None:
            self._vocabulary = Vocabulary(self.tokenizer.files.definition, self.info.eos_token_ids)
        return compile_constraint(constraint, self._vocabulary, ConstraintLimits.of(self.config.limits))


class _Collector:
    """Puts the pieces of one request together."""

    def __init__(self, stream: RequestStream) -> None:
        self.stream = stream
        choices = [Choice() for _ in range(stream.request.num_choices)]
        self.answer = Answer(stream.request.prompt_token_ids, choices)

    def collect(self) -> bool:
        """Takes what is there; True when the request has ended."""
        try:
            while (output := self.stream.take()) is not None:
                self._add(output)
        except KvasirError as error:
            self.answer.error = str(error)
            for choice in self.answer.choices:
                choice.finish_reason = choice.finish_reason or "error"
        return self.stream.is_done

    def _add(self, output: TextOutput) -> None:
        choice = self.answer.choices[output.choice]
        choice.text += output.text
        choice.token_ids += output.token_ids
        if output.logprobs is not None:
            choice.logprobs = (choice.logprobs or []) + output.logprobs
        choice.finish_reason, choice.stop_reason = output.finish_reason, output.stop_reason
        self.answer.num_cached_tokens = output.num_cached_tokens
        if output.prompt_logprobs is not None:
            self.answer.prompt_logprobs = output.prompt_logprobs


def _offline_config(options: dict[str, Any]) -> Config:
    """Nobody waits for an answer here: requests may take as long as they take."""
    names = {option.name for section in sections().values() for option in dataclasses.fields(section)}
    unknown = sorted(set(options) - names)
    if unknown:
        raise ConfigError(f"unknown option {unknown[0]!r}; known: {', '.join(sorted(names))}")
    config = load(options)
    scheduler = dataclasses.replace(config.scheduler, max_queue_wait_s=NO_TIME_LIMIT_S, max_request_s=NO_TIME_LIMIT_S)
    return dataclasses.replace(config, scheduler=scheduler)


def _per_prompt(sampling: SamplingParams | Sequence[SamplingParams] | None, num_prompts: int) -> list[SamplingParams]:
    if sampling is None:
        sampling = SamplingParams()
    if isinstance(sampling, SamplingParams):
        return [sampling] * num_prompts
    if len(sampling) != num_prompts:
        raise InvalidParameter(f"{len(sampling)} sampling parameters for {num_prompts} prompts; give one or as many")
    return list(sampling)
