"""All settings, as frozen dataclasses: TOML file, then KVASIR_* variables, then flags, the later one wins.

Each field is an option: its name (with dashes) is the flag, `KVASIR_` plus its upper-case name the variable, and its
section the TOML table. Names carry the unit. Nothing edits a config after `load`; what "auto" means is decided in one
place, `engine.launch`.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any


def option(
    default: Any,
    help: str,
    *,
    choices: tuple[str, ...] | None = None,
    secret: bool = False,
    low: float | None = None,
    high: float | None = None,
) -> Any:
    """A dataclass field that the command line, the environment and TOML files can set; low <= value <= high."""
    metadata = {"help": help, "choices": choices, "secret": secret, "low": low, "high": high}
    if isinstance(default, (list, dict)):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Which weights, in which precision."""

    model: str = option("mimir", "a folder with safetensors and config.json, or 'mimir' or 'mimir-draft' (bundled)")
    served_model_name: tuple[str, ...] = option((), "name or names that clients use; default: the folder's name")
    tokenizer: str | None = option(None, "folder of the tokenizer; default: the model's")
    dtype: str = option(
        "auto",
        "compute and weight precision; on CPU auto keeps 16-bit checkpoints at 16 bits and activations at fp32, and "
        "bfloat16 also rounds activations at every product: half the time of a prompt where the CPU has AVX512-BF16",
        choices=("auto", "float32", "bfloat16", "float16"),
    )
    quantization: str = option(
        "none",
        "round weights while loading, on CPU: int8 halves their memory and reading them, int4 quarters both and costs "
        "quality; activations are rounded to 8 bits token by token",
        choices=("none", "int8", "int4"),
    )
    device: str = option("auto", "where the model runs", choices=("auto", "cpu", "cuda"))
    max_model_len: int | None = option(None, "tokens of prompt plus output; default: what the model declares", low=2)
    chat_template: str | None = option(None, "file with a Jinja chat template; default: the tokenizer's")
    tool_call_parser: str = option("auto", "format of tool calls; auto: as the chat template has it, none, or a name")
    reasoning_parser: str = option("auto", "format of thinking; auto: as the chat template has it, none, or a name")
    generation_config: str = option(
        "auto", "auto: take sampling defaults from the model's generation_config.json", choices=("auto", "none")
    )
    pooling: str = option(
        "auto",
        "how hidden states become embeddings; auto: as the checkpoint says, none: embeddings are off, the others also "
        "turn a generative model into an embedder",
        choices=("auto", "none", "last", "mean", "cls", "weighted"),
    )
    matryoshka: bool = option(
        False, "let requests shorten embeddings (dimensions) of a model whose config.json does not say that one may"
    )
    load_adapter: str = option(
        "auto",
        "native: our decoder; transformers: run the model through the transformers adapter",
        choices=("auto", "native", "transformers"),
    )


@dataclass(frozen=True, kw_only=True)
class CacheConfig:
    """The KV cache pool."""

    block_size: int = option(16, "tokens per cache block", low=1, high=1024)
    num_blocks: int | None = option(None, "blocks in the pool; default: as many as kv-cache-memory-mib holds", low=2)
    kv_cache_memory_mib: int | None = option(None, "memory for the pool; default: a share of what is free", low=1)
    kv_cache_memory_fraction: float = option(
        0.4, "share of free memory to take when no size is given", low=0.01, high=0.95
    )
    kv_cache_dtype: str = option(
        "auto", "precision of cached keys and values", choices=("auto", "float32", "bfloat16", "float16")
    )
    enable_prefix_cache: bool = option(True, "reuse the blocks of equal prompt beginnings")
    kv_policy: str = option(
        "full",
        "how caches of requests that do not choose are kept: a policy's name, or a JSON object with name and options; "
        "full: everything stays",
    )
    kv_policies: tuple[str, ...] = option(("all",), "policies that requests may choose: names, all or none")
    kv_artefacts: str | None = option(
        None, "file that `kvasir calibrate` wrote for this model; default: kv_artefacts.json in its folder, if there"
    )
    pressure_policy: str = option(
        "",
        "when memory runs short, shrink caches of requests that may before anybody is preempted: names in order, a "
        "format and then a policy that evicts, or a JSON list of names and objects with options; default: never",
    )
    max_pinned_blocks: int = option(
        0, "blocks that operators may pin in the prefix cache; requests cannot count on them", low=0
    )


