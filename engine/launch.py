"""The only place that builds and wires both planes, and where every "auto" of the configuration becomes a value.

Importing it is cheap; torch and the model code load inside `build_core`.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from engine.config import Config
from engine.errors import ConfigError
from engine.types import ModelInfo

if TYPE_CHECKING:
    import torch

    from engine.core import EngineCore
    from engine.execution.runner import ModelRunner
    from engine.models.batch import KVSpec, Model

logger = logging.getLogger(__name__)

BUNDLED_MODELS = ("mimir", "mimir-draft")
MIB = 1024 * 1024

# phase ("loading", "warming"), detail, share done in [0, 1]
Progress = Callable[[str, str, float], None]


def resolve_model_path(name: str) -> Path:
    """A bundled model's name or a folder. Raises ConfigError with the remedy when there is no model."""
    if name in BUNDLED_MODELS:
        from engine.mimir import model_path

        return Path(model_path(name))
    path = Path(name)
    if not path.is_dir():
        raise ConfigError(
            f"model {name!r} is not a folder; give a folder with config.json and *.safetensors, or one of the bundled "
            f"models: {', '.join(BUNDLED_MODELS)}"
        )
    if not (path / "config.json").is_file():
        raise ConfigError(f"the model folder {name!r} has no config.json; is it the checkpoint's top folder?")
    return path


def build_core(config: Config, progress: Progress = lambda phase, detail, share: None) -> tuple[EngineCore, ModelInfo]:
    """Loads the model, sizes the cache and wires scheduler and runner. Raises ConfigError."""
    import kernels.backend
    from engine.models import load_model

    path = resolve_model_path(config.model.model)
    device = _resolve_device(config.model.device)
    _set_threads(config.runtime.threads)
    if config.runtime.kernel_backend != "auto":
        kernels.backend.use(config.runtime.kernel_backend)
    _check_weights_fit(path, device, config)
    progress("loading", "weights", 0.0)
    model = load_model(
        path,
        device=device,
        dtype=config.model.dtype,
        deterministic=config.runtime.deterministic,
        load_format=config.runtime.load_format,
        kind=config.model.load_adapter,
        progress=lambda done, total: progress("loading", "weights", done / max(total, 1)),
        seed=config.runtime.seed,
        max_model_len=config.model.max_model_len,
    )
    progress("warming", "kernels", 0.0)
    core, info = wire(model, config, device)
    progress("warming", "kernels", 1.0)
    return core, info


def wire(model: Model, config: Config, device: torch.device) -> tuple[EngineCore, ModelInfo]:
    """Puts a loaded model, a cache, a runner and a scheduler together, and runs them once."""
    import kernels.backend
    from engine.core import EngineCore
    from engine.execution import kv_cache
    from engine.execution.rows import RowTable
    from engine.execution.runner import ModelRunner
    from engine.execution.sampler import Sampler
    from engine.scheduling.scheduler import Scheduler

    cache_dtype = _resolve_cache_dtype(config.cache.kv_cache_dtype, device, model)
    size = _size_cache(config, model.spec, cache_dtype, device, model.max_model_len)
    block_size, num_rows = config.cache.block_size, config.scheduler.max_num_seqs
    runner = ModelRunner(
        model,
        kv_cache.allocate(model.spec, size.num_blocks, block_size, cache_dtype, device),
        Sampler(model.logits_size, num_rows, device, model.eos_token_ids),
        RowTable(num_rows, size.max_model_len, block_size),
        device,
    )
    _warm_up(runner)
    scheduler = Scheduler(
        config.scheduler,
        config.cache,
        num_blocks=size.num_blocks,
        max_model_len=size.max_model_len,
        eos_token_ids=model.eos_token_ids,
    )
    info = ModelInfo(
        architecture=model.architecture,
        dtype=model.dtype_name,
        device=str(device),
        vocab_size=model.vocab_size,
        logits_size=model.logits_size,
        max_model_len=size.max_model_len,
        num_layers=model.spec.num_layers,
        block_size=block_size,
        num_blocks=size.num_blocks,
        kv_cache_bytes=size.num_blocks * block_size * kv_cache.bytes_per_token(model.spec, cache_dtype),
        weight_bytes=model.weight_bytes,
        eos_token_ids=list(model.eos_token_ids),
        kernels={op: kernels.backend.select(op, device) for op in kernels.backend.operations()},
        generation_defaults=dict(model.generation_defaults) if config.model.generation_config == "auto" else {},
    )
    return EngineCore(scheduler, runner), info


@dataclass(frozen=True)
class CacheSize:
    num_blocks: int
    max_model_len: int


def _resolve_device(name: str) -> torch.device:
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device is 'cuda' but torch finds no CUDA device; install a CUDA build of torch or use cpu")
    return torch.device(name)


def _set_threads(threads: int | None) -> None:
    import torch

    torch.set_num_threads(threads or len(os.sched_getaffinity(0)))


