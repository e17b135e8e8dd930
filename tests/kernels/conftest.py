"""Kernel tests run Triton in its interpreter where there is no GPU; the variable must stand before triton's import."""

from __future__ import annotations

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
