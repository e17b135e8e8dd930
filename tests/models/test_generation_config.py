"""generation_config.json -> sampling defaults and end ids."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from engine.errors import ConfigError
from engine.models.generation_config import _BOUNDS, GenerationDefaults, load_generation_config
from engine.sampling_params import validate
from engine.types import SamplingParams


def load(folder: Path, **values: Any) -> GenerationDefaults:
    (folder / "generation_config.json").write_text(json.dumps(values))
    return load_generation_config(folder, (5,))


def test_without_a_file_only_the_ids_of_config_json_hold(tmp_path: Path) -> None:
    assert load_generation_config(tmp_path, (5,)) == GenerationDefaults({}, (5,))


def test_values_take_the_names_of_sampling_params(tmp_path: Path) -> None:
    defaults = load(
        tmp_path, do_sample=True, temperature=0.6, top_p=0.9, top_k=20, max_new_tokens=99, eos_token_id=[1, 2], other=3
    )
    assert defaults.sampling == {"temperature": 0.6, "top_p": 0.9, "top_k": 20, "max_tokens": 99}
    assert defaults.eos_token_ids == (1, 2)


def test_end_ids_fall_back_to_config_json(tmp_path: Path) -> None:
    assert load(tmp_path, temperature=0.6).eos_token_ids == (5,)


def test_sampling_values_of_a_greedy_model_are_dropped(tmp_path: Path) -> None:
    assert load(tmp_path, do_sample=False, temperature=0.6, top_k=5, repetition_penalty=1.1).sampling == {
        "repetition_penalty": 1.1
    }


@pytest.mark.parametrize("values", [{"temperature": "hot"}, {"top_p": 1.5}, {"top_k": -1}, {"eos_token_id": "</s>"}])
def test_wrong_values_are_config_errors(tmp_path: Path, values: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=rf"generation_config.json: {next(iter(values))} must be"):
        load(tmp_path, **values)


@pytest.mark.parametrize("name", _BOUNDS)
def test_what_a_model_may_default_to_a_request_may_have(tmp_path: Path, name: str) -> None:
    for value in _BOUNDS[name]:
        validate(SamplingParams(**load(tmp_path, **{name: value}).sampling), logits_size=8, max_model_len=64)
    with pytest.raises(ConfigError, match=name):
        load(tmp_path, **{name: _BOUNDS[name][1] + 0.1})
