"""adapter_config.json of PEFT -> what a low-rank adapter is. Torch-free; refuses what would change the model otherwise.

Source of the field names and of their meaning: github.com/huggingface/peft, `LoraConfig`.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from engine.errors import ConfigError
from engine.models.fields import Fields, read_json

logger = logging.getLogger(__name__)

CONFIG_FILE = "adapter_config.json"
MAX_RANK = 256

# Field -> why an adapter that uses it is refused. Absent, null, false and empty mean "not used".
_REFUSED = {
    "use_dora": "DoRA rescales the base weights",
    "modules_to_save": "it replaces whole modules (embedding, head or others) instead of adding to them",
    "trainable_token_indices": "it changes token embeddings",
    "target_parameters": "it adapts parameters that are no linear layers (experts, for instance)",
    "layer_replication": "it copies layers of the base model",
    "lora_bias": "its B matrices have biases",
    "alora_invocation_tokens": "it is active for a part of the prompt only (aLoRA)",
    "use_qalora": "QALoRA pools the inputs",
    "use_bdlora": "BD-LoRA is block-diagonal",
    "arrow_config": "it routes between adapters",
    "kasa_config": "KaSA changes the base weights",
    "monteclora_config": "MonteCLoRA samples its weights",
    "megatron_config": "Megatron's parallel linears are not supported",
}
# Initialisations that leave the base weights as they are. The others (PiSSA, OLoRA, CorDA, LoftQ, LoRA-GA) subtract the
# first A and B from them, so that the adapter only fits a base model that is not the one served.
_PLAIN_INITIALISATIONS = (None, True, False, "gaussian", "orthogonal", "eva", "mica")
# Fields that do not matter for what the adapter computes, whatever they hold.
_IRRELEVANT = frozenset(
    (
        *("auto_mapping", "base_model_name_or_path", "inference_mode", "peft_type", "peft_version", "revision"),
        *("task_type", "runtime_config", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern"),
        *("target_modules", "exclude_modules", "layers_pattern", "layers_to_transform", "bias", "lora_dropout"),
        *("init_lora_weights", "corda_config", "eva_config", "loftq_config", "lora_ga_config", "velora_config"),
        *("fan_in_fan_out", "ensure_weight_tying", "megatron_core", "qalora_group_size"),
    )
)


@dataclass(frozen=True)
class AdapterConfig:
    """What adapter_config.json says. Modules are named as in the checkpoint, "model.layers.0.self_attn.q_proj"."""

    rank: int
    alpha: float
    uses_rslora: bool
    rank_pattern: dict[str, int]  # end of a module's name -> its own rank
    alpha_pattern: dict[str, float]
    target_modules: tuple[str, ...]  # ends of names; empty when it is a pattern, or "all-linear"

    def rank_of(self, module: str) -> int:
        return self.rank_pattern.get(_matching(self.rank_pattern, module), self.rank)

    def scale_of(self, module: str) -> float:
        """What B A is multiplied by: alpha / r, or alpha / sqrt(r) (rank-stabilised, arXiv:2312.03732)."""
        alpha, rank = self.alpha_pattern.get(_matching(self.alpha_pattern, module), self.alpha), self.rank_of(module)
        return alpha / (math.sqrt(rank) if self.uses_rslora else rank)

    def untouched(self, modules: Iterable[str]) -> list[str]:
        """Target modules of which none of these is one: their weights are missing."""
        known = list(modules)
        return [target for target in self.target_modules if not any(_is_end(target, module) for module in known)]


def read_lora_config(folder: Path, *, max_rank: int) -> AdapterConfig:
    """Raises ConfigError for another kind of adapter, one that this server cannot apply, or a rank over the bound."""
    fields = read_json(folder, CONFIG_FILE)
    kind = fields.text("peft_type", "LORA")
    if kind != "LORA":
        raise ConfigError(f"{CONFIG_FILE}: peft_type is {kind[:40]!r}; only LORA adapters can be served")
    _refuse(fields)
    config = AdapterConfig(
        rank=fields.integer("r", 8),
        alpha=fields.number("lora_alpha", 8, low=-1e6, high=1e6),
        uses_rslora=fields.flag("use_rslora", False),
        rank_pattern={_literal(k): r.integer(k) for r in [fields.section("rank_pattern")] for k in r.raw},
        alpha_pattern={
            _literal(k): a.number(k, low=-1e6, high=1e6) for a in [fields.section("alpha_pattern")] for k in a.raw
        },
        target_modules=() if isinstance(fields.raw.get("target_modules"), str) else fields.texts("target_modules"),
    )
    largest = max((config.rank, *config.rank_pattern.values()))
    if largest > min(max_rank, MAX_RANK):
        raise ConfigError(
            f"the adapter has rank {largest}, the limit is {min(max_rank, MAX_RANK)}; "
            f"--max-lora-rank raises it up to {MAX_RANK}"
        )
    return config


def _refuse(fields: Fields) -> None:
    for name, reason in _REFUSED.items():
        if fields.raw.get(name):
            raise ConfigError(f"{CONFIG_FILE}: {name} is set: {reason}, which is not supported")
    if fields.text("bias", "none") != "none":
        raise ConfigError(
            f"{CONFIG_FILE}: bias is {fields.text('bias')[:40]!r}; only adapters with 'none' can be served"
        )
    initialisation = fields.raw.get("init_lora_weights")
    if initialisation not in _PLAIN_INITIALISATIONS:
        raise ConfigError(
            f"{CONFIG_FILE}: init_lora_weights is {str(initialisation)[:40]!r}, which changes the base weights; "
            "convert the adapter when saving it (save_pretrained with path_initial_model_for_weight_conversion)"
        )
    unknown = sorted(
        name for name, value in fields.raw.items() if value and name not in _IRRELEVANT and name not in _REFUSED
    )
    if unknown:
        logger.warning(
            "%s has fields that are not known here and are ignored: %s", CONFIG_FILE, ", ".join(unknown[:10])
        )


def _literal(key: str) -> str:
    """A key of a pattern table as the end of a module name. PEFT takes regular expressions; only plain names pass."""
    name = key.removeprefix("^").removeprefix("(.*\\.)?").removeprefix(".*\\.").removesuffix("$").replace("\\.", ".")
    if not name or not all(char.isalnum() or char in "._-" for char in name):
        raise ConfigError(f"{CONFIG_FILE}: the pattern {key[:80]!r} is no plain module name; write the names out")
    return name


def _matching(patterns: Iterable[str], module: str) -> str:
    return next((name for name in patterns if _is_end(name, module)), "")


def _is_end(name: str, module: str) -> bool:
    return module == name or module.endswith("." + name)
