"""What the order of a batch depends on: each line's prompt as tokens, and how much output it may have.

Reads the bodies as the routes do, but answers nothing: a line that cannot be read here gets its error when it runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from engine.batching.ordering import Item, block_keys
from engine.errors import KvasirError
from engine.types import GenerationRequest, SamplingParams
from server.chat_pipeline import prepare
from server.context import ServerContext
from server.responses.schema import ResponsesRequest
from server.responses.store import ResponseStore, Turn
from server.responses.translate import chat_job, conversation
from server.sampling import request_options, sampling_params
from server.schemas import DEFAULT_COMPLETION_TOKENS, ChatRequest, CompletionRequest
from server.validation import validated

LOWEST_PRIORITY = 2**31 - 1  # behind everything that somebody waits for


@dataclass(frozen=True)
class LinePrompt:
    """The prompt of a line and the request that it becomes, as far as is needed here."""

    token_ids: Sequence[int]
    request: GenerationRequest

    def item(self, block_size: int, expected_output: int) -> Item:
        blocks = block_keys(self.token_ids, block_size)
        return Item(blocks, len(self.token_ids), expected_output, self.request.cache_salt)

    def prefix_request(self, num_tokens: int) -> GenerationRequest:
        """Computes the first tokens of the prompt, and one token that nobody reads, so that they are cached."""
        return GenerationRequest(
            prompt=list(self.token_ids[:num_tokens]),
            sampling=SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True),
            seed_given=True,
            tenant=self.request.tenant,
            cache_salt=self.request.cache_salt,
            adapter=self.request.adapter,
            priority=LOWEST_PRIORITY,
            client_request_id=self.request.client_request_id,
        )


async def line_prompt(
    context: ServerContext, url: str, body: dict[str, Any], *, tenant: str, label: str
) -> LinePrompt | None:
    """None for what has no single prompt that others could share: several prompts, embeddings, a wrong body."""
    try:
        request = await _request(context, url, body, tenant, label)
        if request is None:
            return None
        prompt = request.prompt
        if isinstance(prompt, list):
            return LinePrompt(prompt, request)
        ids = await context.engine.tokenize(prompt, add_special_tokens=request.add_special_tokens)
        return LinePrompt(ids, request)
    except KvasirError:
        return None


async def _request(
    context: ServerContext, url: str, body: dict[str, Any], tenant: str, label: str
) -> GenerationRequest | None:
    limits = context.config.limits
    if url == "/v1/chat/completions":
        chat = validated(ChatRequest, body, limits)
        return (await prepare(context, chat, tenant=tenant, request_id=label)).request
    if url == "/v1/responses":
        fields = validated(ResponsesRequest, body, limits)
        fields.check()
        turn: Turn = conversation(fields, ResponseStore(limits), tenant)
        return (await chat_job(context, body, fields, turn, tenant=tenant, request_id=label)).request
    if url == "/v1/completions":
        return _completion(context, validated(CompletionRequest, body, limits), tenant, label)
    return None


def _completion(context: ServerContext, fields: CompletionRequest, tenant: str, label: str) -> GenerationRequest | None:
    if len(fields.prompts) > 1:
        return None
    max_tokens = DEFAULT_COMPLETION_TOKENS if fields.max_tokens is None else max(fields.max_tokens, 1)
    info = context.require_ready()
    return GenerationRequest(
        prompt=fields.prompts[0],
        sampling=sampling_params(fields, info, max_tokens=max_tokens, logprobs=None, prompt_logprobs=None),
        num_choices=fields.num_generated,
        add_special_tokens=fields.add_special_tokens,
        adapter=context.adapter_of(context.resolve_model(fields.model, with_adapters=True)),
        tenant=tenant,
        client_request_id=label,
        **request_options(fields, context.config),
    )
