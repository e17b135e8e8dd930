"""`transformers` offline: one padded-free batch through `generate()`, fp32, the way most people first run a model."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from loadtest.workloads import Workload


class TransformersGenerate:
    """Loads once; `run` measures one workload in batches of `concurrency` equal-length prompts."""

    def __init__(self, folder: Path, *, threads: int) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        torch.set_num_threads(threads)
        self._torch = torch
        model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        self._model = model.eval()

    def run(self, workload: Workload, *, concurrency: int) -> float:
        """Output tokens per second."""
        torch = self._torch
        prompts = list(workload.prompts())
        started = time.perf_counter()
        with torch.inference_mode():
            for i in range(0, len(prompts), concurrency):
                ids = torch.tensor(prompts[i : i + concurrency])
                self._model.generate(
                    ids,
                    attention_mask=torch.ones_like(ids),
                    do_sample=False,
                    min_new_tokens=workload.output_tokens,
                    max_new_tokens=workload.output_tokens,
                    pad_token_id=0,
                )
        return workload.num_requests * workload.output_tokens / (time.perf_counter() - started)
