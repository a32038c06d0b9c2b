"""The error tree and the exit codes.

Every error that a user can meet is a `ShearlingError` and also the nearest stdlib error, so that code which does not know
Shearling still catches it. A message says what is wrong, where, the value found, and the remedy.

| code | meaning |
|---|---|
| 0 | done |
| 1 | a bug in Shearling, or another process of the run was lost |
| 2 | the recipe, an option or a shape is wrong |
| 3 | an artifact or data is wrong: a model, a token shard, a text file |
| 4 | the numbers went wrong: NaN, infinity, masked and cut model differ |
| 5 | the output exists or is in use |
| 6 | storage failed: disk full, not writable |
| 75 | stopped by a signal after saving; the same command goes on |
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong: where, what was found there, and what to do about it."""

    field: str
    found: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.field}: found {self.found}. {self.remedy}"


class ShearlingError(Exception):
    """Root of every error raised on purpose. `exit_code` is what the command line ends with."""

    exit_code = 1
    told = False
    """Whether another process of the run raises the same error and tells it."""


class ProblemsError(ShearlingError):
    """An error that lists several problems at once, so that one look mends them all."""

    def __init__(self, headline: str, problems: Sequence[Problem] = ()) -> None:
        self.headline = headline
        self.problems = tuple(problems)
        super().__init__("\n".join([headline, *(f"  - {p}" for p in self.problems)]))

    def __reduce__(self) -> tuple[type, tuple[str, tuple[Problem, ...]]]:
        return type(self), (self.headline, self.problems)


class ConfigError(ProblemsError, ValueError):
    """A recipe or an option is wrong."""

    exit_code = 2


class ShapeError(ProblemsError, ValueError):
    """A target shape cannot be cut from the source."""

    exit_code = 2


class ArtifactError(ProblemsError, ValueError):
    """A model directory, checkpoint or token shard is missing, damaged, or not what it says it is."""

    exit_code = 3


class NewerFormatError(ArtifactError):
    """A newer version wrote it: it is whole, and so no reason to fall back to an older one unasked."""


class DataError(ProblemsError, ValueError):
    """Text is missing, unreadable, or too short."""

    exit_code = 3


class NumericsError(ShearlingError, ArithmeticError):
    """A non-finite number, or a masked and a cut model that differ."""

    exit_code = 4


class OutputError(ShearlingError, FileExistsError):
    """An output exists already, or another process is writing it."""

    exit_code = 5


class StorageError(ShearlingError, OSError):
    """The disk is full or a path cannot be written."""

    exit_code = 6


class PeerError(ShearlingError, ConnectionError):
    """Another process of the run ended or does not answer."""

    exit_code = 1


class Stopped(ShearlingError):
    """A signal asked to stop; everything is saved, and the same command goes on."""

    exit_code = 75
