"""Reads a checkpoint's tokenizer files into one description: vocabulary JSON, named special tokens, chat template.

Files: tokenizer.json, tokenizer_config.json, special_tokens_map.json, chat_template.jinja, generation_config.json.
Needs neither torch nor transformers, except for checkpoints that have no tokenizer.json.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.errors import ConfigError

NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
EXTRA_TOKENS = ("additional_special_tokens", "extra_special_tokens")


@dataclass(frozen=True)
class TokenizerFiles:
    """What the files say.

    definition         parsed tokenizer.json, with the tokens that only tokenizer_config.json lists
    named_tokens       "bos_token" -> its text, and so on
    extra_tokens       further texts declared special
    add_bos, add_eos   an explicit order to begin or end every text with that token, or None: as tokenizer.json says
    eos_token_ids      from generation_config.json; the tokenizer's own comes from `named_tokens`
    chat_template      Jinja source or None
    """

    definition: dict[str, Any]
    named_tokens: dict[str, str]
    extra_tokens: tuple[str, ...]
    add_bos: bool | None
    add_eos: bool | None
    eos_token_ids: tuple[int, ...]
    chat_template: str | None


def read(folder: Path, chat_template: Path | None = None) -> TokenizerFiles:
    """Reads `folder`; a template file given by the operator wins. Raises ConfigError that names the file at fault."""
    config = _read_json(folder / "tokenizer_config.json") or {}
    named_map = _read_json(folder / "special_tokens_map.json") or {}
    generation = _read_json(folder / "generation_config.json") or {}
    definition = _read_json(folder / "tokenizer.json")
    if definition is None:
        definition = _convert_slow_tokenizer(folder)
    _add_listed_tokens(definition, config.get("added_tokens_decoder") or {})
    named = {name: _token_text(config.get(name, named_map.get(name))) for name in NAMED_TOKENS}
    return TokenizerFiles(
        definition=definition,
        named_tokens={name: text for name, text in named.items() if text is not None},
        extra_tokens=tuple(_extra_tokens(config) + _extra_tokens(named_map)),
        add_bos=config.get("add_bos_token"),
        add_eos=config.get("add_eos_token"),
        eos_token_ids=_ids(generation.get("eos_token_id")),
        chat_template=_template(folder, config, chat_template),
    )


def _read_json(file: Path) -> dict[str, Any] | None:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read {file.name} of the tokenizer: {error}; is the download complete?") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{file.name} of the tokenizer must hold a JSON object; is the download complete?")
    return content


def _convert_slow_tokenizer(folder: Path) -> dict[str, Any]:
    """Checkpoints from before tokenizer.json: transformers knows how to convert their vocabularies."""
    try:
        from transformers import AutoTokenizer

        converted = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False, local_files_only=True)
        definition: dict[str, Any] = json.loads(converted.backend_tokenizer.to_str())
    except Exception as error:  # whatever a foreign vocabulary makes the converter raise
        raise ConfigError(
            f"the folder {folder.name!r} has no tokenizer.json and its vocabulary cannot be converted "
            f"({type(error).__name__}); save it once with transformers, or name another folder with --tokenizer"
        ) from error
    return definition


def _add_listed_tokens(definition: dict[str, Any], listed: dict[str, Any]) -> None:
    """Appends the added tokens that tokenizer_config.json knows and tokenizer.json does not."""
    known = {token["id"] for token in definition.setdefault("added_tokens", [])}
    missing = [(int(token_id), token) for token_id, token in listed.items() if int(token_id) not in known]
    for token_id, token in sorted(missing, key=lambda item: item[0]):
        flags = {flag: bool(token.get(flag, False)) for flag in ("single_word", "lstrip", "rstrip", "special")}
        flags["normalized"] = bool(token.get("normalized", not flags["special"]))
        definition["added_tokens"].append({"id": token_id, "content": token["content"], **flags})


def _token_text(value: Any) -> str | None:
    return value.get("content") if isinstance(value, dict) else value


def _extra_tokens(config: dict[str, Any]) -> list[str]:
    texts: list[str | None] = []
    for key in EXTRA_TOKENS:
        value = config.get(key) or []
        texts += [_token_text(token) for token in (value.values() if isinstance(value, dict) else value)]
    return [text for text in texts if text]


def _ids(value: int | list[int] | None) -> tuple[int, ...]:
    if value is None:
        return ()
    return tuple(value) if isinstance(value, list) else (value,)


def _template(folder: Path, config: dict[str, Any], given: Path | None) -> str | None:
    """The operator's file, then chat_template.jinja, then the entry of tokenizer_config.json ("default" of several)."""
    if given is not None:
        try:
            return given.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"cannot read the chat template {str(given)!r}: {error}; check --chat-template") from None
    beside = folder / "chat_template.jinja"
    if beside.is_file():
        return beside.read_text(encoding="utf-8")
    entry = config.get("chat_template")
    if isinstance(entry, list):
        by_name = {item["name"]: item["template"] for item in entry}
        entry = by_name.get("default", next(iter(by_name.values()), None))
    return entry
