"""Opponents that serve the same weights on the same machine, each started and stopped by a context manager.

`PEERS[name](path, folder, settings)` yields a `PeerServer`; `path` is the peer's executable or environment.
"""

from __future__ import annotations

from functools import partial

from loadtest.peers import kvasir, llama_cpp, transformers_serve, vllm
from loadtest.peers.server import PeerError, PeerServer, Settings, StartPeer

__all__ = ["OWN", "PEERS", "PeerError", "PeerServer", "Settings", "StartPeer"]

OWN: StartPeer = kvasir.start

PEERS: dict[str, StartPeer] = {
    "llama_cpp": llama_cpp.start,
    "llama_cpp_bf16": partial(llama_cpp.start, weights="bf16"),
    "llama_cpp_q8_0": partial(llama_cpp.start, weights="q8_0"),
    "transformers": transformers_serve.start,
    "vllm": vllm.start,
}
