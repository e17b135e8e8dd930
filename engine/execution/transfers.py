"""Copies between host and device that nobody waits for until the values are needed. Knows no steps."""

from __future__ import annotations

import torch
from torch import Tensor


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor, which is on the CPU, on the device; it may be written again at once.

    The copy is queued behind what runs there. It reads pinned memory that torch's allocator does not give to anybody
    else before the copy is done.
    """
    if device.type == "cpu":
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)


class HostCopy:
    """A tensor on its way to the host."""

    def __init__(self, source: Tensor) -> None:
        self._is_here = source.device.type == "cpu"
        self._values = source
        if not self._is_here:
            self._values = torch.empty(source.shape, dtype=source.dtype, pin_memory=True)
            self._values.copy_(source, non_blocking=True)
            self._done = torch.cuda.Event()
            self._done.record()

    def wait(self) -> Tensor:
        """The values as they were when the copy was queued, on the CPU."""
        if not self._is_here:
            self._done.synchronize()
            self._is_here = True
        return self._values
