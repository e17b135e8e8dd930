"""An engine process around FakeRunner, for tests of the client: `python -m tests.fake_engine_process --socket PATH`.

KVASIR_FAKE_STEP_S makes every step take so long; KVASIR_FAKE_LOAD is "config_error" or "crash" to fail while loading.
The token ids are those of the bundled tokenizer; prompts that contain the id POISON kill the process.
"""

from __future__ import annotations

import os
import sys
import time

from engine.config import Config
from engine.control import Payload
from engine.core import EngineCore
from engine.errors import ConfigError, InvalidParameter
from engine.launch import Progress
from engine.process import main
from engine.scheduling.plan import StepPlan, StepResult
from engine.scheduling.scheduler import Scheduler
from engine.types import ModelInfo
from tests.fakes import FakeRunner

VOCAB_SIZE = 4096
BLOCK_SIZE = 16
NUM_BLOCKS = 129
MAX_MODEL_LEN = 512
EOS = 4
POISON = 4095


class SlowRunner(FakeRunner):
    """Takes a while for every step, and dies of the poison."""

    def execute(self, plan: StepPlan) -> StepResult:
        time.sleep(float(os.environ.get("KVASIR_FAKE_STEP_S", "0")))
        for new in plan.new_rows:
            if POISON in new.token_ids:
                os._exit(3)
        return super().execute(plan)


def build(config: Config, progress: Progress) -> tuple[EngineCore, ModelInfo]:
    progress("loading", "weights", 0.5)
    failure = os.environ.get("KVASIR_FAKE_LOAD")
    if failure == "config_error":
        raise ConfigError("the weights need 9 MiB and 1 MiB is free; choose a smaller model")
    if failure == "crash":
        raise RuntimeError("a bug while loading")
    progress("warming", "kernels", 1.0)
    runner = SlowRunner(BLOCK_SIZE, vocab_size=POISON, eos_token_id=EOS, eos_every=200, strict=False)
    scheduler = Scheduler(
        config.scheduler,
        config.cache,
        num_blocks=NUM_BLOCKS,
        max_model_len=MAX_MODEL_LEN,
        eos_token_ids=(EOS,),
    )
    info = ModelInfo(
        architecture="Fake",
        dtype="float32",
        device="cpu",
        vocab_size=VOCAB_SIZE,
        logits_size=VOCAB_SIZE,
        max_model_len=MAX_MODEL_LEN,
        num_layers=1,
        block_size=BLOCK_SIZE,
        num_blocks=NUM_BLOCKS,
        kv_cache_bytes=0,
        weight_bytes=0,
        eos_token_ids=[EOS],
    )
    core = EngineCore(scheduler, runner)
    core.controls.add("echo", lambda payload: payload)
    core.controls.add("refuse", _refuse)
    core.controls.add("fail", _fail)
    core.controls.add("die", lambda payload: os._exit(3))
    return core, info


def _refuse(payload: Payload) -> Payload:
    raise InvalidParameter("no such thing", param="thing")


def _fail(payload: Payload) -> Payload:
    raise RuntimeError("a bug in an action")


if __name__ == "__main__":
    sys.exit(main(build=build))
