"""`transformers serve` with continuous batching out of an environment of its own.

It takes text only, refuses fields that it does not know, `ignore_eos` among them, ends streams without [DONE], and has
no prefix cache to turn off.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from loadtest.peers.server import PeerServer, Settings, executable, loopback, running

NUM_BLOCKS, BLOCK_SIZE, MAX_BATCH_TOKENS = 512, 32, 512
REMEDY = (
    "give an environment with transformers: `python -m venv ENV`, `ENV/bin/pip install torch==2.13.0` (the CPU build), "
    "`ENV/bin/pip install 'transformers[serving]' accelerate`"
)


@contextlib.contextmanager
def start(path: Path, folder: Path, settings: Settings) -> Iterator[PeerServer]:
    """`path`: the environment or its `transformers` command. Computes in float32."""
    command = [str(executable(path, ("bin/transformers",), REMEDY)), "serve", str(folder.absolute())]
    port, flags = loopback()
    command += [*flags, "--continuous-batching", "--device", "cpu", "--dtype", "float32"]
    command += ["--cb-num-blocks", str(NUM_BLOCKS), "--cb-block-size", str(BLOCK_SIZE)]
    command += ["--cb-max-batch-tokens", str(MAX_BATCH_TOKENS)]
    env = {"OMP_NUM_THREADS": str(settings.threads), "HF_HUB_OFFLINE": "1"}
    with running(
        "transformers",
        [*command, *settings.flags],
        settings,
        port=port,
        model=str(folder.absolute()),
        env=env,
        takes_token_ids=False,
        takes_ignore_eos=False,
        sends_done=False,
        # a generation config of the request replaces the checkpoint's, and with it the token that ends an answer
        request_fields={"generation_config": "{}"},
    ) as server:
        yield server