def _resolve_cache_dtype(name: str, device: torch.device, model: Model) -> torch.dtype:
    import torch

    if name != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[name]
    # on CPU activations are fp32 whatever the weights are: an fp32 cache keeps the answers those of the plain model
    return torch.float32 if device.type == "cpu" else model.dtype


def _check_weights_fit(path: Path, device: torch.device, config: Config) -> None:
    """Refuses before loading when the files alone exceed the memory that is free."""
    if device.type != "cpu" or config.runtime.load_format == "dummy":
        return
    needed = sum(file.stat().st_size for file in path.glob("*.safetensors"))
    if config.model.dtype == "float32":
        needed *= 2  # 16-bit files become 32-bit weights
    free = _free_memory(device)
    if needed > free:
        raise ConfigError(
            f"the weights need about {needed // MIB} MiB and {free // MIB} MiB of memory are free; "
            "free some memory or choose a smaller model"
        )


def _free_memory(device: torch.device) -> int:
    """Bytes that may be taken on the device, container limits included."""
    import psutil
    import torch

    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    free = int(psutil.virtual_memory().available)
    limit = _cgroup_headroom()
    return free if limit is None else min(free, limit)


def _cgroup_headroom() -> int | None:
    """Bytes left under the container's memory limit, or None when there is none."""
    root = Path("/sys/fs/cgroup")
    for limit_name, used_name in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        limit_file, used_file = root / limit_name, root / used_name
        if limit_file.is_file() and used_file.is_file():
            limit = limit_file.read_text().strip()
            if limit != "max" and int(limit) < 1 << 60:
                return max(int(limit) - int(used_file.read_text()), 0)
    return None


def _size_cache(config: Config, spec: KVSpec, dtype: torch.dtype, device: torch.device, model_len: int) -> CacheSize:
    """How many blocks, and how long a request may be. Raises ConfigError when not even one request fits."""
    from engine.execution.kv_cache import bytes_per_token

    asked_len = config.model.max_model_len
    max_len = min(asked_len or model_len, model_len)
    if asked_len is not None and asked_len > model_len:
        raise ConfigError(
            f"max_model_len is {asked_len}, but the model declares {model_len} positions; use that or less"
        )
    block_size = config.cache.block_size
    block_bytes = block_size * bytes_per_token(spec, dtype)
    free = _free_memory(device)
    blocks_per_request = -(-max_len // block_size)
    if config.cache.num_blocks is not None:
        num_blocks = config.cache.num_blocks
    elif config.cache.kv_cache_memory_mib is not None:
        num_blocks = config.cache.kv_cache_memory_mib * MIB // block_bytes
    else:
        # more than every row at full length could never be used
        useful = blocks_per_request * config.scheduler.max_num_seqs + 1
        num_blocks = min(int(free * config.cache.kv_cache_memory_fraction) // block_bytes, useful)
    if num_blocks * block_bytes > free:
        raise ConfigError(
            f"a KV cache of {num_blocks} blocks needs {num_blocks * block_bytes // MIB} MiB and {free // MIB} MiB are "
            "free; lower --num-blocks or --kv-cache-memory-mib"
        )
    usable_tokens = (num_blocks - 1) * block_size  # block 0 is the null block
    if usable_tokens < min(max_len, 2 * block_size):
        raise ConfigError(
            f"the KV cache holds {max(usable_tokens, 0)} tokens, too few to serve any request; raise "
            "--kv-cache-memory-mib or --num-blocks"
        )
    if usable_tokens < max_len:
        if asked_len is not None:
            raise ConfigError(
                f"the KV cache holds {usable_tokens} tokens, fewer than max_model_len {max_len}; lower --max-model-len "
                "or raise --kv-cache-memory-mib"
            )
        logger.warning("max_model_len reduced from %d to %d: that is what the KV cache holds", max_len, usable_tokens)
        max_len = usable_tokens
    return CacheSize(num_blocks=num_blocks, max_model_len=max_len)


def _warm_up(runner: ModelRunner) -> None:
    """One prompt step and one decode step: first-call costs are paid before ready, and a broken model shows."""
    from engine.scheduling.plan import Chunk, NewRow, StepPlan
    from engine.types import SamplingParams

    prompt = [1, 1]
    new = NewRow(
        row=0,
        request_id="warm-up",
        choice=0,
        token_ids=prompt,
        num_prompt_tokens=len(prompt),
        sampling=SamplingParams(temperature=0.0),
        block_ids=(),
        num_computed=0,
    )
    first = Chunk(row=0, start=0, num_tokens=2, new_block_ids=(1,), is_sampling=True, output_index=0)
    second = Chunk(row=0, start=2, num_tokens=1, new_block_ids=(2,), is_sampling=True, output_index=1)
    for plan in (StepPlan(chunks=(first,), new_rows=(new,)), StepPlan(chunks=(second,)), StepPlan(freed_rows=(0,))):
        errors = [chunk.error for chunk in runner.execute(plan).chunks if chunk.error]
        if errors:
            raise ConfigError(f"the model fails on a first short prompt ({errors[0]}); are the weights complete?")
