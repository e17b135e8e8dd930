"""Which pooler a model folder carries: sentence-transformers' modules, a classification head, or none. Torch-free.

Layout read: modules.json with 1_Pooling/config.json, 2_Dense/ and Normalize (sentence-transformers, "Saving models");
`...ForSequenceClassification` in `architectures`; a bare encoder or decoder, which has no head at all.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, cast

from engine.errors import ConfigError
from engine.models.family import architecture_of
from engine.models.fields import MAX_JSON_BYTES, Fields, read_json
from engine.models.hf_config import architectures
from engine.models.safetensors_file import read_checkpoint
from engine.types import PoolingMethod

Activation = Literal["sigmoid", "softmax", "identity"]

CLASSIFIER_SUFFIX = "ForSequenceClassification"
SCORE = "score.weight"  # the head of decoders; encoders keep theirs inside of the transformers model
_MODULES = "modules.json"
_ST_CONFIG = "config_sentence_transformers.json"
_MAX_LABELS = 65_536
_BY_DEFAULT = "default of its kind"
# Decoders whose class names do not follow the pattern.
_IRREGULAR = {"Gemma3TextModel": "Gemma3ForCausalLM", f"Gemma3Text{CLASSIFIER_SUFFIX}": "Gemma3ForCausalLM"}
_METHOD_OF_MODE: dict[str, PoolingMethod] = {
    "cls": "cls",
    "cls_token": "cls",
    "mean": "mean",
    "mean_tokens": "mean",
    "weightedmean": "weighted",
    "weightedmean_tokens": "weighted",
    "lasttoken": "last",
}
_ACTIVATIONS: dict[str, Activation] = {"Sigmoid": "sigmoid", "Softmax": "softmax", "Identity": "identity"}


@dataclass(frozen=True)
class DenseConfig:
    """A linear layer of sentence-transformers behind the pooling; `folder` has its weights."""

    folder: str
    in_size: int
    out_size: int
    has_bias: bool
    activation: str  # tanh, or identity


@dataclass(frozen=True)
class ClassifierConfig:
    """A sequence classification head: one score per label."""

    labels: tuple[str, ...]
    activation: Activation


@dataclass(frozen=True)
class PoolerConfig:
    """What follows the hidden states. `method` None: no embeddings; `classifier` None: no class scores."""

    method: PoolingMethod | None
    normalize: bool = True
    denses: tuple[DenseConfig, ...] = ()
    classifier: ClassifierConfig | None = None
    matryoshka: bool = False
    matryoshka_dimensions: tuple[int, ...] = ()
    max_seq_length: int | None = None  # where sentence-transformers cuts texts
    has_language_head: bool = False  # the model can generate as well
    prompts: dict[str, str] = field(default_factory=dict)  # name -> text that goes before an input
    default_prompt: str = ""  # a key of these; "" is none
    source: str = ""


def causal_architecture(fields: Fields) -> str:
    """The native causal decoder that has the same layers, or the architecture itself when there is none.

    A decoder that attends in both directions (EmbeddingGemma) is none of ours, whatever it is called.
    """
    name = architecture_of(fields)
    if fields.raw.get("use_bidirectional_attention") is True or fields.raw.get("is_causal") is False:
        return name
    if name in _IRREGULAR:
        return _IRREGULAR[name]
    for suffix in (CLASSIFIER_SUFFIX, "Model"):
        causal = f"{name.removesuffix(suffix)}ForCausalLM"
        if name.endswith(suffix) and causal in architectures():
            return causal
    return name


def is_native(fields: Fields) -> bool:
    """Whether one of our decoders has the model's layers, with or without a language head."""
    return causal_architecture(fields) in architectures()


def is_encoder(fields: Fields) -> bool:
    """Whether the model reads whole texts through transformers: anything that generates no text, native ones aside."""
    return not is_native(fields) and _is_headless(fields, "ForMaskedLM", "ForPreTraining")


def has_language_head(fields: Fields) -> bool:
    """Whether the checkpoint can choose tokens."""
    return not is_encoder(fields) and not _is_headless(fields)


