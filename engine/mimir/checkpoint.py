"""The state of a training run in one safetensors file: tensors by name, progress as JSON in the header.

Knows names and tensors, nothing of training. Not pickle, so a state from elsewhere can be opened without running it.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

STATE_FILE = "state.safetensors"
MODEL, OPTIMIZER = "model", "optimizer"

OptimizerState = dict[int, dict[str, Tensor]]  # parameter index to named tensors


@dataclass
class RunState:
    """Weights, each optimizer's tensors, and what `progress` holds (JSON values only)."""

    model: dict[str, Tensor]
    optimizers: list[OptimizerState] = field(default_factory=list)
    progress: dict[str, object] = field(default_factory=dict)


def save_state(state: RunState, folder: Path) -> None:
    """Write `folder/state.safetensors` atomically; earlier states are replaced."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {f"{MODEL}/{name}": value for name, value in state.model.items()}
    for number, optimizer in enumerate(state.optimizers):
        for index, entries in optimizer.items():
            for name, value in entries.items():
                tensors[f"{OPTIMIZER}/{number}/{index}/{name}"] = value
    tensors = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    save_file(tensors, folder / f"{STATE_FILE}.tmp", metadata={"progress": json.dumps(state.progress)})
    (folder / f"{STATE_FILE}.tmp").replace(folder / STATE_FILE)


def load_state(folder: Path, device: torch.device | str = "cpu") -> RunState:
    """What `save_state` wrote. Raises FileNotFoundError when the folder holds no state."""
    path = folder / STATE_FILE
    if not path.exists():
        raise FileNotFoundError(f"no training state {path}")
    state = RunState({})
    optimizers: dict[int, OptimizerState] = {}
    with safe_open(path, framework="pt", device=str(device)) as file:
        state.progress = json.loads(file.metadata()["progress"])
        for key in file.keys():  # noqa: SIM118 (not a dict)
            kind, name = key.split("/", 1)
            if kind == MODEL:
                state.model[name] = file.get_tensor(key)
            else:
                number, index, entry = name.split("/")
                optimizers.setdefault(int(number), {}).setdefault(int(index), {})[entry] = file.get_tensor(key)
    state.optimizers = [optimizers[number] for number in sorted(optimizers)]
    return state
