"""Where a run tells how it goes. Nothing that goes wrong there ends a run."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any, Protocol


class Show(Protocol):
    """Where a run tells how it goes; the command line shows it, and a Python caller may pass a class of their own."""

    def stage(self, name: str, done: bool) -> None:
        """A stage begins, or (`done`) was found finished."""
        ...

    def note(self, text: str) -> None:
        """Something the user should read."""
        ...

    def step(self, stage: str, step: int, steps: int, line: Mapping[str, Any]) -> None:
        """A training step is done; `line` is what was logged."""
        ...

    def count(self, what: str, done: int, unit: str) -> None:
        """Work of unknown length goes on."""
        ...


class Silent:
    """Shows nothing; the default in Python."""

    def stage(self, name: str, done: bool) -> None:
        """Nothing."""

    def note(self, text: str) -> None:
        """Nothing."""

    def step(self, stage: str, step: int, steps: int, line: Mapping[str, Any]) -> None:
        """Nothing."""

    def count(self, what: str, done: int, unit: str) -> None:
        """Nothing."""


class Shielded:
    """Another's `Show`: when it fails, that is told once, and the run goes on unseen."""

    def __init__(self, show: Show) -> None:
        self._show: Show = show

    def stage(self, name: str, done: bool) -> None:
        """See `Show`."""
        self._try(lambda: self._show.stage(name, done))

    def note(self, text: str) -> None:
        """See `Show`."""
        self._try(lambda: self._show.note(text))

    def step(self, stage: str, step: int, steps: int, line: Mapping[str, Any]) -> None:
        """See `Show`."""
        self._try(lambda: self._show.step(stage, step, steps, line))

    def count(self, what: str, done: int, unit: str) -> None:
        """See `Show`."""
        self._try(lambda: self._show.count(what, done, unit))

    def _try(self, tell: Callable[[], None]) -> None:
        try:
            tell()
        except Exception as error:
            self._show = Silent()
            warnings.warn(f"progress cannot be shown any more ({type(error).__name__}: {error}); the run goes on", stacklevel=3)


def duration(seconds: float) -> str:
    """A time in words, as 3m20s or 1h05m."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{rest:02d}s"