@dataclass(frozen=True, kw_only=True)
class SchedulerConfig:
    """Who runs in a step, and how many may wait."""

    max_num_seqs: int = option(64, "requests in one step", low=1, high=4096)
    max_num_batched_tokens: int = option(512, "tokens in one step; long prompts run in chunks of at most this", low=1)
    max_waiting_requests: int = option(256, "requests that may wait; beyond it clients get 429", low=1)
    max_waiting_pools: float = option(
        4.0, "prompt tokens that may wait, as a multiple of the pool; beyond it 429", low=0.01
    )
    max_queue_wait_s: float = option(60.0, "longest wait for the first step; beyond it 503", low=0.001)
    max_request_s: float = option(600.0, "longest life of a request; beyond it 504 or an error event", low=0.001)
    protect_after_preemptions: int = option(3, "a request preempted this often is not preempted again", low=0)


@dataclass(frozen=True, kw_only=True)
class RuntimeConfig:
    """How the engine process runs."""

    threads: int | None = option(None, "CPU threads for kernels; default: all cores it may use", low=1)
    deterministic: bool = option(False, "kernels whose result for a row does not depend on the other rows; slower")
    kernel_backend: str = option(
        "auto", "implementation of the kernels", choices=("auto", "cpp", "torch", "triton", "reference")
    )
    cuda_graphs: str = option(
        "auto",
        "replay recorded launches for steps that only decode; auto: on CUDA, where the model can be recorded",
        choices=("auto", "on", "off"),
    )
    overlap: str = option(
        "auto",
        "plan the next step while the device runs one; auto: on CUDA; on works anywhere, but gains nothing on CPU",
        choices=("auto", "on", "off"),
    )
    seed: int = option(0, "seed of randomly initialised weights and of warm-up")
    load_format: str = option(
        "safetensors", "safetensors, or dummy for random weights", choices=("safetensors", "dummy")
    )
    jump_ahead: bool = option(True, "append tokens that a grammar leaves no choice about without a step for each")
    heartbeat_s: float = option(0.2, "how often the engine reports that it lives", low=0.01)
    hang_timeout_s: float = option(30.0, "no progress for so long with work pending: the engine is restarted", low=0.1)
    profile_folder: str | None = option(None, "where POST /start_profile writes traces; default: profiling is off")
    faults: str = option("", "inject faults for tests (point:when:count, comma separated); loopback only")


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Low-rank adapters on top of the model."""

    enable_lora: bool = option(False, "serve low-rank adapters (PEFT's LoRA) as models of their own")
    max_lora_adapters: int = option(8, "adapters loaded at a time", low=1, high=1024)
    max_lora_rank: int = option(64, "largest rank of an adapter", low=1, high=256)
    lora_root: str | None = option(
        None, "folder below which adapters may be loaded while the server runs; default: they may not"
    )
    lora_adapters: tuple[str, ...] = option((), "adapters loaded at start, as name=folder")


@dataclass(frozen=True, kw_only=True)
class SpeculationConfig:
    """Guessing tokens ahead. The output is the same with and without."""

    speculative: tuple[str, ...] = option(
        (), "drafters of requests that do not choose, in order of preference; default: they do not speculate"
    )
    speculative_allowed: tuple[str, ...] = option(("all",), "drafters that requests may choose: names, all or none")
    speculative_max_nodes: int = option(8, "guessed tokens of one request in one step", low=1, high=512)
    speculative_max_nodes_limit: int = option(64, "most that a request may ask for as max_nodes", low=1, high=512)
    speculative_budget: str = option(
        "auto",
        "auto: guess as much as pays off by the times that steps take; fixed: whatever requests ask for, up to "
        "speculative-max-rows",
        choices=("auto", "fixed"),
    )
    speculative_max_rows: int = option(
        8, "with the fixed budget: token streams in a step beyond which nothing is guessed", low=0
    )
    speculative_draft_model: str = option(
        "auto",
        "small model that some drafters guess with: a folder with the same tokenizer, or a bundled model; auto: "
        "mimir-draft for mimir; none: such drafters are not offered",
    )
    speculative_draft_cache_tokens: int = option(
        32768, "tokens that the draft model's own cache holds, taken from memory before the KV cache", low=16
    )
    speculative_eagle_head: str = option(
        "auto",
        "head of the eagle drafter: a folder of `kvasir train-drafter`; auto: the folder eagle in the model's own; "
        "none: the drafter is not offered",
    )


@dataclass(frozen=True, kw_only=True)
class ServerConfig:
    """The HTTP front end."""

    host: str = option("127.0.0.1", "address to bind; another than loopback needs api keys or allow-unauthenticated")
    port: int = option(8000, "port to bind", low=0, high=65535)
    api_keys: tuple[str, ...] = option((), "accepted keys (at least 32 characters each)", secret=True)
    api_key_file: str | None = option(
        None,
        "file with one accepted key per line, and after it, if need be, limits of its own: requests_per_minute=60 "
        "tokens_per_minute=10000 max_in_flight=4",
    )
    key_requests_per_minute: int | None = option(None, "requests of one API key per minute", low=1)
    key_tokens_per_minute: int | None = option(None, "prompt and output tokens of one API key per minute", low=1)
    admin_api_keys: tuple[str, ...] = option(
        (), "keys that may also use the routes that change the server (at least 32 characters each)", secret=True
    )
    allow_unauthenticated: bool = option(False, "serve without keys on a public address")
    metrics_port: int | None = option(
        None, "serve /metrics on a loopback port of its own instead of the API port", low=0, high=65535
    )
    metrics_compat: str = option("", "also expose another server's metric names", choices=("", "vllm"))
    root_path: str = option("", "path prefix that a proxy strips")
    cors_origins: tuple[str, ...] = option((), "origins that browsers may call from")
    enable_docs: bool = option(False, "serve /docs and /openapi.json")
    keep_alive_s: int = option(75, "idle seconds before a connection is closed", low=1)
    drain_timeout_s: float = option(30.0, "seconds that running requests get after SIGTERM", low=0)
    sse_ping_s: float = option(15.0, "send an SSE comment after so many silent seconds", low=0.1)
    strict_max_tokens: bool = option(False, "400 instead of clamping when prompt plus max_tokens exceed the context")
    default_max_tokens: int = option(4096, "output tokens of a chat request that names none", low=1)
    trust_request_chat_template: bool = option(False, "let requests bring a chat template of their own")
    data_folder: str | None = option(
        None, "folder, private to this server, for files and batches; default: /v1/files and /v1/batches are off"
    )
    batch_rows: float = option(0.75, "share of the rows of a step that batches may take", low=0.01, high=1.0)
    batch_memory: float = option(0.9, "share of the KV cache that batches may be expected to fill", low=0.01, high=1.0)
    ready_heartbeat_s: float = option(5.0, "/readyz turns 503 when the engine was not heard of for so long", low=0.1)
    log_level: str = option("info", "log level", choices=("debug", "info", "warning", "error"))
    log_format: str = option("text", "log lines for people, or one JSON object per line", choices=("text", "json"))


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Bounds on what a client may send. Each is tested at its edge over HTTP."""

    max_body_bytes: int = option(8 * 1024 * 1024, "request body", low=0)
    max_json_depth: int = option(64, "nesting of a JSON body", low=0)
    max_json_items: int = option(200_000, "objects, arrays and keys of a JSON body", low=0)
    max_header_bytes: int = option(32 * 1024, "request head", low=256)
    max_header_fields: int = option(64, "header fields", low=0)
    max_url_bytes: int = option(4096, "path and query", low=16)
    max_messages: int = option(2048, "messages of a chat request", low=0)
    max_content_parts: int = option(256, "parts of one message", low=0)
    max_tools: int = option(128, "tools of a chat request", low=0)
    max_metadata: int = option(16, "entries of metadata", low=0)
    max_prompts: int = option(32, "prompts of a completion request", low=0)
    max_choices: int = option(16, "n and best_of", low=0)
    max_pooling_inputs: int = option(2048, "texts of an embedding, pooling, score or rerank request", low=0)
    max_total_choices: int = option(64, "prompts times n", low=0)
    max_completion_logprobs: int = option(5, "logprobs of a completion request", low=0)
    max_top_logprobs: int = option(20, "top_logprobs of a chat request, prompt_logprobs of either", low=0)
    max_stop_strings: int = option(4, "stop strings", low=0)
    max_stop_chars: int = option(256, "characters of a stop string", low=0)
    max_stop_token_ids: int = option(128, "stop_token_ids", low=0)
    max_logit_bias: int = option(1024, "entries of logit_bias and of allowed_token_ids", low=0)
    max_bad_words: int = option(256, "bad_words", low=0)
    max_label_chars: int = option(128, "characters of a request id, cache_salt or user", low=0)
    max_prompt_bytes_per_token: int = option(
        16, "text longer than this times max_model_len is not tokenized at all", low=0
    )
    max_template_kwargs: int = option(32, "chat_template_kwargs entries", low=0)
    max_stored_responses: int = option(256, "stored responses of one API key; 0 turns the store off", low=0)
    max_stored_response_bytes: int = option(32 * 1024 * 1024, "stored responses of one API key, in bytes", low=0)
    stored_response_ttl_s: float = option(3600.0, "a stored response is forgotten after so long", low=0)
    max_file_bytes: int = option(200 * 1024 * 1024, "an uploaded file", low=0)
    max_files: int = option(1000, "files of one API key, those that batches write not counted", low=0)
    max_stored_file_bytes: int = option(4 * 1024 * 1024 * 1024, "files of one API key, in bytes", low=0)
    stored_file_ttl_s: float = option(30 * 86400.0, "a file is deleted after so long, unless it says otherwise", low=0)
    max_uploads: int = option(4, "uploads at a time; beyond it 503", low=1)
    upload_timeout_s: float = option(600.0, "arrival of an uploaded file", low=0)
    max_batch_lines: int = option(50_000, "requests of a batch", low=0)
    max_batches: int = option(32, "unfinished batches of one API key", low=0)
    tokenize_timeout_s: float = option(5.0, "tokenizing one prompt", low=0)
    template_timeout_s: float = option(1.0, "rendering one chat template", low=0)
    max_constraint_bytes: int = option(64 * 1024, "a schema, regular expression or grammar", low=0)
    max_schema_depth: int = option(32, "nesting of a schema", low=0)
    max_schema_nodes: int = option(4096, "objects, arrays and values of a schema", low=0)
    max_schema_choices: int = option(1000, "entries of an enum, or of a list of choices", low=0)
    max_choice_bytes: int = option(2048, "one such entry", low=0)
    max_choices_bytes: int = option(16 * 1024, "all entries of one such list", low=0)
    max_repeat: int = option(1024, "counted repeats in a regular expression or grammar", low=0)
    constraint_cpu_s: float = option(0.8, "processor time of compiling one constraint", low=0)
    constraint_timeout_s: float = option(2.0, "compiling one constraint", low=0)
    constraint_memory_mib: int = option(256, "memory of compiling one constraint", low=1)
    max_queued_constraints: int = option(16, "constraints that wait to be compiled; beyond it 429", low=1)
    max_in_flight_per_key: int = option(64, "requests of one API key", low=0)
    max_unsent_bytes: int = option(256 * 1024, "output waiting for a slow reader", low=0)
    read_stall_s: float = option(30.0, "a reader that takes nothing for so long is dropped", low=0)
    header_timeout_s: float = option(10.0, "arrival of the request head", low=0)
    body_timeout_s: float = option(30.0, "arrival of the request body", low=0)


@dataclass(frozen=True, kw_only=True)
class Config:
    """The whole configuration, one section per concern."""

    model: ModelConfig = field(default_factory=ModelConfig)
    cache: CacheConfig = field(default_factory=CacheConfig)
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    speculation: SpeculationConfig = field(default_factory=SpeculationConfig)
    server: ServerConfig = field(default_factory=ServerConfig)
    limits: Limits = field(default_factory=Limits)


def sections(config_type: type[Config] = Config) -> dict[str, type]:
    """Section name -> dataclass, in the order of the help text."""
    return {f.name: f.default_factory for f in dataclasses.fields(config_type)}  # type: ignore[misc]
