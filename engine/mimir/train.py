"""Trains Mimir: `python -m engine.mimir.train --preset cpu --run DIR [--workers 2]`.

One script, one seed, phases as data (`presets.py`). A run resumes from `DIR/state.safetensors` (weights, optimizers,
phase, step, running accuracies), so it may be stopped or paused at any time. On CPU, several single-threaded workers
that average their weights every few steps (local SGD, arXiv:1805.09767) are faster and far less hurt by other load than
one process with several threads.
"""

import argparse
import logging
import math
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import msgspec
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.mimir import workers
from engine.mimir.checkpoint import STATE_FILE, RunState, load_state, save_state
from engine.mimir.data import Batch, StreamSpec, drill_name, load_batches
from engine.mimir.export import load
from engine.mimir.initialise import structure_induction
from engine.mimir.model import Mimir
from engine.mimir.presets import PRESETS, Phase, Preset

logger = logging.getLogger(__name__)

WARMUP_STEPS = 50
CLIP_NORM = 1.0
AVERAGE_EVERY = 10  # steps that workers take on their own
LOG_EVERY = 50
SAVE_EVERY = 100  # a multiple of AVERAGE_EVERY
EARLY_SHARE = 0.4  # of a time limit that the phases before the last may use
ACCURACY_DECAY = 0.97  # of the running accuracy, per batch that holds the task


@dataclass
class Progress:
    """Where a run stands: phase, step within it, and the running token accuracy of each task."""

    phase: int = 0
    step: int = 0
    total_steps: int = 0
    seconds: float = 0.0
    accuracy: dict[str, float] = field(default_factory=dict)
    seen: dict[str, int] = field(default_factory=dict)

    def record(self, tasks: list[str], row_hits: Tensor, row_totals: Tensor) -> None:
        """Fold one batch into the running accuracies; `row_hits` and `row_totals` are [B] token counts."""
        sums: dict[str, list[float]] = {}
        for task, hits, total in zip(tasks, row_hits.tolist(), row_totals.tolist(), strict=True):
            entry = sums.setdefault(task, [0.0, 0.0])
            entry[0] += hits
            entry[1] += total
        for task, (hits, total) in sums.items():
            accuracy = hits / max(total, 1.0)
            old = self.accuracy.get(task, accuracy)
            self.accuracy[task] = ACCURACY_DECAY * old + (1 - ACCURACY_DECAY) * accuracy
            self.seen[task] = self.seen.get(task, 0) + 1

    def passes(self, phase: Phase) -> bool:
        """True when the phase's gate is met."""
        name = drill_name(phase.gate) if phase.gate else ""
        return self.seen.get(name, 0) >= 30 and self.accuracy[name] >= phase.gate_accuracy


