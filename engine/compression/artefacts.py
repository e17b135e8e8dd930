"""Calibration artefacts: what policies must know of a model beforehand, in one JSON file that names the model.

Knows files and numbers; the measuring is `engine.compression.calibration`. A file carries the digest of its own content
and that of the model folder it was made from, and is refused where either differs.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from engine.compression.base import CacheShape, Policy
from engine.compression.gemfilter import GemFilter
from engine.compression.modifier import Modifier
from engine.compression.razor_attention import Heads, RazorAttention
from engine.errors import ConfigError

FILE_NAME = "kv_artefacts.json"  # beside the weights
VERSION = 1
NUM_PIECES, PIECE_BYTES = 64, 4096  # of a weight file, for its digest

Scores = tuple[tuple[float, ...], ...]  # [L, H]


@dataclass(frozen=True)
class Artefacts:
    """
    model            digest of the model folder, see `model_digest`
    retrieval_heads  (layer, kv head) pairs that RazorAttention keeps whole
    echo, induction  [L, H]: the scores of the query heads, for people
    filter_layer     layer by which GemFilter chooses; None: not calibrated
    filter_recall    [L]: share of needles that each layer would have kept, for people
    """

    model: str
    num_layers: int
    num_kv_heads: int
    retrieval_heads: Heads
    echo: Scores = ()
    induction: Scores = ()
    filter_layer: int | None = None
    filter_recall: tuple[float, ...] = ()

    def bind(self, policy: Policy) -> Policy:
        """The policy with what it needs to know of the model; a request's own options are not changed."""
        if isinstance(policy, RazorAttention):
            return policy.bind(self.retrieval_heads)
        if isinstance(policy, GemFilter) and policy.layer is None:
            return replace(policy, layer=self.filter_layer)
        if isinstance(policy, Modifier):
            return replace(policy, base=self.bind(policy.base))  # type: ignore[arg-type]
        return policy

    def check(self, shape: CacheShape, origin: str) -> None:
        """Raises ConfigError for a model of another shape."""
        if (self.num_layers, self.num_kv_heads) != (shape.num_layers, shape.num_kv_heads):
            raise ConfigError(
                f"{origin} is for {self.num_layers} layers of {self.num_kv_heads} kv heads, this model has "
                f"{shape.num_layers} of {shape.num_kv_heads}: run `kvasir calibrate` for it"
            )


def write(artefacts: Artefacts, path: Path) -> None:
    content = _content(artefacts)
    path.write_text(json.dumps({**content, "sha256": _digest(content)}, indent=1) + "\n", encoding="utf-8")


def read(path: Path, model: str | None = None) -> Artefacts:
    """model: the digest that it must be for; None: any. Raises ConfigError that names the file and the remedy."""
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        found = content.pop("sha256")
        version = content.pop("version")
        if version != VERSION:
            raise ConfigError(f"{path} has version {version!r}, this server reads {VERSION}: run `kvasir calibrate`")
        artefacts = _artefacts(content)
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ConfigError(f"{path} is no file of `kvasir calibrate`: {type(error).__name__}: {error}") from error
    if found != _digest(_content(artefacts)):
        raise ConfigError(f"{path} was changed after it was made: run `kvasir calibrate` again")
    if model is not None and artefacts.model != model:
        raise ConfigError(f"{path} is for other weights: run `kvasir calibrate` for this model")
    return artefacts


def model_digest(folder: Path) -> str:
    """Names a checkpoint: its config.json, and of each weight file the name, the size and pieces spread over it.

    Training changes every piece; reading them takes no time, however large the files are.
    """
    digest = hashlib.sha256()
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    digest.update(json.dumps(config, sort_keys=True).encode())
    for path in sorted(folder.glob("*.safetensors")):
        size = path.stat().st_size
        digest.update(f"\n{path.name} {size}\n".encode())
        with path.open("rb") as file:
            for i in range(NUM_PIECES):
                file.seek(max(0, size - PIECE_BYTES) * i // (NUM_PIECES - 1))
                digest.update(file.read(PIECE_BYTES))
    return digest.hexdigest()


def _content(artefacts: Artefacts) -> dict[str, Any]:
    return {
        "version": VERSION,
        "model": artefacts.model,
        "num_layers": artefacts.num_layers,
        "num_kv_heads": artefacts.num_kv_heads,
        "razor_attention": {
            "retrieval_heads": [list(head) for head in artefacts.retrieval_heads],
            "echo": [list(row) for row in artefacts.echo],
            "induction": [list(row) for row in artefacts.induction],
        },
        "gemfilter": {"layer": artefacts.filter_layer, "recall": list(artefacts.filter_recall)},
    }


def _artefacts(content: dict[str, Any]) -> Artefacts:
    razor, gem = content["razor_attention"], content["gemfilter"]
    return Artefacts(
        model=content["model"],
        num_layers=content["num_layers"],
        num_kv_heads=content["num_kv_heads"],
        retrieval_heads=tuple((int(layer), int(head)) for layer, head in razor["retrieval_heads"]),
        echo=tuple(tuple(row) for row in razor["echo"]),
        induction=tuple(tuple(row) for row in razor["induction"]),
        filter_layer=gem["layer"],
        filter_recall=tuple(gem["recall"]),
    )


def _digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
