"""The client's side of text: tokenizer, chat template, output format and constraints of the model that is served.

Turns what the server asks for into what the core understands. Knows no streams, no sockets and no HTTP.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Callable
from pathlib import Path

import msgspec

from engine.config import Config
from engine.constraints.compiler import ConstraintCompiler
from engine.faults import Faults
from engine.launch import resolve_model_path
from engine.prompts import PromptEncoder
from engine.submission import build, context_limit, require_generation, truncate
from engine.submission_pooling import build_pooling, require_pooling
from engine.text.output_format import OutputFormat
from engine.text.tokenizer import Tokenizer
from engine.types import EngineRequest, GenerationRequest, ModelInfo, PoolingRequest

KeyOf = Callable[[str], str]  # of an adapter: the name that requests give -> what the core knows it by


class TextSide:
    """Made by `load`; holds two child processes, for templates and for grammars, until `close`."""

    def __init__(
        self,
        config: Config,
        tokenizer: Tokenizer,
        encoder: PromptEncoder,
        output_format: OutputFormat,
        compiler: ConstraintCompiler,
        faults: Faults,
    ) -> None:
        self.tokenizer = tokenizer
        self.encoder = encoder
        self.output_format = output_format
        self._config = config
        self._compiler = compiler
        self._faults = faults

    @classmethod
    async def load(
        cls, config: Config, faults: Faults, on_constraint: Callable[[str, str, float], None] | None = None
    ) -> TextSide:
        """on_constraint: see `ConstraintCompiler.on_done`. Raises ConfigError."""
        model = config.model
        folder = Path(model.tokenizer) if model.tokenizer else resolve_model_path(model.model)
        tokenizer = await asyncio.to_thread(Tokenizer.from_folder, folder, model.chat_template)
        output_format = OutputFormat(tokenizer, model.tool_call_parser, model.reasoning_parser)
        encoder = PromptEncoder(tokenizer, config.limits, faults)
        await encoder.start()
        compiler = ConstraintCompiler(tokenizer.files.definition, tokenizer.eos_token_ids, config.limits)
        if on_constraint is not None:
            compiler.on_done = on_constraint
        compiler.start_soon()
        return cls(config, tokenizer, encoder, output_format, compiler, faults)

    async def close(self) -> None:
        await self.encoder.close()
        await self._compiler.close()

    async def prepare(
        self, given: GenerationRequest, info: ModelInfo, key_of: KeyOf, tell_tokenize_s: Callable[[float], None]
    ) -> EngineRequest:
        """What the core gets. Raises RequestError and CapacityError."""
        arrival_s = time.monotonic()
        require_generation(info)
        limit = context_limit(info)
        grammar = await self._grammar(given)
        began_s = time.perf_counter()
        token_ids = await self.encoder.encode(
            given.prompt,
            max_tokens=limit,
            add_special_tokens=given.add_special_tokens,
            param=given.prompt_param,
            label=given.client_request_id,
        )
        tell_tokenize_s(time.perf_counter() - began_s)
        token_ids = truncate(token_ids, given, limit)
        return build(
            self.output_format.prepared(given, token_ids),
            secrets.token_hex(16),
            token_ids,
            await self.encoder.bad_words(given.bad_words),
            info,
            is_strict=self._config.server.strict_max_tokens,
            grammar=grammar,
            adapter=key_of(given.adapter),  # the last look: nothing waits between here and sending
            limits=self._config.limits,
            elapsed_s=time.monotonic() - arrival_s,
        )

    async def prepare_pooling(self, given: PoolingRequest, info: ModelInfo, key_of: KeyOf) -> EngineRequest:
        """As `prepare`, for a request that ends with its prompt."""
        arrival_s = time.monotonic()
        params = require_pooling(given, info)
        token_ids, num_first_tokens = await self.encoder.encode_pooling(given, max_tokens=context_limit(info))
        return build_pooling(
            given,
            secrets.token_hex(16),
            token_ids,
            msgspec.structs.replace(params, num_first_tokens=num_first_tokens),
            info,
            adapter=key_of(given.adapter),
            elapsed_s=time.monotonic() - arrival_s,
        )

    async def _grammar(self, given: GenerationRequest) -> str | None:
        if given.constraint is None:
            return None
        self._faults.check("compile", label=given.client_request_id)
        return await self._compiler.compile(given.constraint)