class Trainer:
    """Model, optimizers and progress of one run; `run` follows the preset's phases."""

    def __init__(
        self,
        preset: Preset,
        folder: Path,
        seed: int,
        device: torch.device,
        teacher: Path | None = None,
        in_bf16: bool = False,
    ) -> None:
        self.preset, self.folder, self.seed, self.device = preset, folder, seed, device
        torch.manual_seed(seed)
        self.model = Mimir(preset.shape)
        structure_induction(self.model)
        self.model.to(device)
        self.in_bf16 = in_bf16
        for layer in self.model.blocks():
            layer.mlp.in_bf16 = in_bf16
        self.optimizers = make_optimizers(self.model, preset)
        self.teacher = load(teacher).to(device) if teacher else None
        self.progress = Progress()
        self.started, self.limit_s = time.perf_counter(), math.inf
        if (folder / STATE_FILE).exists():
            self._restore(folder)

    def run(self, max_steps: int | None, limit_s: float = math.inf) -> None:
        """Train until the last phase ends or `max_steps` more steps are done.

        With a time limit, phases before the last end after `EARLY_SHARE` of it, and the last one's rate falls with the
        time used if that is ahead of the steps done.
        """
        self.started, self.limit_s = time.perf_counter(), limit_s
        stop_at = math.inf if max_steps is None else self.progress.total_steps + max_steps
        while self.progress.phase < len(self.preset.phases) and self.progress.total_steps < stop_at:
            phase = self.preset.phases[self.progress.phase]
            self._run_phase(phase, stop_at)
            if self.progress.total_steps < stop_at:
                self.progress.phase, self.progress.step = self.progress.phase + 1, 0
            self.save()

    def _run_phase(self, phase: Phase, stop_at: float) -> None:
        spec = StreamSpec(
            phase,
            (self.seed, workers.rank()),
            self.progress.step,
            phase.tokens_per_step // workers.count(),
            self.preset.shape.vocab_size,
        )
        logger.info("phase %s from step %d", phase.name, self.progress.step)
        phase_started = time.perf_counter() - self.started
        started = time.perf_counter()
        done = 0.0
        for batch in load_batches(spec, self.preset.data_workers):
            if self.progress.step % AVERAGE_EVERY == 0:
                workers.average_weights(self.model)
                if self.progress.step % SAVE_EVERY == 0:
                    self.save()
                done = workers.mean(max(self.progress.step / phase.max_steps, self._time_used(phase, phase_started)))
                if workers.mean(self.progress.passes(phase)) > 0:
                    return
            if done >= 1 or self.progress.step >= phase.max_steps or self.progress.total_steps >= stop_at:
                workers.average_weights(self.model)
                return
            self._set_rates(phase, done)
            loss = self._step(batch)
            self.progress.step += 1
            self.progress.total_steps += 1
            self.progress.seconds += time.perf_counter() - started
            started = time.perf_counter()
            if self.progress.total_steps % LOG_EVERY == 0:
                self._log(phase, loss)

    def _step(self, batch: Batch) -> float:
        ids, mask = batch.ids.to(self.device), batch.mask.to(self.device)
        scored = mask[:, 1:]
        targets = ids[:, 1:][scored]
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            hidden = scored_states(self.model, ids, scored)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda" or self.in_bf16):
            logits = self.model.logits(hidden)  # [N, V]
        loss = F.cross_entropy(logits.float(), targets)
        if self.teacher is not None:
            loss = 0.5 * loss + 0.5 * divergence(self.teacher, logits, ids, scored)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), CLIP_NORM)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        hits = torch.zeros_like(scored, dtype=torch.float32)
        hits[scored] = (logits.argmax(-1) == targets).float()
        self.progress.record(batch.tasks, hits.sum(1), scored.sum(1))
        return loss.item()

    def _time_used(self, phase: Phase, phase_started: float) -> float:
        """Share of the phase's time that is gone, 0 without a limit; `phase_started` in seconds since the run began."""
        elapsed = time.perf_counter() - self.started
        if phase is self.preset.phases[-1]:
            return (elapsed - phase_started) / (self.limit_s - phase_started)
        return float(elapsed > EARLY_SHARE * self.limit_s)

    def _set_rates(self, phase: Phase, done: float) -> None:
        scale = phase.start_scale + (phase.end_scale - phase.start_scale) * done
        scale *= min(1.0, (self.progress.total_steps + 1) / WARMUP_STEPS)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["full_rate"] * scale

    def _log(self, phase: Phase, loss: float) -> None:
        accuracies = " ".join(f"{task}={value:.3f}" for task, value in sorted(self.progress.accuracy.items()))
        logger.info(
            "%s step %d/%d total %d %.0fs loss %.3f %s",
            phase.name,
            self.progress.step,
            phase.max_steps,
            self.progress.total_steps,
            self.progress.seconds,
            loss,
            accuracies,
        )

    def save(self) -> None:
        """Write the state atomically, from the first worker."""
        if workers.rank() == 0:
            optimizers = [optimizer.state_dict()["state"] for optimizer in self.optimizers]
            save_state(RunState(self.model.state_dict(), optimizers, asdict(self.progress)), self.folder)

    def begin_from(self, folder: Path) -> None:
        """Take weights, optimizers and counts from another run, but start this preset's phases at the first."""
        self._restore(folder)
        self.progress.phase, self.progress.step = 0, 0
        self.progress.accuracy, self.progress.seen = {}, {}

    def _restore(self, folder: Path) -> None:
        state = load_state(folder, self.device)
        self.model.load_state_dict(state.model)
        self.progress = msgspec.convert(state.progress, Progress)
        if not state.optimizers:  # saved before the first step
            return
        for optimizer, saved in zip(self.optimizers, state.optimizers, strict=True):
            optimizer.load_state_dict({"state": saved, "param_groups": optimizer.state_dict()["param_groups"]})


