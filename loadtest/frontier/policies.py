"""Which policies the frontier compares, and what each is asked at a budget. Knows names and options only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from loadtest.frontier.samples import Mode, Sample, TaskSpec

RATIOS = (0.5, 0.25, 0.125, 0.0625)
FULL, RANDOM = "full", "random"
# cut once or again and again to a share of the prompt
EVICTING = (
    "random",
    "streaming_llm",
    "h2o",
    "a2sf",
    "keyformer",
    "scissorhands",
    "tova",
    "vatp",
    "snapkv",
    "snapkv_wide",
    "pyramidkv",
    "kvcrush",
    "ems",
    "razor_attention",
)
READING = ("quest", "gemfilter")  # read less of the cache, or of the prompt; they choose by the question
FORMATS: dict[str, dict[str, Any]] = {
    "fp8": {"name": "fp8"},
    "int8": {"name": "int8"},
    "kivi4": {"name": "kivi", "bits": 4},
    "kivi2": {"name": "kivi", "bits": 2},
    "kivi4_plain": {"name": "kivi", "bits": 4, "rotate": False},
    "kivi2_plain": {"name": "kivi", "bits": 2, "rotate": False},
}
WIDE_KERNEL = 21  # neighbours, for answers that are spelled from the text over many tokens
BLOCK = 16


@dataclass(frozen=True)
class Setting:
    """One policy at one budget; ratio None: it has no budget."""

    label: str
    ratio: float | None = None

    def applies_to(self, task: TaskSpec, mode: Mode) -> bool:
        """What reads less chooses whenever it reads; raas drops generated tokens only."""
        if self.label == "raas":
            return task.name == "reasoning"
        if self.label in READING:
            return mode == "aware"
        return True

    def choice(self, sample: Sample) -> dict[str, Any] | None:
        """The `kv_policy` of a request; None: the full cache."""
        if self.label == FULL:
            return None
        choice = self._named(sample.first_turn)
        if sample.first_turn == len(sample.token_ids):
            return choice
        return {"name": "first_turn", "num_tokens": sample.first_turn, "base": choice}

    def _named(self, num_tokens: int) -> dict[str, Any]:
        """Name and options for a text of so many tokens."""
        if self.ratio is None:
            return FORMATS[self.label]
        if self.label == "razor_attention":  # heads that do not retrieve keep the share
            kept = max(1, round(self.ratio * num_tokens) - 4)
            return {"name": self.label, "min_recent": kept, "divisor": 1000.0}
        if self.label == "raas":  # of a thought of about four blocks
            return {"name": self.label, "budget": max(1, round(4 * self.ratio)) * BLOCK}
        if self.label == "snapkv_wide":
            return {"name": "snapkv", "ratio": self.ratio, "kernel": WIDE_KERNEL}
        return {"name": self.label, "ratio": self.ratio}


def settings(ratios: tuple[float, ...] = RATIOS, names: tuple[str, ...] | None = None) -> list[Setting]:
    """The full cache first, then every policy at every budget; names: only these and the yardsticks."""
    wanted = [
        *(Setting(name, ratio) for name in (*EVICTING, *READING, "raas") for ratio in ratios),
        *map(Setting, FORMATS),
    ]
    kept = [one for one in wanted if names is None or one.label in (*names, RANDOM)]
    return [Setting(FULL), *kept]
