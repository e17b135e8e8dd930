"""What the machine gives to an engine: cores, memory, and how large a cache fits. Container limits count.

Importing it is cheap; torch loads inside the functions that need it.
"""

from __future__ import annotations

import logging
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from engine.config import Config
from engine.errors import ConfigError

if TYPE_CHECKING:
    import torch

    from engine.models.batch import KVSpec

logger = logging.getLogger(__name__)

CGROUP = Path("/sys/fs/cgroup")
MIB = 1024 * 1024
QUANTIZED_BYTES = {"int8": 1.02, "int4": 0.57}  # a weight, with its share of a scale


@dataclass(frozen=True)
class CacheSize:
    num_blocks: int
    max_model_len: int


def num_cores(root: Path = CGROUP) -> int:
    """Cores that this process may use: more threads than a container's share of them would wait for each other."""
    cores = len(os.sched_getaffinity(0))
    if (root / "cpu.max").is_file():
        quota, period = (root / "cpu.max").read_text().split()
        if quota != "max":
            cores = min(cores, max(1, round(int(quota) / int(period))))
    return cores


def check_weights_fit(path: Path, device: torch.device, config: Config) -> None:
    """Refuses before loading when the weights alone exceed the memory that is free. Raises ConfigError."""
    if device.type != "cpu" or config.runtime.load_format == "dummy":
        return
    from engine.models.safetensors_file import ITEM_BYTES, read_checkpoint

    bytes_each = {"float32": 4, "bfloat16": 2, "float16": 2}.get(config.model.dtype)
    rounded = QUANTIZED_BYTES.get(config.model.quantization)
    needed = 0
    for name, entry in read_checkpoint(path).items():
        width: float = bytes_each or ITEM_BYTES[entry.dtype]
        if rounded is not None and len(entry.shape) == 2 and "embed" not in name:
            width = rounded
        needed += math.ceil(entry.num_bytes // ITEM_BYTES[entry.dtype] * width)
    free = free_memory(device)
    if needed > free:
        raise ConfigError(
            f"the weights need about {-(-needed // MIB)} MiB and {free // MIB} MiB of memory are free; "
            "free some memory or choose a smaller model"
        )


def free_memory(device: torch.device) -> int:
    """Bytes that may be taken on the device, container limits included."""
    import psutil
    import torch

    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    free = int(psutil.virtual_memory().available)
    limit = cgroup_headroom()
    return free if limit is None else min(free, limit)


def cgroup_headroom(root: Path = CGROUP) -> int | None:
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


def size_cache(config: Config, spec: KVSpec, dtype: torch.dtype, device: torch.device, model_len: int) -> CacheSize:
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
    free = free_memory(device)
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
