"""The only place that builds and wires both planes, and where every "auto" of the configuration becomes a value.

Importing it is cheap; torch and the model code load inside `build_core`.
"""

from __future__ import annotations

import importlib.util
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm import tqdm

from engine.config import Config
from engine.errors import ConfigError
from engine.mimir import MODELS, model_path
from engine.types import ModelInfo

if TYPE_CHECKING:
    import torch

    from engine.core import EngineCore
    from engine.execution.runner import ModelRunner
    from engine.models.batch import KVSpec, Model

logger = logging.getLogger(__name__)

MIB = 1024 * 1024
CGROUP = Path("/sys/fs/cgroup")  # limits of the container, as it sees them

# phase ("loading", "warming"), detail, share done in [0, 1]
Progress = Callable[[str, str, float], None]


def resolve_model_path(name: str) -> Path:
    """A bundled model's name or a folder. Raises ConfigError with the remedy when there is no model."""
    if name in MODELS:
        return model_path(name)
    path = Path(name)
    if not path.is_dir():
        raise ConfigError(
            f"model {name!r} is not a folder; give a folder with config.json and *.safetensors, or one of the bundled "
            f"models: {', '.join(MODELS)}"
        )
    if not (path / "config.json").is_file():
        raise ConfigError(f"the model folder {name!r} has no config.json; is it the checkpoint's top folder?")
    return path


def build_core(config: Config, progress: Progress = lambda phase, detail, share: None) -> tuple[EngineCore, ModelInfo]:
    """Loads the model, sizes the cache and wires scheduler and runner. Raises ConfigError."""
    _check_import_name()
    import kernels.backend
    from engine.models import load_model

    path = resolve_model_path(config.model.model)
    device = _resolve_device(config.model.device)
    _set_threads(config.runtime.threads)
    if config.runtime.kernel_backend != "auto":
        kernels.backend.use(config.runtime.kernel_backend)
    _check_weights_fit(path, device, config)
    with tqdm(desc="weights", unit="B", unit_scale=True, disable=None, leave=False) as bar:  # None: on terminals only

        def report(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)
            progress("loading", "weights", done / max(total, 1))

        report(0, 0)
        model = load_model(
            path,
            device=device,
            dtype=config.model.dtype,
            deterministic=config.runtime.deterministic,
            load_format=config.runtime.load_format,
            kind=config.model.load_adapter,
            progress=report,
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
    _warm_up(runner, size.max_model_len, block_size)
    scheduler = Scheduler(
        config.scheduler,
        config.cache,
        num_blocks=size.num_blocks,
        max_model_len=size.max_model_len,
        eos_token_ids=model.eos_token_ids,
        model_name=config.model.model,
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


def _check_import_name() -> None:
    """Another distribution has our import name `kernels`. Raises ConfigError when its files hide ours."""
    try:
        metadata.version("kernels")
    except metadata.PackageNotFoundError:
        return
    problem = "the distribution 'kernels' is installed here and shares the import name of our kernels"
    remedy = "run `pip uninstall kernels`, then install kvasir-llm again"
    if importlib.util.find_spec("kernels.backend") is None:
        raise ConfigError(f"{problem}, which it hides; {remedy}")
    logger.warning("%s; one may overwrite the other: %s", problem, remedy)


def _resolve_device(name: str) -> torch.device:
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device is 'cuda' but torch finds no CUDA device; install a CUDA build of torch or use cpu")
    return torch.device(name)


def _set_threads(threads: int | None) -> None:
    import torch

    torch.set_num_threads(threads or _num_cores())


def _num_cores(root: Path = CGROUP) -> int:
    """Cores that this process may use: more threads than a container's share of them would wait for each other."""
    cores = len(os.sched_getaffinity(0))
    if (root / "cpu.max").is_file():
        quota, period = (root / "cpu.max").read_text().split()
        if quota != "max":
            cores = min(cores, max(1, round(int(quota) / int(period))))
    return cores


def _resolve_cache_dtype(name: str, device: torch.device, model: Model) -> torch.dtype:
    import torch

    if name != "auto":
        dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[name]
        if model.dtype not in (torch.float32, dtype):
            raise ConfigError(
                f"kv_cache_dtype is {name!r}, but the model computes in {model.dtype} and its attention reads a cache "
                "of that type only; use auto"
            )
        return dtype
    # on CPU activations are fp32 whatever the weights are: an fp32 cache keeps the answers those of the plain model
    return torch.float32 if device.type == "cpu" else model.dtype


def _check_weights_fit(path: Path, device: torch.device, config: Config) -> None:
    """Refuses before loading when the weights alone exceed the memory that is free. Raises ConfigError."""
    if device.type != "cpu" or config.runtime.load_format == "dummy":
        return
    from engine.models.safetensors_file import ITEM_BYTES, read_checkpoint

    bytes_each = {"float32": 4, "bfloat16": 2, "float16": 2}.get(config.model.dtype)
    entries = read_checkpoint(path).values()
    needed = sum(
        entry.num_bytes // ITEM_BYTES[entry.dtype] * (bytes_each or ITEM_BYTES[entry.dtype]) for entry in entries
    )
    free = _free_memory(device)
    if needed > free:
        raise ConfigError(
            f"the weights need about {-(-needed // MIB)} MiB and {free // MIB} MiB of memory are free; "
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


def _cgroup_headroom(root: Path = CGROUP) -> int | None:
    """Bytes left under the container's memory limit, or None when there is none.

    Cached file pages count as used there, though the kernel gives them back on demand: a container that has read its
    weights would look full.
    """
    for limit_name, used_name, stat_name, cached_key in (
        ("memory.max", "memory.current", "memory.stat", "inactive_file"),  # version 2
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat", "total_inactive_file"),
    ):
        files = root / limit_name, root / used_name, root / stat_name
        if all(file.is_file() for file in files):
            limit, used, stat = (file.read_text().strip() for file in files)
            if limit != "max" and int(limit) < 1 << 60:
                cached = next(
                    (int(line.split()[1]) for line in stat.splitlines() if line.startswith(f"{cached_key} ")), 0
                )
                return max(int(limit) - int(used) + cached, 0)
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
            f"a KV cache of {num_blocks} blocks needs {-(-num_blocks * block_bytes // MIB)} MiB and {free // MIB} MiB "
            "are free; lower --num-blocks or --kv-cache-memory-mib"
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


def _warm_up(runner: ModelRunner, max_model_len: int, block_size: int) -> None:
    """One prompt step and one decode step: first-call costs are paid before ready, and a broken model shows."""
    from engine.scheduling.plan import Chunk, NewRow, StepPlan
    from engine.types import SamplingParams

    prompt = [1] * min(2, max_model_len - 1)
    blocks = tuple(range(1, 2 + len(prompt) // block_size))  # the null block is not written
    num_first = -(-len(prompt) // block_size)
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
    first = Chunk(0, 0, len(prompt), blocks[:num_first], is_sampling=True, output_index=0)
    second = Chunk(0, len(prompt), 1, blocks[num_first:], is_sampling=True, output_index=1)
    for plan in (StepPlan(chunks=(first,), new_rows=(new,)), StepPlan(chunks=(second,)), StepPlan(freed_rows=(0,))):
        errors = [chunk.error for chunk in runner.execute(plan).chunks if chunk.error]
        if errors:
            raise ConfigError(f"the model fails on a first short prompt ({errors[0]}); are the weights complete?")