def _is_headless(fields: Fields, *others: str) -> bool:
    name = architecture_of(fields)
    return name.endswith((CLASSIFIER_SUFFIX, "Model", *others)) and not name.endswith("LMHeadModel")


def pooler_tensors(fields: Fields) -> frozenset[str]:
    """Tensors of a decoder's checkpoint that belong to its pooler."""
    return frozenset({SCORE} if architecture_of(fields).endswith(CLASSIFIER_SUFFIX) else ())


def read_pooler(folder: Path, fields: Fields, asked: str, *, matryoshka: bool = False) -> PoolerConfig | None:
    """The pooler of a model folder, or None when it only generates.

    asked        the option `pooling`
    matryoshka   the operator's word that embeddings may be cut
    Raises ConfigError for a layout that cannot be honoured.
    """
    if asked == "none":
        return None
    classifier = _classifier(fields) if architecture_of(fields).endswith(CLASSIFIER_SUFFIX) else None
    if classifier is not None and asked != "auto" and is_encoder(fields):
        raise ConfigError(
            f"pooling is {asked!r}, but the checkpoint is a classifier with a pooler of its own; use auto"
        )
    base = PoolerConfig(
        None,
        matryoshka=matryoshka or fields.flag("is_matryoshka", False),
        matryoshka_dimensions=fields.integers("matryoshka_dimensions"),
        max_seq_length=_max_seq_length(folder),
        has_language_head=has_language_head(fields),
    )
    if asked != "auto":
        method = cast(PoolingMethod, asked)
        return replace(base, method=method, classifier=classifier, source="--pooling")
    if classifier is not None:
        return replace(base, classifier=classifier, source="sequence classification head")
    if (folder / _MODULES).is_file():
        return _sentence_transformers(folder, base)
    if is_encoder(fields):
        if any(name.endswith("pooler.dense.weight") for name in read_checkpoint(folder)):
            return replace(base, method="head", source="the encoder's own pooler")
        return replace(base, method="cls", source=_BY_DEFAULT)
    if not base.has_language_head:
        return replace(base, method="last", source=_BY_DEFAULT)
    return None


def resolved(config: PoolerConfig, is_causal: bool) -> PoolerConfig:
    """The same for a loaded model: where attention turned out to be causal, the last token is the one that saw all."""
    if is_causal and config.source == _BY_DEFAULT:
        return replace(config, method="last")
    return config


def _classifier(fields: Fields) -> ClassifierConfig:
    """Labels and activation: sentence-transformers' entry, else what the problem type of transformers says."""
    labels = _labels(fields)
    named = fields.section("sentence_transformers").text("activation_fn", "")
    named = named or fields.text("sbert_ce_default_activation_function", "")
    if named:
        activation = _ACTIVATIONS.get(named.rpartition(".")[2])
        if activation is None:
            raise ConfigError(
                f"config.json: activation {named[:80]!r} is not supported; known: {', '.join(_ACTIVATIONS)}"
            )
        return ClassifierConfig(labels, activation)
    problem = fields.text("problem_type", "")
    if problem == "regression":
        return ClassifierConfig(labels, "identity")
    is_single = problem != "multi_label_classification" and len(labels) > 1
    return ClassifierConfig(labels, "softmax" if is_single else "sigmoid")


def _labels(fields: Fields) -> tuple[str, ...]:
    """`id2label`, else as many LABEL_n as `num_labels` says; two is transformers' default."""
    given = fields.section("id2label").raw
    if given:
        count = len(given)
        if count > _MAX_LABELS or set(given) != {str(index) for index in range(count)}:
            raise ConfigError("config.json: id2label must map 0, 1, 2, ... to names")
        return tuple(str(given[str(index)])[:200] for index in range(count))
    return tuple(f"LABEL_{index}" for index in range(fields.integer("num_labels", 2, high=_MAX_LABELS)))


