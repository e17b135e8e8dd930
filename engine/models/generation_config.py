"""generation_config.json: the sampling defaults and end-of-sequence ids that a model comes with. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from engine.models.fields import Fields, read_json

_FILE = "generation_config.json"
# Bounds of the numbers, those of engine.sampling_params: a default that no request may have would refuse them all.
# top_k, max_tokens and the ids are integers.
_BOUNDS = {
    "temperature": (0.0, 2.0),
    "top_p": (0.0, 1.0),
    "min_p": (0.0, 1.0),
    "typical_p": (1e-6, 1.0),
    "repetition_penalty": (0.01, 100.0),
}
_ONLY_SAMPLING = ("temperature", "top_k", "top_p", "min_p", "typical_p")


@dataclass(frozen=True)
class GenerationDefaults:
    """`sampling` has keys of SamplingParams and only what the file sets."""

    sampling: dict[str, float | int] = field(default_factory=dict)
    eos_token_ids: tuple[int, ...] = ()


def load_generation_config(folder: Path, eos_token_ids: tuple[int, ...] = ()) -> GenerationDefaults:
    """Defaults of a model folder; `eos_token_ids` (of config.json) hold where the file is absent or names none.

    With `do_sample` false the file's temperature and cuts are dropped, as transformers ignores them then.
    Raises ConfigError for a value of the wrong type or range.
    """
    if not (folder / _FILE).is_file():
        return GenerationDefaults(eos_token_ids=eos_token_ids)
    fields = read_json(folder, _FILE)
    sampling = _sampling(fields)
    if not fields.flag("do_sample", True):
        sampling = {name: value for name, value in sampling.items() if name not in _ONLY_SAMPLING}
    return GenerationDefaults(sampling, fields.integers("eos_token_id") or eos_token_ids)


def _sampling(fields: Fields) -> dict[str, float | int]:
    values: dict[str, float | int] = {
        name: fields.number(name, low=low, high=high) for name, (low, high) in _BOUNDS.items() if name in fields
    }
    if "top_k" in fields:
        values["top_k"] = fields.integer("top_k", low=0)
    if "max_new_tokens" in fields:
        values["max_tokens"] = fields.integer("max_new_tokens")
    return values
