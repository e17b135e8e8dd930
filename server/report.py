"""What the operator sees once the model is loaded."""

from __future__ import annotations

from engine.types import ModelInfo, PoolingInfo

MIB = 1024 * 1024


def startup_report(info: ModelInfo, model_name: str, url: str, *, max_num_seqs: int) -> str:
    """A few lines of text: model, kernels, cache and address."""
    tokens = info.kv_cache_tokens
    cache = f"{tokens} tokens in blocks of {info.block_size}, {info.kv_cache_bytes / MIB:.1f} MiB"
    lengths = sorted({max(info.max_model_len // divisor, 1) for divisor in (1, 4, 16)}, reverse=True)
    num_blocks = tokens // info.block_size
    fits = ", ".join(f"{num_blocks // -(-length // info.block_size)} of {length} tokens" for length in lengths)
    kernels = ", ".join(f"{op} {name}" for op, name in sorted(info.kernels.items()))
    lines = [
        f"ready: {model_name} ({info.architecture}, {info.dtype} on {info.device}, {info.weight_bytes / MIB:.1f} MiB)",
        f"kernels: {kernels or 'none reported'}",
    ]
    if info.kv_cache_bytes:
        lines.append(f"KV cache: {cache}")
        lines.append(
            f"requests that the cache holds at once: {fits}; at most {max_num_seqs} run in one step (--max-num-seqs)"
        )
    else:
        lines.append(f"reads whole texts of up to {info.max_model_len} tokens, at most {max_num_seqs} in one step")
    if info.pooling is not None:
        lines.append(_pooling_line(info.pooling, can_generate=info.can_generate))
    if info.generation_defaults:
        defaults = ", ".join(f"{name}={value}" for name, value in sorted(info.generation_defaults.items()))
        lines.append(f"sampling defaults of the model: {defaults} (--generation-config none turns them off)")
    lines.append(f"API: {url}/v1")
    return "\n  ".join(lines)


def _pooling_line(pooling: PoolingInfo, *, can_generate: bool) -> str:
    parts = []
    if "embed" in pooling.tasks:
        length = "of length one" if pooling.normalize else "not normalised"
        parts.append(f"embeddings of {pooling.embedding_size} numbers, {length}, by {pooling.method}")
    if "classify" in pooling.tasks:
        parts.append(f"{len(pooling.labels)} classes, {pooling.activation}")
    beside = "beside generation" if can_generate else "no generation"
    return f"pooling: {'; '.join(parts)} ({pooling.source}; {beside})"
