"""How a run shows itself in a terminal: a line for each stage, and a line every few seconds of a long one."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.markup import escape

from shearling.show import duration

WORDS = {
    "prepare": "preparing the text",
    "source": "measuring the source",
    "teacher": "training the teacher",
    "prune": "pruning, cutting, verifying",
    "train": "continuing pretraining",
    "evaluate": "measuring speed",
}
SECONDS_BETWEEN = 5.0


class Terminal:
    """Shows a run on standard error, so that standard output stays clean; plain lines, fit for logs."""

    def __init__(self) -> None:
        self.console = Console(stderr=True, highlight=False, soft_wrap=True)
        self._last = 0.0
        self._began = 0.0
        self._first = 0

    def stage(self, name: str, done: bool) -> None:
        """A stage begins, or was found finished."""
        self.console.print(f"[bold]{name}[/bold]: {'done before' if done else WORDS[name]}")
        self._last, self._began = 0.0, 0.0

    def note(self, text: str) -> None:
        """Something the user should read."""
        self.console.print(f"  {escape(text)}")

    def step(self, stage: str, step: int, steps: int, line: Mapping[str, Any]) -> None:
        """A training step is done."""
        now = time.monotonic()
        if not self._began:
            self._began, self._first = now, step
        if now - self._last < SECONDS_BETWEEN and step < steps and "heldout" not in line:
            return
        self._last = now
        left = "" if step == self._first else f", {duration((now - self._began) / (step - self._first) * (steps - step))} left"
        text = f"  {stage} {step}/{steps}  loss {line['loss']:.3f}  {line['tokens_per_second']:,.0f} tokens/s{left}"
        if "heldout" in line:
            text += f"  held-out {line['heldout']['mean']:.3f}"
        for axis, size in line.get("sizes", {}).items():
            text += f"  {axis} {size['expected']:.1f} of {size['target']:.1f}"
        self.console.print(escape(text))

    def count(self, what: str, done: int, unit: str) -> None:
        """Work of unknown length goes on."""
        now = time.monotonic()
        if now - self._last >= SECONDS_BETWEEN:
            self._last = now
            self.console.print(f"  {escape(what)}, {done:,} {unit}")
