"""Several CPU processes that train one model: each takes its own steps, weights are averaged now and then through gloo.

Averaging gradients at every step made each worker wait for the slower batch and, on a busy machine, for the other
worker's turn: a fifth of the processor time stood idle.
"""

import argparse
import tempfile
from collections.abc import Callable
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn
from torch.multiprocessing.spawn import spawn

TIMEOUT = timedelta(hours=6)  # a paused run must survive


def launch(train: Callable[[argparse.Namespace], None], args: argparse.Namespace, num_workers: int) -> None:
    """Run `train(args)` here, or in `num_workers` single-threaded processes."""
    if num_workers == 1:
        train(args)
        return
    with tempfile.TemporaryDirectory() as folder:
        spawn(_worker, (train, args, num_workers, f"{folder}/store"), nprocs=num_workers)


def _worker(
    index: int, train: Callable[[argparse.Namespace], None], args: argparse.Namespace, num_workers: int, store: str
) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=index, world_size=num_workers, timeout=TIMEOUT)
    train(args)
    dist.destroy_process_group()


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def count() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def average_weights(model: nn.Module) -> None:
    """Replace every weight by its mean over the workers."""
    if count() == 1:
        return
    with torch.no_grad():
        flat = nn.utils.parameters_to_vector(model.parameters())
        dist.all_reduce(flat)
        nn.utils.vector_to_parameters(flat / count(), model.parameters())


def mean(value: float) -> float:
    """The mean over the workers, so that clocks which differ cannot make them part."""
    if count() == 1:
        return value
    total = torch.tensor(value, dtype=torch.float64)
    dist.all_reduce(total)
    return total.item() / count()
