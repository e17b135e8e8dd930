"""Which drafters a server offers, and the model that some of them share."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from engine.config import CacheConfig, Config, ModelConfig, SpeculationConfig
from engine.errors import ConfigError, InvalidParameter
from engine.launch import wire
from engine.launch_speculation import DrafterSource
from engine.mimir import model_path
from engine.models import load_model
from engine.models.batch import Model
from engine.speculation.catalogue import HEAD_DRAFTERS, MODEL_DRAFTERS, drafters
from engine.types import EngineRequest, SamplingParams
from tests.e2e.driving import run

EXPECTED = {"draft_model", "dyspec", "rsd_c", "rsd_s", "sequoia", "spectr", "multi_draft"}


@pytest.fixture(scope="module")
def mimir() -> Model:
    return load_model(model_path("mimir"))


def config(draft_model: str = "auto", model: str = "mimir") -> Config:
    return Config(
        model=ModelConfig(model=model, max_model_len=256),
        cache=CacheConfig(block_size=16, num_blocks=64),
        speculation=SpeculationConfig(
            speculative_draft_model=draft_model,
            speculative_eagle_head="none",
            speculative_draft_cache_tokens=1000,
            speculative_budget="fixed",
        ),
    )


def test_mimir_brings_its_own_draft_model_and_other_models_none(mimir: Model, tmp_path: Path) -> None:
    assert set(MODEL_DRAFTERS) == EXPECTED
    known = set(drafters.names()) - set(HEAD_DRAFTERS)
    assert set(DrafterSource(config(), mimir).names) == known
    assert set(DrafterSource(config(model=str(tmp_path)), mimir).names) == known - EXPECTED
    assert set(DrafterSource(config("none"), mimir).names) == known - EXPECTED


def test_a_folder_that_is_no_model_is_refused(mimir: Model, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is not a folder with config"):
        DrafterSource(config(str(tmp_path)), mimir)


def test_a_draft_model_with_other_tokens_is_refused(mimir: Model, tmp_path: Path) -> None:
    bundled = model_path("mimir-draft")
    tokenizer = json.loads((bundled / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    first, second = list(vocabulary)[-2:]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer))
    (tmp_path / "config.json").write_text((bundled / "config.json").read_text())
    with pytest.raises(ConfigError, match="has another tokenizer than the model"):
        DrafterSource(config(str(tmp_path)), mimir)


def test_drafters_share_one_model_and_one_cache(mimir: Model) -> None:
    source = DrafterSource(config(str(model_path("mimir-draft"))), mimir)
    one, other = source.make("draft_model"), source.make("dyspec")
    assert one.state_bytes == other.state_bytes > 0
    assert one._cache is other._cache  # type: ignore[attr-defined]
    assert one._cache.pool.num_blocks == 64  # type: ignore[attr-defined]


def test_a_request_for_a_drafter_without_a_model_is_told_what_there_is(mimir: Model) -> None:
    core, _ = wire(mimir, config("none"), torch.device("cpu"))
    with pytest.raises(InvalidParameter, match=r"drafter 'dyspec' needs a draft model, .*; choose from aded, goose"):
        core.add(
            EngineRequest(
                request_id="r",
                prompt_token_ids=[5, 6, 7],
                sampling=SamplingParams(max_tokens=4),
                speculative={"drafters": ["dyspec"]},
            )
        )


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_every_model_drafter_leaves_the_output_of_the_walk_as_it_is(mimir: Model, temperature: float) -> None:
    """Four requests side by side, seeded; and the guesses of the bundled drafter are often right."""
    prompts = [[10 + i, *range(300, 306 + 3 * i)] for i in range(4)]

    def outputs(speculative: dict[str, object] | None) -> tuple[dict[tuple[str, int], list[int]], int]:
        core, _ = wire(mimir, config(), torch.device("cpu"))
        sampling = SamplingParams(temperature=temperature, seed=5, max_tokens=24, ignore_eos=True)
        requests = [
            EngineRequest(request_id=f"r{i}", prompt_token_ids=p, sampling=sampling, speculative=speculative)
            for i, p in enumerate(prompts)
        ]
        answers = run(core, requests, stagger=2)
        return {key: answer.token_ids for key, answer in answers.items()}, sum(core.stats().spec_accepted.values())

    expected, _ = outputs(None)
    for name in sorted(EXPECTED):
        found, num_accepted = outputs({"drafters": [name], "max_nodes": 8})
        assert found == expected, name
        assert num_accepted > 10, name
