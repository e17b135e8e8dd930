"""Adapters in a real engine process: loaded while it runs, and there again after it has died."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path

import msgspec
import pytest
from transformers import AutoModelForCausalLM

from engine import supervisor
from engine.client import AsyncEngine
from engine.config import CacheConfig, Config, LoraConfig, ModelConfig, RuntimeConfig, SchedulerConfig
from engine.errors import Conflict, ModelNotFound, RequestError
from engine.llm import LLM
from engine.mimir import model_path
from engine.types import GenerationRequest, SamplingParams
from tests.models.lora_adapters import ALL_LINEAR, random_pairs, write_adapter

MODEL = "mimir-draft"
REQUEST = GenerationRequest(
    prompt="Once upon a time", sampling=SamplingParams(max_tokens=60, temperature=0.0, ignore_eos=True)
)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Two adapters for the bundled draft model."""
    model = AutoModelForCausalLM.from_pretrained(model_path(MODEL))
    for seed, name in enumerate(("first", "second")):
        write_adapter(tmp_path / name, random_pairs(model, ALL_LINEAR, 8, seed=seed))
    return tmp_path


async def text_of(engine: AsyncEngine, adapter: str, on_output: asyncio.Event | None = None) -> str:
    text = ""
    async for output in engine.generate(msgspec.structs.replace(REQUEST, adapter=adapter)):
        text += output.text
        if on_output is not None:
            on_output.set()
    return text


async def test_adapters_survive_the_death_of_the_engine_process(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor, "MIN_BACK_OFF_S", 0.05)
    config = Config(
        model=ModelConfig(model=MODEL, max_model_len=256),
        cache=CacheConfig(num_blocks=128),
        scheduler=SchedulerConfig(max_num_seqs=4),
        runtime=RuntimeConfig(threads=1),
        lora=LoraConfig(enable_lora=True, lora_root=str(root), lora_adapters=("static=first",)),
    )
    engine = AsyncEngine(config)
    await engine.start()
    try:
        async with asyncio.timeout(120):
            await engine.wait_ready()
            assert list(engine.adapters) == ["static"]
            info = await engine.load_adapter("late", "second")
            assert (info.rank, list(engine.adapters)) == (8, ["static", "late"])
            with pytest.raises(Conflict):
                await engine.load_adapter("late", "first")
            with pytest.raises(RequestError, match="no folder below"):
                await engine.load_adapter("other", "../..")
            names = ("", "static", "late")
            alone = {name: await text_of(engine, name) for name in names}
            assert len(set(alone.values())) == 3
            await engine.unload_adapter("static")
            await engine.load_adapter("static", "second")  # from now on the same weights as "late"
            has_begun = asyncio.Event()
            running = [asyncio.create_task(text_of(engine, name, has_begun)) for name in names]
            await has_begun.wait()
            assert engine._supervisor.pid is not None
            os.kill(engine._supervisor.pid, signal.SIGKILL)
            assert await asyncio.gather(*running) == [alone[""], alone["late"], alone["late"]]
            assert engine.num_restarts == 1
            assert list(engine.adapters) == ["late", "static"]
            await engine.unload_adapter("late")
            with pytest.raises(ModelNotFound):
                await text_of(engine, "late")
            assert await text_of(engine, "static") == alone["late"]
    finally:
        await engine.stop(0)


def test_the_offline_class_takes_adapters_by_name(root: Path) -> None:
    options = {"max_model_len": 256, "num_blocks": 64, "threads": 1}
    adapters = {"enable_lora": True, "lora_root": str(root), "lora_adapters": ("one=first", "two=second")}
    with LLM(model=MODEL, **options, **adapters) as llm:
        texts = [llm.generate("Once upon", REQUEST.sampling, adapter=name)[0].text for name in ("", "one", "two")]
        assert len(set(texts)) == 3
        with pytest.raises(ModelNotFound, match="no adapter 'three' is loaded; name it in lora_adapters"):
            llm.generate("Once upon", adapter="three")
    with LLM(model=MODEL, **options) as plain:
        assert plain.generate("Once upon", REQUEST.sampling)[0].text == texts[0]
