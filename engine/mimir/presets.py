"""Sizes and curricula: the numbers that `train.py` follows, as data."""

from dataclasses import dataclass, field

from engine.mimir.corpus.symbols import Drill
from engine.mimir.model import ModelShape


@dataclass(frozen=True)
class Phase:
    """One stretch of training.

    `drills` and `texts` are weights of sources; a batch comes from one source. The phase ends after `max_steps`, or
    once the running accuracy of drill `gate` passes `gate_accuracy`. `end_scale` is the learning rate's share at the
    end of the phase, reached linearly from `start_scale`.
    """

    name: str
    max_steps: int
    tokens_per_step: int
    drills: dict[Drill, float] = field(default_factory=dict)
    texts: dict[str, float] = field(default_factory=dict)
    max_length: int = 1024
    gate: Drill | None = None
    gate_accuracy: float = 0.95
    start_scale: float = 1.0
    end_scale: float = 1.0


@dataclass(frozen=True)
class Preset:
    """A model shape with everything needed to train it."""

    shape: ModelShape
    phases: tuple[Phase, ...]
    data_workers: int = 1
    adam_rate: float = 1e-3
    muon_rate: float = 4e-3


ALL_SYMBOLS = 4083  # every ordinary id
GATE_ACCURACY = 0.85
CURRICULUM_SCALE = 0.6  # of the full rates: higher ones undo the structured start before they improve on it


def lookup_curriculum(longest: int, max_steps: int, tokens_per_step: int) -> tuple[Phase, ...]:
    """Repeated segments, then key-value records of growing length, each with a third of the batches already learned.

    Each phase ends when its drill is learned, at the latest after `max_steps`.
    """
    goals = [Drill("repeats", 64, ALL_SYMBOLS)]
    goals += [Drill("records", length, ALL_SYMBOLS) for length in (64, 128, 256, 512, 1024, 2048) if length <= longest]
    phases = []
    for index, goal in enumerate(goals):
        known = goals[max(0, index - 2) : index]
        weights = {goal: 2.0, **{drill: 1.0 / len(known) for drill in known}}
        phases.append(
            Phase(
                f"{goal.kind}-{goal.length}",
                max_steps,
                tokens_per_step,
                weights,
                gate=goal,
                gate_accuracy=GATE_ACCURACY,
                start_scale=CURRICULUM_SCALE,
                end_scale=CURRICULUM_SCALE,
            )
        )
    return tuple(phases)


# Shares of the text tokens in the mixture; contexts are log-uniform up to the phase's `max_length`.
LOOKUP_TEXTS = {
    "needle": 2.0,
    "needle_talk": 14.0,
    "needle_first": 5.0,
    "key_value": 1.0,
    "key_value_talk": 12.0,
    "multi_key": 4.0,
    "table": 1.0,
    "facts": 1.5,
    "facts_talk": 6.0,
    "variables": 3.0,
}
CHAT_TEXTS = {"chat": 10.0, "memory": 4.0, "context_chat": 2.0, "instruction": 2.0, "thinking": 2.0}
TASK_TEXTS = {
    "copy": 4.0,
    "arithmetic": 2.0,
    "small_arithmetic": 6.0,
    "total": 1.0,
    "largest": 1.5,
    "positions": 1.5,
    "count_word": 1.0,
    "most_frequent": 1.0,
    "tool_use": 6.0,
    "json_object": 3.0,
    "json_list": 5.0,
    "code": 2.0,
}
PLAIN_TEXTS = {"python_code": 4.0, "prose": 1.5, "sentences": 0.5}
ALL_TEXTS = LOOKUP_TEXTS | CHAT_TEXTS | TASK_TEXTS | PLAIN_TEXTS
POLISH_TEXTS = ALL_TEXTS | {"needle": 6.0, "needle_talk": 24.0, "needle_first": 8.0}
DRILL_SHARE = 0.3  # of the mixture's batches, to the end
LONG_DRILL_SHARE = 0.17  # the same with long contexts, when lookup as such is known

# What a drafter is asked most: everyday turns, whose wording it must learn by heart; lookup is beyond two layers.
DRAFT_TEXTS = (
    {name: 0.4 * weight for name, weight in LOOKUP_TEXTS.items()}
    | {name: 2.5 * weight for name, weight in CHAT_TEXTS.items()}
    | {name: 1.5 * weight for name, weight in TASK_TEXTS.items()}
)


