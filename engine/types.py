"""The values that cross the walls between server, client and core. No behaviour, no tensors, no HTTP.

    server --GenerationRequest--> client --EngineRequest--> core
    server <----TextOutput------- client <---TokenOutput--- core

`EngineRequest`, `TokenOutput` and what they contain also cross a process border as msgpack.
"""

from __future__ import annotations

from collections.abc import Sequence
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
    thinking: ThinkingBudget | None = None

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0.0


ConstraintKind = Literal["json_object", "json_schema", "regex", "choice", "grammar", "structural_tag"]


class Constraint(msgspec.Struct, frozen=True, omit_defaults=True):
    """What an output must look like, as the user wrote it."""

    kind: ConstraintKind
    value: str = ""  # JSON text of a schema, of choices or of a structural tag; a pattern; a Lark or GBNF grammar
    whitespace: str | None = None  # pattern between JSON tokens; "" is none at all; None is a bounded amount
    param: str = "response_format"  # the field to name in errors


class CompiledConstraint(msgspec.Struct, frozen=True, omit_defaults=True):
    """A constraint that has been checked, as the engine builds its matchers from it."""

    grammar: str  # for llguidance
    after: str = ""  # applies to what follows the first occurrence of this text in the output


class ThinkingBudget(msgspec.Struct, frozen=True, omit_defaults=True):
    """After `max_tokens` outputs of thinking without its end, the next outputs are `forced_ids`."""

    max_tokens: int
    start_ids: tuple[int, ...]  # thinking begins behind these outputs; empty: with the first output
    end_id: int  # thinking is over
    forced_ids: tuple[int, ...]  # `end_id` is among them
    must_answer: bool = False  # the output may not end inside of the thinking


PoolingTask = Literal["embed", "token_embed", "classify"]
PoolingMethod = Literal["last", "mean", "cls", "weighted", "head"]


