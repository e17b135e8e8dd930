"""llama.cpp's `llama-server`; the user builds it, for instance from the source distribution of `llama-cpp-python`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from loadtest.peers.gguf import convert
from loadtest.peers.server import PeerServer, Settings, executable, loopback, running

REMEDY = (
    "give llama-server or the folder that holds it. To build it: `pip download --no-deps --no-binary :all: "
    "llama-cpp-python`, unpack, then in vendor/llama.cpp `cmake -B build -DCMAKE_BUILD_TYPE=Release -DLLAMA_CURL=OFF "
    "-DLLAMA_BUILD_TESTS=OFF && cmake --build build --target llama-server`"
)


@contextlib.contextmanager
def start(path: Path, folder: Path, settings: Settings, *, weights: str = "f32") -> Iterator[PeerServer]:
    """`path`: the binary or its folder. `weights`: "f32", "bf16" or "q8_0", converted into `settings.scratch` once.

    It gives every slot `settings.context` tokens; a prompt is compared with what its slot held before.
    """
    binary = executable(path, ("llama-server", "bin/llama-server", "build/bin/llama-server"), REMEDY)
    gguf = convert(folder, settings.scratch / f"{folder.name}-{weights}.gguf", weights)
    port, flags = loopback()
    threads = str(settings.threads)
    command = [str(binary), "-m", str(gguf), "-a", "peer", *flags, "-t", threads, "-tb", threads]
    command += ["-np", str(settings.slots), "-c", str(settings.slots * settings.context), "--no-webui"]
    if not settings.prefix_cache:
        command.append("--no-cache-prompt")
    with running(f"llama_cpp_{weights}", [*command, *settings.flags], settings, port=port, model="peer") as server:
        yield server
