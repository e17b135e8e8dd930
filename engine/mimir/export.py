"""Writes a trained model as a Hugging Face folder: `python -m engine.mimir.export --run DIR --out DIR`.

The folder loads as `LlamaForCausalLM`; `load` reads it back into our own module.
"""

import argparse
import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

from engine.mimir import model_path
from engine.mimir.checkpoint import load_state
from engine.mimir.model import Mimir, ModelShape
from engine.mimir.presets import PRESETS
from engine.mimir.tokenizer import BOS, EOS, PAD, TURN_END, token_id

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")


def export(model: Mimir, folder: Path, tokenizer_folder: Path) -> None:
    """Write weights (bf16), both configs and the tokenizer files into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = {
        f"model.{name}": value.detach().to("cpu", torch.bfloat16).contiguous()
        for name, value in model.state_dict().items()
    }
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "model.safetensors").chmod(0o644)  # the writer leaves it private to the user who trained
    if tokenizer_folder.resolve() != folder.resolve():
        for name in TOKENIZER_FILES:
            shutil.copyfile(tokenizer_folder / name, folder / name)
    ids = special_ids(folder)
    _write_json(folder / "config.json", llama_config(model.shape, ids))
    _write_json(
        folder / "generation_config.json",
        {
            "bos_token_id": ids[BOS],
            "eos_token_id": [ids[TURN_END], ids[EOS]],
            "pad_token_id": ids[PAD],
            "do_sample": True,
            "temperature": 0.2,
            "top_p": 0.9,
        },
    )


def special_ids(folder: Path) -> dict[str, int]:
    """Ids of the special tokens by their text."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    return {text: token_id(tokenizer, text) for text in (BOS, EOS, PAD, TURN_END)}


def llama_config(shape: ModelShape, ids: dict[str, int]) -> dict[str, object]:
    """The content of config.json."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": shape.vocab_size,
        "hidden_size": shape.width,
        "intermediate_size": shape.mlp_width,
        "num_hidden_layers": shape.num_layers,
        "num_attention_heads": shape.num_heads,
        "num_key_value_heads": shape.num_kv_heads,
        "head_dim": shape.head_dim,
        "max_position_embeddings": shape.max_positions,
        "hidden_act": "silu",
        "rms_norm_eps": shape.norm_eps,
        "rope_theta": shape.rope_theta,
        "rope_scaling": None,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "mlp_bias": False,
        "initializer_range": 0.02,
        "tie_word_embeddings": True,
        "use_cache": True,
        "torch_dtype": "bfloat16",
        "bos_token_id": ids[BOS],
        "eos_token_id": ids[TURN_END],
        "pad_token_id": ids[PAD],
    }


def load(folder: Path) -> Mimir:
    """Our module, in fp32, from an exported folder."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    shape = ModelShape(
        num_layers=config["num_hidden_layers"],
        width=config["hidden_size"],
        num_heads=config["num_attention_heads"],
        num_kv_heads=config["num_key_value_heads"],
        mlp_width=config["intermediate_size"],
        head_dim=config["head_dim"],
        vocab_size=config["vocab_size"],
        rope_theta=config["rope_theta"],
        norm_eps=config["rms_norm_eps"],
        max_positions=config["max_position_embeddings"],
    )
    model = Mimir(shape)
    weights = load_file(folder / "model.safetensors")
    model.load_state_dict({name.removeprefix("model."): value.float() for name, value in weights.items()})
    return model.eval()


def _write_json(path: Path, content: dict[str, object]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", type=Path, required=True, help="folder with state.safetensors")
    parser.add_argument("--preset", choices=sorted(PRESETS), default="cpu")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    model = Mimir(PRESETS[args.preset].shape)
    model.load_state_dict(load_state(args.run).model)
    export(model, args.out, model_path())


if __name__ == "__main__":
    main()
