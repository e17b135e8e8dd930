"""Makes drafters, and loads the small model that some of them need: once, for all of them.

Part of `engine.launch`: the model code loads inside functions.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING

from engine.config import Config
from engine.errors import ConfigError
from engine.mimir import MODELS, model_path
from engine.speculation.base import Drafter
from engine.speculation.catalogue import HEAD_DRAFTERS, MODEL_DRAFTERS, drafters
from engine.speculation.draft_cache import DraftCache
from engine.speculation.eagle import Eagle
from engine.speculation.model_drafter import ModelDrafter

if TYPE_CHECKING:
    from engine.execution.draft_model import DraftLanguageModel
    from engine.execution.eagle.files import Head
    from engine.models.batch import Model

logger = logging.getLogger(__name__)

HEAD_FOLDER = "eagle"  # in a model's folder, where its head is by default
BUNDLED = {"mimir": "mimir-draft"}  # what "auto" means for a bundled model; for any other it is none


class DrafterSource:
    """The drafters that this server can offer, and the memory that their model takes."""

    def __init__(self, config: Config, target: Model) -> None:
        """Loads the draft model that was asked for by name: before the KV cache is sized from what is left.

        A bundled one (a megabyte) is loaded when first needed. Raises ConfigError.
        """
        self._config = config
        self._target = target
        self._loaded: tuple[DraftLanguageModel, DraftCache] | None = None
        self._path = _draft_path(config, target)
        self._head = _find_head(config, target)
        if self._path is not None and config.speculation.speculative_draft_model != "auto":
            self._loaded = self._load(self._path)

    @property
    def names(self) -> list[str]:
        """Drafters that can be made here: those that need a model, or a head, only where there is one."""
        lacking = {*(() if self._path else MODEL_DRAFTERS), *(() if self._head else HEAD_DRAFTERS)}
        return [name for name in drafters.names() if name not in lacking]

    def make(self, name: str) -> Drafter:
        drafter = drafters.create(name)
        if isinstance(drafter, ModelDrafter):
            assert self._path is not None, "such drafters are not among the names then"
            if self._loaded is None:
                self._loaded = self._load(self._path)
            drafter.attach(*self._loaded)
        elif isinstance(drafter, Eagle):
            self._attach_head(drafter)
        return drafter

    def _attach_head(self, drafter: Eagle) -> None:
        from engine.execution.eagle.runner import EagleRunner
        from engine.models.decoder import Decoder

        assert self._head is not None, "the drafter is not among the names then"
        assert isinstance(self._target, Decoder), "looked at when the head was found"
        block_size = self._config.cache.block_size
        num_blocks = -(-self._config.speculation.speculative_draft_cache_tokens // block_size) + 1
        drafter.attach(
            EagleRunner(self._target, self._head, num_blocks=num_blocks, block_size=block_size),
            DraftCache(num_blocks, block_size),
        )

    def _load(self, path: Path) -> tuple[DraftLanguageModel, DraftCache]:
        from engine.execution.draft_model import DraftLanguageModel
        from engine.models import load_model

        config, target = self._config, self._target
        block_size = config.cache.block_size
        num_blocks = -(-config.speculation.speculative_draft_cache_tokens // block_size) + 1
        model = load_model(path, device=target.device, deterministic=config.runtime.deterministic)
        runner = DraftLanguageModel(model, num_blocks=num_blocks, block_size=block_size, logits_size=target.logits_size)
        logger.info(
            "draft model %s: %.0f MiB of weights, a cache of %d tokens",
            path.name,
            model.weight_bytes / 2**20,
            (num_blocks - 1) * block_size,
        )
        return runner, DraftCache(num_blocks, block_size)


def _draft_path(config: Config, target: Model) -> Path | None:
    """The folder of the draft model, None without one. Raises ConfigError when its tokens are not the target's."""
    from engine.models.fields import read_json

    asked, model = config.speculation.speculative_draft_model, config.model.model
    name = BUNDLED.get(model, "none") if asked == "auto" else asked
    if name == "none":
        return None
    path = model_path(name) if name in MODELS else Path(name)
    if not (path / "config.json").is_file():
        raise ConfigError(f"speculative_draft_model {name!r} is not a folder with config.json, nor a bundled model")
    size = read_json(path, "config.json").raw.get("vocab_size")
    if asked == "auto":
        return path if size == target.vocab_size else None  # another model was wired under the default name
    own, theirs = _vocabulary(path), _vocabulary(model_path(model) if model in MODELS else Path(model))
    if own != theirs or (own is None and size != target.vocab_size):
        raise ConfigError(
            f"speculative_draft_model {name!r} has another tokenizer than the model, so its guesses would mean nothing"
        )
    return path


def _find_head(config: Config, target: Model) -> Head | None:
    """The trained head of the model, None without one.

    Raises ConfigError for one that was asked for by name and does not fit. One in the model's own folder that does not,
    as after training, is left out with a warning.
    """
    from engine.compression.artefacts import model_digest
    from engine.execution.eagle.files import CONFIG_FILE, read
    from engine.models.decoder import Decoder

    asked, model = config.speculation.speculative_eagle_head, config.model.model
    folder = model_path(model) if model in MODELS else Path(model)
    path = folder / HEAD_FOLDER if asked == "auto" else Path(asked)
    if asked == "none" or (asked == "auto" and not (path / CONFIG_FILE).is_file()):
        return None
    try:
        head = read(path, model_digest(folder))
        if not isinstance(target, Decoder) or config.runtime.load_format == "dummy":
            raise ConfigError("the head works with the real weights of a native decoder only")
        if target.config.hidden_size != head.shape.hidden_size:
            raise ConfigError(f"{path} is for another width than the model's {target.config.hidden_size}")
    except ConfigError as error:
        if asked != "auto":
            raise
        logger.warning("%s; the drafter eagle is not offered", error)
        return None
    return head


def _vocabulary(path: Path) -> dict[str, int] | None:
    """Tokens and their ids, None where the folder does not say in tokenizer.json."""
    file = path / "tokenizer.json"
    if not file.is_file():
        return None
    found = json.loads(file.read_text())["model"]["vocab"]
    return found if isinstance(found, dict) else None