def _sentence_transformers(folder: Path, base: PoolerConfig) -> PoolerConfig:
    method: PoolingMethod | None = None
    denses: list[DenseConfig] = []
    normalize = False
    for kind, path in _modules(folder):
        match kind:
            case "Transformer":
                if path not in ("", "."):
                    raise ConfigError(f"{_MODULES}: the transformer lies in {path!r}; give that layout's own folder")
            case "Pooling" if method is None and not denses:
                method = _pooling_method(folder / path)
            case "Dense" if method is not None and not normalize:
                denses.append(_dense(folder, path))
            case "Normalize" if method is not None:
                normalize = True
            case "Dropout":
                continue  # only acts in training
            case _:
                raise ConfigError(f"{_MODULES}: module {kind!r} at this place is not supported")
    if method is None:
        raise ConfigError(f"{_MODULES} has no Pooling module; choose one with --pooling")
    prompts, default_prompt = _prompts(folder)
    return replace(
        base,
        method=method,
        normalize=normalize,
        denses=tuple(denses),
        prompts=prompts,
        default_prompt=default_prompt,
        source="sentence-transformers",
    )


def _prompts(folder: Path) -> tuple[dict[str, str], str]:
    """The named prompts that the model was trained with, and the name of the default."""
    if not (folder / _ST_CONFIG).is_file():
        return {}, ""
    fields = read_json(folder, _ST_CONFIG)
    prompts = fields.section("prompts").raw
    if not all(isinstance(text, str) for text in prompts.values()):
        raise ConfigError(f"{_ST_CONFIG}: prompts must map names to texts")
    default = fields.text("default_prompt_name", "")
    if default and default not in prompts:
        raise ConfigError(f"{_ST_CONFIG}: default_prompt_name {default[:80]!r} is not one of the prompts")
    return {name: text for name, text in prompts.items() if text}, default if prompts.get(default) else ""


def _modules(folder: Path) -> list[tuple[str, str]]:
    """Kind (last part of the class name) and folder of each module, in order."""
    path = folder / _MODULES
    if path.stat().st_size > MAX_JSON_BYTES:
        raise ConfigError(f"{_MODULES} is larger than {MAX_JSON_BYTES} bytes")
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
        found = [(str(entry["type"]).rpartition(".")[2], str(entry["path"])) for entry in entries]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ConfigError(f"{_MODULES} is not a list of modules with type and path: {error}") from None
    for _, part in found:
        if "/" in part or "\\" in part or part == "..":
            raise ConfigError(f"{_MODULES}: {part[:80]!r} is not a folder inside of the model's")
    return found


def _pooling_method(folder: Path) -> PoolingMethod:
    fields = read_json(folder, "config.json")
    if not fields.flag("include_prompt", True):
        raise ConfigError(f"{folder.name}/config.json: pooling without the prompt's tokens is not supported")
    prefix = "pooling_mode_"
    modes = [
        name.removeprefix(prefix) for name, value in fields.raw.items() if name.startswith(prefix) and value is True
    ]
    if "pooling_mode" in fields:
        modes = [fields.text("pooling_mode")]
    if len(modes) != 1 or modes[0] not in _METHOD_OF_MODE:
        raise ConfigError(
            f"{folder.name}/config.json: pooling by {', '.join(modes) or 'nothing'} is not supported; one of cls, "
            "mean, weighted mean and last token is"
        )
    return _METHOD_OF_MODE[modes[0]]


def _dense(folder: Path, path: str) -> DenseConfig:
    fields = read_json(folder / path, "config.json")
    activation = fields.text("activation_function", "Tanh").rpartition(".")[2].lower()
    if activation not in ("tanh", "identity"):
        raise ConfigError(f"{path}/config.json: activation {activation[:80]!r} is not supported; known: Tanh, Identity")
    return DenseConfig(
        folder=path,
        in_size=fields.integer("in_features"),
        out_size=fields.integer("out_features"),
        has_bias=fields.flag("bias", True),
        activation=activation,
    )


def _max_seq_length(folder: Path) -> int | None:
    if not (folder / "sentence_bert_config.json").is_file():
        return None
    fields = read_json(folder, "sentence_bert_config.json")
    if fields.flag("do_lower_case", False):
        raise ConfigError("sentence_bert_config.json: do_lower_case is not supported; the tokenizer must do it")
    return fields.integer("max_seq_length") if "max_seq_length" in fields else None