def scored_states(model: Mimir, ids: Tensor, scored: Tensor) -> Tensor:
    """Hidden states [N, C] before the tokens that `scored` [B, T - 1] marks, in row order."""
    counts = scored.sum(1)
    most = int(counts.max())
    if most > ids.shape[1] // 2:
        return model(ids)[:, :-1][scored]
    asked = torch.argsort(~scored, dim=1, stable=True)[:, :most]  # the marked positions first, in order
    return model(ids, asked)[torch.arange(most, device=ids.device) < counts[:, None]]


def divergence(teacher: Mimir, logits: Tensor, ids: Tensor, scored: Tensor) -> Tensor:
    """Kullback-Leibler divergence of the student's `logits` [N, V] from the teacher's distribution at `scored`."""
    with torch.no_grad():
        wanted = teacher.logits(scored_states(teacher, ids, scored)).float().log_softmax(-1)
    return F.kl_div(logits.float().log_softmax(-1), wanted, log_target=True, reduction="batchmean")


def make_optimizers(model: Mimir, preset: Preset) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the layers, AdamW for embedding and norms; each group keeps its `full_rate`."""
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.Muon(matrices, lr=preset.muon_rate, weight_decay=0.0, momentum=0.95),
        torch.optim.AdamW(others, lr=preset.adam_rate, betas=(0.9, 0.98), weight_decay=0.0, fused=True),
    ]
    for optimizer, rate in zip(optimizers, (preset.muon_rate, preset.adam_rate), strict=True):
        for group in optimizer.param_groups:
            group["full_rate"] = rate
    return optimizers


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--preset", choices=sorted(PRESETS), default="cpu")
    parser.add_argument("--run", type=Path, required=True, help="folder of checkpoints; resumed when it holds one")
    parser.add_argument("--start-from", type=Path, help="another run whose weights a new run begins with")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--workers", type=int, default=1, help="processes that share each step (CPU)")
    parser.add_argument("--bf16", action="store_true", help="feed-forward and logits in bf16 (CPUs with avx512_bf16)")
    parser.add_argument("--teacher", type=Path, help="exported model to distil from, besides the data")
    parser.add_argument("--minutes", type=float, default=math.inf, help="shorten the phases to end after this time")
    parser.add_argument("--max-steps", type=int, help="stop after this many more steps")
    return parser.parse_args()


def train(args: argparse.Namespace) -> None:
    """One worker's run; only the first worker logs."""
    logging.basicConfig(
        level=logging.INFO if workers.rank() == 0 else logging.WARNING, format="%(asctime)s %(message)s"
    )
    trainer = Trainer(PRESETS[args.preset], args.run, args.seed, torch.device(args.device), args.teacher, args.bf16)
    if args.start_from and not (args.run / STATE_FILE).exists():
        trainer.begin_from(args.start_from)
    trainer.run(args.max_steps, args.minutes * 60)


def main() -> None:
    args = parse_args()
    workers.launch(train, args, args.workers)


if __name__ == "__main__":
    main()
