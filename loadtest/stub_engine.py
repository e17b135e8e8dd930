"""An engine process that answers at once, to measure what the front end alone costs: `python -m loadtest.stub_engine`.

It speaks the real protocol of `engine.process` and computes nothing: every step gives every running choice one token.
KVASIR_STUB_STEP_S paces the steps; 0 emits as fast as the front end reads.
"""

from __future__ import annotations

import os
import sys
import time

from engine.config import Config
from engine.control import Controls
from engine.core import EngineCore
from engine.launch import Progress
from engine.process import main
from engine.types import EngineRequest, EngineStats, ModelInfo, TokenOutput

VOCAB_SIZE = 4096
FIRST_TOKEN, NUM_TOKENS = 300, 2000  # ordinary words of the bundled tokenizer
MAX_MODEL_LEN = 32768


class StubCore(EngineCore):
    """The surface of an EngineCore without a scheduler and a runner."""

    def __init__(self, step_s: float) -> None:
        self.controls = Controls()
        self.started = []
        self._step_s = step_s
        self._next_at = 0.0
        self._running: dict[str, tuple[EngineRequest, int]] = {}

    @property
    def has_work(self) -> bool:
        return bool(self._running)

    def add(self, request: EngineRequest) -> None:
        self._running[request.request_id] = (request, 0)

    def abort(self, request_id: str, choice: int | None = None) -> None:
        self._running.pop(request_id, None)

    def stats(self) -> EngineStats:
        return EngineStats(num_running=len(self._running))

    def step(self) -> list[TokenOutput]:
        is_due = self._wait()
        outputs = []
        for request_id, (request, count) in list(self._running.items()):
            if count and not is_due:
                continue
            is_last = count + 1 >= request.sampling.max_tokens
            outputs.append(
                TokenOutput(
                    request_id=request_id,
                    token_ids=[FIRST_TOKEN + count * 7 % NUM_TOKENS],
                    num_cached_tokens=0 if count == 0 else None,
                    queued_s=0.0 if count == 0 else None,
                    finish_reason="length" if is_last else None,
                )
            )
            if is_last:
                del self._running[request_id]
            else:
                self._running[request_id] = (request, count + 1)
        return outputs

    def _wait(self) -> bool:
        """Whether all running requests get a token: at the multiples of the pace on the monotonic clock.

        A first token never waits and does not move the others: what it costs is the front end's own time.
        """
        if not self._step_s:
            return True
        now = time.monotonic()
        if now < self._next_at:
            if any(count == 0 for _, count in self._running.values()):
                return False
            time.sleep(self._next_at - now)
        self._next_at = (time.monotonic() // self._step_s + 1) * self._step_s
        return True


def build(config: Config, progress: Progress) -> tuple[EngineCore, ModelInfo]:
    info = ModelInfo(
        architecture="Stub",
        dtype="float32",
        device="cpu",
        vocab_size=VOCAB_SIZE,
        logits_size=VOCAB_SIZE,
        max_model_len=MAX_MODEL_LEN,
        num_layers=1,
        block_size=16,
        num_blocks=1 << 20,
        kv_cache_bytes=0,
        weight_bytes=0,
        eos_token_ids=[4],
    )
    return StubCore(float(os.environ.get("KVASIR_STUB_STEP_S", "0"))), info


if __name__ == "__main__":
    sys.exit(main(build=build))
