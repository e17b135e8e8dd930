"""Writes a Llama- or Qwen2-shaped checkpoint as a GGUF file for llama.cpp: f32, bf16 or q8_0.

Facts about the format (GGUF v3): q and k of Llama-type models are permuted, because llama.cpp
rotates interleaved pairs there, while Qwen2-type models are stored as they are (it rotates halves).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

NAMES = {
    "input_layernorm.weight": "attn_norm.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
    "self_attn.q_proj.weight": "attn_q.weight",
    "self_attn.k_proj.weight": "attn_k.weight",
    "self_attn.v_proj.weight": "attn_v.weight",
    "self_attn.q_proj.bias": "attn_q.bias",
    "self_attn.k_proj.bias": "attn_k.bias",
    "self_attn.v_proj.bias": "attn_v.bias",
    "self_attn.o_proj.weight": "attn_output.weight",
    "mlp.gate_proj.weight": "ffn_gate.weight",
    "mlp.up_proj.weight": "ffn_up.weight",
    "mlp.down_proj.weight": "ffn_down.weight",
}
ARCHITECTURES = ("llama", "qwen2")
TOP_NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}


# by name: the format's "general.file_type" and the name of the type of its matrices
WEIGHTS = {"f32": (0, "F32"), "bf16": (32, "BF16"), "q8_0": (7, "Q8_0")}


def convert(folder: Path, out: Path, weights: str = "f32") -> Path:
    """Writes `out` once; an existing file is kept. Matrices get the type `weights`, all else stays f32.

    Needs the `gguf` package. Raises ValueError for another kind of model or type, ModuleNotFoundError without gguf.
    """
    if weights not in WEIGHTS:
        raise ValueError(f"unknown GGUF type {weights!r}; known: {', '.join(WEIGHTS)}")
    if out.is_file():
        return out
    gguf = _gguf()
    from safetensors.torch import load_file

    config = json.loads((folder / "config.json").read_text())
    arch = config["model_type"]
    if arch not in ARCHITECTURES:
        raise ValueError(f"cannot write a GGUF of model_type {arch!r}; known: {', '.join(ARCHITECTURES)}")
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_suffix(".partial")
    file_type, type_name = WEIGHTS[weights]
    writer = gguf.GGUFWriter(str(partial), arch)
    _write_metadata(writer, config, file_type)
    _write_tokenizer(writer, json.loads((folder / "tokenizer.json").read_text()), config)
    for file in sorted(folder.glob("*.safetensors")):
        for name, tensor in load_file(file).items():
            array = tensor.float().numpy()
            target = _target_name(name)
            if arch == "llama" and target.endswith(("attn_q.weight", "attn_k.weight")):
                heads = config["num_attention_heads" if "attn_q" in target else "num_key_value_heads"]
                array = _permute(array, heads)
            array = np.ascontiguousarray(array)
            kind = gguf.GGMLQuantizationType[type_name if array.ndim == 2 else "F32"]
            writer.add_tensor(target, gguf.quants.quantize(array, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    partial.rename(out)  # what an interrupted run leaves is never taken for the whole
    return out


def _gguf() -> Any:
    try:
        import gguf
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"{error}; llama.cpp's weights are written with it: pip install gguf") from error
    return gguf


def _target_name(name: str) -> str:
    if name in TOP_NAMES:
        return TOP_NAMES[name]
    _, _, layer, rest = name.split(".", 3)
    return f"blk.{layer}.{NAMES[rest]}"


def _permute(weight: np.ndarray, heads: int) -> np.ndarray:
    """Half-split rotary rows [heads, 2, d/2, in] -> interleaved pairs [heads, d/2, 2, in]."""
    rows, columns = weight.shape
    return weight.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)


def _write_metadata(writer: Any, config: dict[str, Any], file_type: int) -> None:
    heads = config["num_attention_heads"]
    rope = config.get("rope_parameters") or {}
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_rope_dimension_count(config.get("head_dim") or config["hidden_size"] // heads)
    writer.add_rope_freq_base(float(rope.get("rope_theta", config.get("rope_theta", 10000.0))))
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_file_type(file_type)


def _write_tokenizer(writer: Any, tokenizer: dict[str, Any], config: dict[str, Any]) -> None:
    special = {token["id"]: token["content"] for token in tokenizer["added_tokens"]}
    by_id = {index: token for token, index in tokenizer["model"]["vocab"].items()} | special
    tokens = [by_id.get(i, f"[unused{i}]") for i in range(config["vocab_size"])]
    kinds = [3 if i in special else (1 if i in by_id else 5) for i in range(config["vocab_size"])]
    merges = [m if isinstance(m, str) else " ".join(m) for m in tokenizer["model"]["merges"]]
    eos = config.get("eos_token_id")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges(merges)
    if config.get("bos_token_id") is not None:
        writer.add_bos_token_id(config["bos_token_id"])
    if eos is not None:
        writer.add_eos_token_id(eos[0] if isinstance(eos, list) else eos)
    writer.add_add_bos_token(False)
