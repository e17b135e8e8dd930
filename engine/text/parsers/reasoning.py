"""The known ways of marking thinking, by name."""

from __future__ import annotations

from engine.text.parsers.registry import REASONING_PARSERS
from engine.text.parsers.thinking import Thinking

THINK = Thinking(("<think>",), ("</think>",), forced_end="\n</think>\n\n")

REASONING_PARSERS.update(
    {
        "qwen3": THINK,
        "mimir": Thinking(("<think>",), ("</think>",), forced_end="\n</think>\n"),
        "deepseek_r1": Thinking(("<think>",), ("</think>",), forced_end="\n</think>\n\n", is_implicit=True),
        "mistral": Thinking(("[THINK]",), ("[/THINK]",), forced_end="[/THINK]"),
        "granite": Thinking(
            ("Here is my thought process:", "Here's my thought process:"),
            ("Here is my response:", "Here's my response:"),
            forced_end="\n\nHere is my response:",
        ),
        # the channels are told apart by the parser of the same name
        "harmony": Thinking(
            ("<|channel|>analysis<|message|>",),
            ("<|end|>",),
            forced_end="<|end|><|start|>assistant<|channel|>final<|message|>",
        ),
    }
)
