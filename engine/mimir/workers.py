"""Several CPU processes that train one model: each takes a share of every step, gradients are averaged through gloo."""

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


def average_gradients(model: nn.Module) -> None:
    """Replace every gradient by its mean over the workers; a missing gradient counts as zero."""
    if count() == 1:
        return
    parameters = list(model.parameters())
    flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).reshape(-1) for p in parameters])
    dist.all_reduce(flat)
    flat /= count()
    for parameter, share in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
        parameter.grad = share.view_as(parameter)


def mean(value: float) -> float:
    """The mean over the workers, so that clocks which differ cannot make them part."""
    if count() == 1:
        return value
    total = torch.tensor(value, dtype=torch.float64)
    dist.all_reduce(total)
    return total.item() / count()
