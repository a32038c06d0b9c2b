"""The log of a run: one JSON line a step in `metrics.jsonl`, and the same numbers as TensorBoard scalars in `events/`.

A line holds `stage`, `step` (1-based in its stage; step 0 is the evaluation before the first) and `loss` in nats per token;
everything else is there when it was measured. In a stage that learns from another model `loss` is what was minimised, of whose
`terms` the cross-entropy is `text`.

    terms         {what the loss is made of: x}
    domain_loss, weights, heldout, reference   {domain: x}; heldout and reference in nats per token, heldout with its "mean"
    heldout_error {domain: standard error of heldout}, null where there is none; with that of "mean"
    sizes         {axis: {"expected", "target" (as scheduled), "worst" (largest distance of a vector of the axis from target)}}
    parameters    what the masks of a method that cuts in stages leave; model_parameters: of the model that trains, where it is sliced
    multipliers   {axis: {"lambda_1", "lambda_2"}} or, of projected gates, {axis: {"shift"}}
    learning_rate {"weights", "gates"}
    gradient_norm, tokens (so far in the stage), tokens_per_second, seconds, evaluation_seconds (of them in evaluations)

A step that was skipped has `skipped` (why) and `samples` ({domain: numbers of its training sequences}).

TensorBoard's files are for looking at: where they cannot be written, the run goes on without. The log itself it cannot do without.

An interrupted run writes some steps that its checkpoint does not hold. Opening the log to go on cuts them off, so that the
log of a resumed run has each step once, like that of a run that was never interrupted.
"""

from __future__ import annotations

import contextlib
import json
import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from shearling.errors import ArtifactError, Problem, StorageError
from shearling.io.files import check_writable, storage_errors, write_atomic

STAGES = ("prune", "train")
"""The stages that are logged, in the order in which they run."""
METRICS_FILE = "metrics.jsonl"
EVENTS_FOLDER = "events"


