"""The values that cross the walls between server, client and core. No behaviour, no tensors, no HTTP.

    server --GenerationRequest--> client --EngineRequest--> core
    server <----TextOutput------- client <---TokenOutput--- core

`EngineRequest`, `TokenOutput` and what they contain also cross a process border as msgpack.
"""

from __future__ import annotations

from typing import Any, Literal

import msgspec

FinishReason = Literal["stop", "length", "abort", "error"]


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How the next token is chosen. Ranges are checked by `engine.sampling_params.validate`.

    Every draw is keyed by (seed, choice index, output index, token id): see `kernels.sampling`.
    """

    max_tokens: int = 16
    min_tokens: int = 0  # end-of-sequence and stop ids are masked before this many outputs
    temperature: float = 1.0  # 0 is greedy
    top_k: int = 0  # 0 is off
    top_p: float = 1.0
    min_p: float = 0.0
    typical_p: float = 1.0
    presence_penalty: float = 0.0  # counts generated tokens
    frequency_penalty: float = 0.0  # counts generated tokens
    repetition_penalty: float = 1.0  # counts prompt and generated tokens
    logit_bias: dict[int, float] = {}  # token id -> added to its logit
    bad_words_ids: tuple[tuple[int, ...], ...] = ()  # sequences that must not be completed
    allowed_token_ids: tuple[int, ...] = ()  # empty is all
    stop_token_ids: tuple[int, ...] = ()  # in addition to the model's end-of-sequence ids
    ignore_eos: bool = False
    seed: int = 0  # always concrete here; the client draws one when the user gave none
    logprobs: int | None = None  # top alternatives per output token; 0 is the chosen token alone
    prompt_logprobs: int | None = None  # the same for prompt tokens; bypasses prefix-cache reads

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0.0


class EngineRequest(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A request as the core sees it: integers only. One request yields `num_choices` token streams."""

    request_id: str  # ours, random, never the client's
    prompt_token_ids: list[int]
    sampling: SamplingParams
    num_choices: int = 1  # n, or best_of; choices share the prompt's blocks
    priority: int = 0  # lower runs sooner
    tenant: str = ""  # fairness and prefix-sharing domain: a digest of the API key
    cache_salt: str = ""  # further splits the prefix cache inside a tenant
    deadline_s: float | None = None  # seconds from arrival in the core until the request is ended
    kv_policy: dict[str, Any] | None = None  # cache compression choice; refused at admission: there is none yet
    speculative: dict[str, Any] | None = None  # drafting choice; likewise


class TokenLogprob(msgspec.Struct, frozen=True, array_like=True):
    """Log-probability of one token and its best alternatives, from the raw (unprocessed) distribution."""

    token_id: int
    logprob: float
    rank: int  # 1 is the most likely token
    top_ids: list[int]
    top_logprobs: list[float]


class TokenOutput(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What one step produced for one choice of one request.

    Every accepted choice gets exactly one output with a `finish_reason`, and nothing after it.
    """

    request_id: str
    choice: int = 0
    token_ids: list[int] = []
    logprobs: list[TokenLogprob] | None = None  # one per token id, when asked for
    prompt_logprobs: list[TokenLogprob | None] | None = None  # once, with the first output of choice 0
    num_cached_tokens: int | None = None  # prompt tokens served by the prefix cache; once, with the first output
    finish_reason: FinishReason | None = None
    stop_token_id: int | None = None  # the id that ended it, when one did
    error: str | None = None  # for "error": one of the `code`s of engine.errors
    queued_s: float | None = None  # arrival to first scheduling; with the first output
    num_preemptions: int = 0  # with the final output


class ChatPrompt(msgspec.Struct, frozen=True, kw_only=True):
    """Messages that the client renders through the model's chat template."""

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None = None
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    template_kwargs: dict[str, Any] = {}


class GenerationRequest(msgspec.Struct, frozen=True, kw_only=True):
    """A request as the server sees it: text, token ids or messages."""

    prompt: str | list[int] | ChatPrompt
    sampling: SamplingParams  # max_tokens <= 0 means: as much as fits
    seed_given: bool = False  # False: the client draws `sampling.seed`
    stop: tuple[str, ...] = ()
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    bad_words: tuple[str, ...] = ()
    add_special_tokens: bool = True  # for text prompts; templates bring their own
    truncate_prompt_tokens: int | None = None
    num_choices: int = 1
    priority: int = 0
    tenant: str = ""
    cache_salt: str = ""
    deadline_s: float | None = None
    client_request_id: str = ""  # a label for logs
    prompt_param: str = "prompt"  # which field to name in errors about the prompt
    kv_policy: dict[str, Any] | None = None
    speculative: dict[str, Any] | None = None


class LogprobEntry(msgspec.Struct, frozen=True):
    """`TokenLogprob` with text: `token` may contain a replacement character, `data` has the true bytes."""

    token_id: int
    token: str
    data: bytes
    logprob: float
    rank: int
    top: list[tuple[int, str, bytes, float]]  # id, token, bytes, logprob


class TextOutput(msgspec.Struct, frozen=True, kw_only=True):
    """A piece of one choice's text, with everything that became known together with it."""

    choice: int
    text: str
    token_ids: list[int]
    logprobs: list[LogprobEntry] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None  # stop string or stop token id that fired; None on end-of-sequence
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    num_output_tokens: int = 0  # so far, of this choice
    prompt_token_ids: list[int] | None = None  # with the first output of a choice
    prompt_logprobs: list[LogprobEntry | None] | None = None
    error: str | None = None
    queued_s: float | None = None  # as in TokenOutput: with the first output
    num_preemptions: int = 0  # as in TokenOutput: with the final output


class ModelInfo(msgspec.Struct, frozen=True, kw_only=True):
    """What the engine knows once the model is loaded; sent to the front end with the ready message."""

    architecture: str
    dtype: str
    device: str
    vocab_size: int  # rows of the embedding: prompt ids must be below
    logits_size: int  # columns of the logits: bias and allowed ids must be below
    max_model_len: int  # tokens of prompt plus output
    num_layers: int
    block_size: int  # tokens per cache block
    num_blocks: int
    kv_cache_bytes: int
    weight_bytes: int
    eos_token_ids: list[int]
    kernels: dict[str, str] = {}  # op -> implementation, for the start-up report
    generation_defaults: dict[str, Any] = {}  # from generation_config.json

    @property
    def kv_cache_tokens(self) -> int:
        """What requests can hold: block 0 is the null block."""
        return (self.num_blocks - 1) * self.block_size


class EngineStats(msgspec.Struct, frozen=True, kw_only=True):
    """Counters and gauges of the core, sent after a step and with every heartbeat. Counters only grow."""

    num_running: int = 0
    num_waiting: int = 0
    waiting_tokens: int = 0
    oldest_waiting_s: float = 0.0
    blocks_free: int = 0
    blocks_active: int = 0
    blocks_cached: int = 0
    num_steps: dict[str, int] = {}  # kind (prefill, decode, mixed) -> count
    step_seconds: list[tuple[str, float, int, int]] = []  # since the last report: kind, seconds, tokens, requests
    scheduler_seconds: list[float] = []
    sampler_seconds: list[float] = []
    num_preemptions: int = 0
    prompt_tokens_computed: int = 0
    prompt_tokens_cached: int = 0
    generation_tokens: int = 0
    prefix_queries: int = 0
    prefix_hits: int = 0
    prefix_queried_tokens: int = 0
    prefix_hit_tokens: int = 0
    prefix_evicted_blocks: int = 0
    aborted_tokens: int = 0