def mixture(longest: int, max_steps: int, tokens_per_step: int, decay_share: float = 0.7) -> tuple[Phase, ...]:
    """Everything together at the full rate, then the same with half the batch while the rate falls from half to 3 %."""
    total = sum(ALL_TEXTS.values()) * DRILL_SHARE / (1 - DRILL_SHARE)
    drills = {Drill("records", length, ALL_SYMBOLS): total / 3 for length in (longest // 8, longest // 4, longest)}
    decay_steps = int(max_steps * decay_share)
    return (
        Phase("mixture", max_steps - decay_steps, tokens_per_step, drills, ALL_TEXTS, longest),
        Phase(
            "decay", decay_steps * 2, tokens_per_step // 2, drills, ALL_TEXTS, longest, start_scale=0.5, end_scale=0.03
        ),
    )


def long_contexts(
    longest: int,
    max_steps: int,
    tokens_per_step: int,
    start_scale: float = 0.4,
    texts: dict[str, float] = ALL_TEXTS,
) -> Phase:
    """The mixture for a model that is already trained on shorter contexts, under a falling rate.

    Give the run a time limit (`--minutes`); the rate then falls with the clock.
    """
    drill_weight = sum(texts.values()) * LONG_DRILL_SHARE / (1 - LONG_DRILL_SHARE) / 3
    drills = {Drill("records", length, ALL_SYMBOLS): drill_weight for length in (longest // 8, longest // 2, longest)}
    longest_text = int(longest * 0.95)  # samples come out a little longer or shorter than asked
    return Phase(
        "long", max_steps, tokens_per_step, drills, texts, longest_text, start_scale=start_scale, end_scale=0.02
    )


# With a theta of a million only the few slowest rotary pairs could match content over 2,000 tokens. Raising it to four
# million in finished weights, without any training, lifted needle recall at 2,048 tokens from 8 to 83 %.
ROPE_THETA = 1e7
CPU_SHAPE = ModelShape(num_layers=4, width=128, num_heads=4, num_kv_heads=2, mlp_width=384, rope_theta=ROPE_THETA)
CPU_DRAFT_SHAPE = ModelShape(num_layers=2, width=64, num_heads=2, num_kv_heads=1, mlp_width=192, rope_theta=ROPE_THETA)
GPU_SHAPE = ModelShape(num_layers=8, width=320, num_heads=10, num_kv_heads=2, mlp_width=960, rope_theta=ROPE_THETA)
GPU_DRAFT_SHAPE = ModelShape(num_layers=3, width=128, num_heads=4, num_kv_heads=2, mlp_width=384, rope_theta=ROPE_THETA)

PRESETS = {
    "cpu": Preset(
        CPU_SHAPE,
        (
            *lookup_curriculum(1024, max_steps=500, tokens_per_step=2048),
            *mixture(1024, max_steps=3500, tokens_per_step=4096),
        ),
    ),
    "cpu-long": Preset(CPU_SHAPE, (long_contexts(2048, max_steps=20_000, tokens_per_step=4096),)),
    "cpu-polish": Preset(CPU_SHAPE, (long_contexts(2048, 20_000, 4096, start_scale=0.25, texts=POLISH_TEXTS),)),
    "cpu-draft": Preset(
        CPU_DRAFT_SHAPE,
        (
            *lookup_curriculum(64, max_steps=200, tokens_per_step=2048),
            *mixture(256, max_steps=1500, tokens_per_step=2048),
        ),
    ),
    "cpu-draft-long": Preset(
        CPU_DRAFT_SHAPE,
        (
            Phase(
                "distil",
                20_000,
                2048,
                {Drill("records", 128, ALL_SYMBOLS): 0.05 * sum(DRAFT_TEXTS.values())},
                DRAFT_TEXTS,
                384,
                start_scale=0.7,
                end_scale=0.02,
            ),
        ),
    ),
    "gpu": Preset(
        GPU_SHAPE,
        (
            *lookup_curriculum(2048, max_steps=300, tokens_per_step=32768),
            *mixture(4096, max_steps=2400, tokens_per_step=65536),
        ),
        data_workers=14,
    ),
    "gpu-draft": Preset(
        GPU_DRAFT_SHAPE,
        (
            *lookup_curriculum(256, max_steps=200, tokens_per_step=32768),
            *mixture(1024, max_steps=1200, tokens_per_step=65536),
        ),
        data_workers=14,
    ),
}