class RunLog:
    """The open log of one stage; use it as a context manager.

    `after_step` is the last step of the stage that is saved: later lines of it, and all of later stages, are cut off. 0 means
    that the stage begins anew, so its step 0 goes too. `offset` is the number of steps of the stages before, and is added to
    the step for TensorBoard only. Raises `StorageError` where the log cannot be written, `ArtifactError` where it is damaged.
    `warn` is told where TensorBoard's files cannot be.
    """

    def __init__(
        self,
        run_dir: str | Path,
        stage: str,
        *,
        after_step: int = 0,
        offset: int = 0,
        warn: Callable[[str], None] = lambda text: warnings.warn(text, stacklevel=3),
    ) -> None:
        if stage not in STAGES:
            raise ValueError(f"stage {stage!r} is not logged; the stages are {STAGES}")
        self.stage, self.path, self.offset = stage, Path(run_dir) / METRICS_FILE, offset
        self._last = after_step if after_step > 0 else -1
        self._warn = warn
        self._failure: StorageError | None = None
        check_writable(self.path)
        with storage_errors(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            _cut(self.path, stage, self._last)
            self._file = self.path.open("a", encoding="utf-8")
        self._events: Any = None
        self._without_events = False
        self._optionally(lambda: self._open_events(offset + after_step))

    @property
    def failed(self) -> bool:
        """Whether a line could not be written; `check` then raises why. Until it is called, nothing more is written."""
        return self._failure is not None

    def check(self) -> None:
        """Raise the `StorageError` of a line that could not be written. Apart from `step`, so that all processes can raise it together."""
        if self._failure is not None:
            raise self._failure

    def step(self, metrics: Mapping[str, Any]) -> None:
        """Append one step: `metrics` as in the module's docstring, `stage` filled in; numbers may be scalar tensors.

        A number that is not finite is written as null, as JSON has no other. Raises `ValueError` where the step is not later
        than the last; where the line cannot be written, `check` raises.
        """
        if self.failed:
            return
        step = int(metrics["step"])
        if step <= self._last or metrics.get("stage", self.stage) != self.stage:
            found = f"step {step} of stage {metrics.get('stage', self.stage)!r}"
            raise ValueError(f"the log of stage {self.stage!r} is at step {self._last}; it cannot take {found}")
        line = _plain({**metrics, "stage": self.stage, "step": step})
        try:
            with storage_errors(self.path):
                self._file.write(json.dumps({"stage": self.stage, "step": step, **line}, ensure_ascii=False, allow_nan=False) + "\n")
                self._file.flush()
        except StorageError as error:
            self._failure = error
            return
        self._last = step
        self._optionally(lambda: self._add_events(line))

    def close(self) -> None:
        """Flush and close both; a second call does nothing more."""
        self._optionally(lambda: self._events.close())
        with contextlib.suppress(OSError) if self.failed else storage_errors(self.path):
            self._file.close()

    def _optionally(self, work: Callable[[], Any]) -> None:
        """Do something with TensorBoard's files; whatever goes wrong is told, and is the last that is done with them."""
        if self._without_events:
            return
        try:
            work()
        except Exception as error:
            self._without_events = True
            found = " ".join(f"{type(error).__name__}: {error}".split())[:200]
            self._warn(f"TensorBoard's files cannot be written ({found}); the run goes on without them, metrics.jsonl has it all")

    def _open_events(self, first: int) -> None:
        # Imported here since it takes a second, and readers of a log have no need of it.
        from torch.utils.tensorboard import SummaryWriter

        # TensorBoard forgets what earlier event files hold from purge_step on. Step 0 of a second stage shares its global
        # step with the last of the first, which must stay.
        self._events = SummaryWriter(str(self.path.parent / EVENTS_FOLDER), purge_step=first + 1 if first else 0, flush_secs=30)

    def _add_events(self, line: Mapping[str, Any]) -> None:
        for tag, value in _scalars(line):
            self._events.add_scalar(tag, value, self.offset + line["step"])

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


class NoLog:
    """The log of a process that keeps none."""

    failed = False

    def check(self) -> None:
        """Nothing has failed."""

    def step(self, metrics: Mapping[str, Any]) -> None:
        """Nothing."""

    def __enter__(self) -> NoLog:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        return None


def read_metrics(run_dir: str | Path) -> list[dict[str, Any]]:
    """Every whole line of a run's log in order; empty where there is none yet.

    A torn last line, as a killed run leaves it, is passed over. Raises `ArtifactError` where any other line is damaged.
    """
    return [line for _, line in _read(Path(run_dir) / METRICS_FILE)]


def _read(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """The whole lines of a log, each as text and parsed."""
    try:
        texts = path.read_bytes().decode("utf-8", errors="replace").split("\n")
    except FileNotFoundError:
        return []
    while texts and not texts[-1].strip():
        texts.pop()
    lines = []
    for number, text in enumerate(texts, 1):
        line = _parsed(text)
        if line is not None:
            lines.append((text, line))
        elif number < len(texts):
            found = text if len(text) <= 80 else text[:77] + "..."
            problem = Problem(f"line {number}", repr(found), "Delete this line, or the file to lose the log alone.")
            raise ArtifactError(f"{path}: not a log of steps", [problem])
    return lines


def _parsed(text: str) -> dict[str, Any] | None:
    try:
        line = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return line if isinstance(line, dict) and line.get("stage") in STAGES and isinstance(line.get("step"), int) else None


def _cut(path: Path, stage: str, last: int) -> None:
    """Drop what comes after step `last` of `stage`, and a torn last line; the file changes whole or not at all."""
    if not path.exists():
        return
    saved = (STAGES.index(stage), last)
    text = "".join(text + "\n" for text, line in _read(path) if (STAGES.index(line["stage"]), line["step"]) <= saved)
    if text.encode() != path.read_bytes():
        write_atomic(path, text)


def _plain(value: Any) -> Any:
    """Plain JSON values: mappings of strings, and numbers that are finite or None."""
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if value is None or isinstance(value, str | bool | int):
        return value
    number = float(value)
    return number if math.isfinite(number) else None


def _scalars(line: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """The numbers of a line under their TensorBoard tags: `heldout/web`, `sizes/hidden/expected`."""
    for key, value in line.items():
        if isinstance(value, Mapping):
            yield from _scalars(value, f"{prefix}{key}/")
        elif isinstance(value, int | float) and (prefix or key != "step"):
            yield prefix + key, float(value)