class PoolingParams(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What is made of a prompt's hidden states in place of output tokens. Every value is concrete here."""

    task: PoolingTask = "embed"
    method: PoolingMethod = "last"  # weighted: mean with weights 1, 2, 3, ...; head: the encoder's own trained pooler
    activate: bool = True  # embeddings are scaled to length one, class scores become probabilities
    dimensions: int | None = None  # leading numbers of an embedding to keep, before it is scaled
    num_first_tokens: int = 0  # of a pair of texts: tokens of the first, its special tokens included; 0: one text

    @property
    def needs_all_tokens(self) -> bool:
        """Whether it takes more than the last token's hidden state, so that no token may come from the prefix cache."""
        return self.task == "token_embed" or self.method != "last"


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
    kv_policy: dict[str, Any] | None = None  # how the cache is kept: {"name": ..., options}; None: as configured
    speculative: dict[str, Any] | None = None  # who guesses and how much: see engine.speculation; None: as configured
    constraint: CompiledConstraint | None = None
    pooling: PoolingParams | None = None  # the request ends after its prompt, with a pooled output and no token
    adapter: str = ""  # key of a loaded low-rank adapter (`AdapterInfo.key`); "" is the base model


class TokenLogprob(msgspec.Struct, frozen=True, array_like=True):
    """Log-probability of one token and its best alternatives, from the raw (unprocessed) distribution."""

    token_id: int
    logprob: float
    rank: int  # 1 is the most likely token
    top_ids: list[int]
    top_logprobs: list[float]


class SpeculationUsage(msgspec.Struct, frozen=True, kw_only=True):
    """What speculation did for a choice so far."""

    steps: int  # that checked guessed tokens
    drafted: int  # guessed tokens that were checked
    accepted: int  # those of them that were right
    by_source: dict[str, tuple[int, int]] = {}  # name of the drafter -> its drafted and accepted


class Rung(msgspec.Struct, frozen=True, kw_only=True):
    """What was done to the cache of a choice because memory was short."""

    policy: str
    at_token: int  # tokens of prompt and answer that were computed then


class KVUsage(msgspec.Struct, frozen=True, kw_only=True):
    """What a choice with a cache policy has taken so far. A slot holds one token in every layer and kv head."""

    policy: str
    peak_slots: int  # the most that it held at a time
    steady_slots: int  # that it holds now
    evicted_tokens: int  # computed and no longer in the cache
    merged_tokens: int = 0  # those of them that live on in the mean of others
    released_bytes: int  # given back before the end
    private_bytes: int  # held alone
    shared_bytes: int  # held together with the prefix cache
    bits_per_value: float  # of packed tokens, where there are any
    format: str = ""  # how older tokens are packed; "": they are not
    rungs: list[Rung] = []  # what was done because memory was short, in that order


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
    cache_miss: str | None = None  # why not all that could be: see engine.scheduling.prefix_cache.MISS_REASONS; once
    finish_reason: FinishReason | None = None
    stop_token_id: int | None = None  # the id that ended it, when one did
    error: str | None = None  # for "error": one of the `code`s of engine.errors
    queued_s: float | None = None  # arrival to first scheduling; with the first output
    num_preemptions: int = 0  # with the final output
    kv: KVUsage | None = None  # of a request with a cache policy; with every output, because any may be the last
    speculative: SpeculationUsage | None = None  # of a request that speculates; likewise
    pooled: bytes | None = None  # float32 little-endian, row by row; the whole output of a pooling request
    pooled_shape: tuple[int, ...] = ()


class ToolCallDelta(msgspec.Struct, frozen=True):
    """A piece of one tool call. `id` and `name` come once, with the first piece of an index."""

    index: int
    id: str | None = None
    name: str | None = None
    arguments: str = ""  # JSON text; the pieces joined are the whole


class Delta(msgspec.Struct, frozen=True):
    """What a piece of output means. The deltas of a stream joined are the whole answer."""

    content: str = ""
    reasoning: str = ""
    tool_calls: tuple[ToolCallDelta, ...] = ()

    @staticmethod
    def join(deltas: Sequence[Delta]) -> Delta:
        """Several in a row as one, with one piece per call."""
        if len(deltas) == 1:
            return deltas[0]
        calls: dict[int, list[ToolCallDelta]] = {}
        for delta in deltas:
            for call in delta.tool_calls:
                calls.setdefault(call.index, []).append(call)
        return Delta(
            content="".join([delta.content for delta in deltas]),
            reasoning="".join([delta.reasoning for delta in deltas]),
            tool_calls=tuple(
                ToolCallDelta(index, parts[0].id, parts[0].name, "".join([part.arguments for part in parts]))
                for index, parts in calls.items()
            ),
        )


class OutputParsing(msgspec.Struct, frozen=True, kw_only=True):
    """What to tell from content in a chat answer. The formats are the model's, see `engine.text.parsers`."""

    tools: tuple[dict[str, Any], ...] = ()  # function tools; without any, calls are not looked for
    has_reasoning: bool = True  # tell thinking from content
    tool_parser: str = ""  # by name, where a constraint makes calls come in another form than the model's own


class ChatPrompt(msgspec.Struct, frozen=True, kw_only=True):
    """Messages that the client renders through the model's chat template."""

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None = None
    documents: list[dict[str, Any]] | None = None
    template: str | None = None  # in place of the model's
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
    truncation_side: Literal["left", "right"] = "left"  # where tokens are dropped
    num_choices: int = 1
    priority: int = 0
    tenant: str = ""
    cache_salt: str = ""
    deadline_s: float | None = None
    client_request_id: str = ""  # a label for logs
    constraint: Constraint | None = None
    constraint_after: str | None = None  # the text, for instance </think>, after which the constraint applies
    adapter: str = ""  # name of a low-rank adapter; "" is the base model
    prompt_param: str = "prompt"  # which field to name in errors about the prompt
    parsing: OutputParsing | None = None  # None: the text is the answer
    max_thinking_tokens: int | None = None  # then the thinking is ended; for chat prompts
    kv_policy: dict[str, Any] | None = None
    speculative: dict[str, Any] | None = None


class TextPair(msgspec.Struct, frozen=True, kw_only=True):
    """Two texts that a cross-encoder reads together."""

    first: str
    second: str
    max_second_tokens: int | None = None  # the second text is cut to so many


class PoolingRequest(msgspec.Struct, frozen=True, kw_only=True):
    """A pooling request as the server sees it. What is None is the model's own choice."""

    prompt: str | list[int] | ChatPrompt | TextPair
    task: PoolingTask = "embed"
    activate: bool | None = None
    dimensions: int | None = None
    add_special_tokens: bool = True
    truncate_prompt_tokens: int | None = None  # -1: to what the model takes; special tokens are kept
    truncation_side: Literal["left", "right"] = "right"  # where tokens are dropped
    priority: int = 0
    tenant: str = ""
    cache_salt: str = ""
    deadline_s: float | None = None
    client_request_id: str = ""  # a label for logs
    prompt_param: str = "input"  # which field to name in errors about the prompt
    adapter: str = ""  # name of a low-rank adapter; "" is the base model


class PooledOutput(msgspec.Struct, frozen=True, kw_only=True):
    """The answer to a PoolingRequest: float32 little-endian numbers, row by row."""

    data: bytes
    shape: tuple[int, ...]
    num_prompt_tokens: int
    num_cached_tokens: int = 0
    queued_s: float | None = None
    num_preemptions: int = 0


class PoolingInfo(msgspec.Struct, frozen=True, kw_only=True):
    """What a model offers beside, or in place of, generating text."""

    tasks: list[PoolingTask]
    method: PoolingMethod  # of embeddings
    normalize: bool  # embeddings have length one unless a request asks otherwise
    embedding_size: int
    matryoshka: bool = False  # embeddings may be cut to any length
    matryoshka_dimensions: list[int] = []  # or to these
    labels: list[str] = []  # of the classifier
    activation: Literal["sigmoid", "softmax", "identity"] = "identity"  # of its scores
    prompts: dict[str, str] = {}  # name -> text that goes before an input
    default_prompt: str = ""  # the name of the one for inputs that name none; "" is none
    source: str = ""  # where the pooler comes from, for the start-up report


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
    cache_miss: str | None = None  # as in TokenOutput
    num_output_tokens: int = 0  # so far, of this choice
    num_reasoning_tokens: int = 0  # those of them that were thinking, its markers included
    delta: Delta | None = None  # what `text` means, when parsing was asked for
    prompt_token_ids: list[int] | None = None  # with the first output of a choice
    prompt_logprobs: list[LogprobEntry | None] | None = None
    error: str | None = None
    queued_s: float | None = None  # as in TokenOutput: with the first output
    num_preemptions: int = 0  # as in TokenOutput: with the final output
    kv: KVUsage | None = None  # as in TokenOutput: so far
    speculative: SpeculationUsage | None = None  # as in TokenOutput: so far

    @property
    def size_bytes(self) -> int:
        """About how much the piece will take on the wire, without its frame."""
        size = len(self.text) + 8 * len(self.token_ids)
        if self.logprobs:
            size += sum(64 * (1 + len(entry.top)) for entry in self.logprobs)
        return size

    @staticmethod
    def join(outputs: Sequence[TextOutput]) -> TextOutput:
        """Several of one choice, in a row, as one."""
        if len(outputs) == 1:
            return outputs[0]
        first, last = outputs[0], outputs[-1]
        logprobs = None
        if any(output.logprobs is not None for output in outputs):
            logprobs = [entry for output in outputs for entry in output.logprobs or ()]
        return msgspec.structs.replace(
            last,
            text="".join([output.text for output in outputs]),
            token_ids=[token_id for output in outputs for token_id in output.token_ids],
            logprobs=logprobs,
            delta=None if last.delta is None else Delta.join([output.delta for output in outputs if output.delta]),
            num_prompt_tokens=max(output.num_prompt_tokens for output in outputs),
            num_cached_tokens=max(output.num_cached_tokens for output in outputs),
            prompt_token_ids=first.prompt_token_ids,
            prompt_logprobs=first.prompt_logprobs,
            queued_s=first.queued_s,
            cache_miss=first.cache_miss,
        )


class AdapterInfo(msgspec.Struct, frozen=True, kw_only=True):
    """One loaded low-rank adapter."""

    name: str
    key: str  # of this version: another content has another key
    path: str  # as the operator gave it
    rank: int
    num_bytes: int
    created_s: int = 0  # seconds since the epoch


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
    max_pinned_blocks: int = 0  # those of them that no request can count on
    kv_cache_bytes: int
    weight_bytes: int
    eos_token_ids: list[int]
    kernels: dict[str, str] = {}  # op -> implementation, for the start-up report
    generation_defaults: dict[str, Any] = {}  # from generation_config.json
    can_generate: bool = True  # False: an encoder, or a checkpoint without a language head
    pooling: PoolingInfo | None = None  # None: it only generates
    adapters: list[AdapterInfo] = []  # loaded at start

    @property
    def kv_cache_tokens(self) -> int:
        """What requests can hold: block 0 is the null block."""
        return (self.num_blocks - 1 - self.max_pinned_blocks) * self.block_size


class CompressionCounts(msgspec.Struct, kw_only=True):
    """What the compactions of one cache policy have come to."""

    requests: int = 0  # by their first compaction
    compactions: int = 0
    evicted_tokens: int = 0
    released_bytes: int = 0


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
    num_shrunk: int = 0  # times that caches were compressed because memory was short
    rungs: dict[str, int] = {}  # those times, by policy
    compression: dict[str, CompressionCounts] = {}  # by policy
    prompt_tokens_computed: int = 0
    prompt_tokens_cached: int = 0
    generation_tokens: int = 0
    prefix_queries: int = 0
    prefix_hits: int = 0
    prefix_queried_tokens: int = 0
    prefix_hit_tokens: int = 0
    prefix_evicted_blocks: int = 0
    aborted_tokens: int = 0
    spec_steps: int = 0  # rows that checked a draft, summed over steps
    spec_emitted: int = 0  # tokens that came out of them
    spec_drafted: dict[str, int] = {}  # drafter -> nodes checked
    spec_accepted: dict[str, int] = {}
    spec_reached_at_depth: list[int] = []  # [i]: drafts whose path was accepted down to depth i and that went on
    spec_accepted_at_depth: list[int] = []  # those of them that were accepted at depth i + 1
    spec_proposed: dict[str, int] = {}  # drafter -> nodes guessed, checked or not
    spec_propose_seconds: list[float] = []  # since the last report: time to guess, per step
    spec_state_bytes: int = 0  # what drafters have learnt
    spec_expected_rate: float = 0.0  # tokens a second that the last selection of drafts counted on
    spec_selected_nodes: int = 0  # nodes in it
    spec_calibration_error: float = 0.0  # mean distance between predicted and observed acceptance
