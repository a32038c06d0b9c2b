"""Saves the checkpoints of one stage, from all processes, at once or in the background.

In the background the step loop waits for a copy of the tensors alone. A thread of each process then writes its own file; that of
process 0 waits for all of them, publishes, and tells how it went. Threads speak through the board only, never by collectives.
"""

from __future__ import annotations

import contextlib
import secrets
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from torch import Tensor
from torch.distributed.tensor import DTensor

from shearling.board import opened, sealed, told
from shearling.errors import PeerError, ShearlingError, StorageError
from shearling.io.files import TEMPORARY, remove_tree, storage_errors, sweep_temporary
from shearling.train import checkpoint
from shearling.world import World, local


class Saver:
    """Use it as a context manager; leaving it waits for what is being written. `warn` tells the user something.

    In a world there is one for each name of a folder (a stage): by that name go the notes on the board.
    """

    def __init__(self, folder: Path, keep: int = 2, world: World | None = None, warn: Callable[[str], None] = lambda text: None) -> None:
        self.folder, self.keep, self.world, self._warn = folder, keep, world or World(), warn
        self.stall_seconds = 0.0
        """How long the last `save` held up its caller."""
        self._thread: threading.Thread | None = None
        self._outcome: dict[str, Any] = sealed(None)
        self._failures = 0
        self._saves = 0

    def save(
        self, step: int, tensors: Mapping[str, Tensor], state: Mapping[str, Any], *, background: bool = False, may_fail: bool = False
    ) -> None:
        """Save the checkpoint of `step`: `tensors` as they are now, sharded or whole (then of process 0), `state` as JSON. A collective.

        Raises `StorageError` where it cannot be written; earlier checkpoints are then as they were. With `may_fail`, as always in the
        background, the first such failure is a warning (in the background given by `settle` or the next save), and a second one in a
        row raises.
        """
        began = time.perf_counter()
        self.settle()
        self._saves += 1
        try:
            staged = Path(self.world.rank0_decides(lambda: str(self._stage(step))))
        except StorageError as error:
            if not (background or may_fail):
                raise
            self._failed(error)
            return
        mine = {name: tensor.detach() for name, tensor in tensors.items() if isinstance(tensor, DTensor) or self.world.first}
        rows = {name: local(tensor) for name, tensor in mine.items() if not isinstance(tensor, DTensor) or local(tensor).numel()}
        key = f"save/{self.folder.name}/{self._saves}"
        if background:
            rows = {name: tensor.to("cpu", copy=True) for name, tensor in rows.items()}
            work = (staged, step, rows, state, key)
            self._thread = threading.Thread(target=self._write, args=work, name="shearling-saver", daemon=True)
            self._thread.start()
        else:
            self._write(staged, step, rows, state, key)
            self._look(may_fail)
        self.stall_seconds = time.perf_counter() - began

    @property
    def failed(self) -> bool:
        """Whether what was written in the background has failed, and `settle` has not told it yet."""
        return self._thread is not None and not self._thread.is_alive() and "error" in self._outcome

    def settle(self) -> None:
        """Wait for what is being written in the background. A first failure is a warning, a second in a row raises; so on all processes."""
        if self._thread is None:
            return
        self._thread.join()
        self._thread = None
        self._look(may_fail=True)

    def __enter__(self) -> Saver:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if error is None:
            self.settle()
        elif self._thread is not None and not self._left_alone(error):
            self._thread.join()

    def _left_alone(self, error: BaseException) -> bool:
        """Whether another process may be gone, so that the thread would wait for it."""
        return self.world.size > 1 and (isinstance(error, PeerError) or not isinstance(error, ShearlingError))

    def _look(self, may_fail: bool) -> None:
        """How the last save went."""
        try:
            opened(self._outcome)
            self._failures = 0
        except StorageError as error:
            if not may_fail:
                raise
            self._failed(error)

    def _failed(self, error: ShearlingError) -> None:
        self._failures += 1
        whole = [path for path in checkpoint.steps(self.folder).values()]
        kept = f"The last checkpoint is {whole[-1]}." if whole else "There is no checkpoint yet."
        if self._failures > 1:
            text = f"two checkpoints in a row could not be saved: {error}. {kept} Free space and run the same command to go on."
            raise told(StorageError(text))
        self._warn(f"a checkpoint could not be saved: {error}. {kept} Training goes on; a second failure ends it.")

    def _stage(self, step: int) -> Path:
        sweep_temporary(self.folder)
        staged = self.folder / f"{TEMPORARY}{checkpoint.directory_of(self.folder, step).name}-{secrets.token_hex(6)}"
        with storage_errors(self.folder):
            staged.mkdir(parents=True)
        return staged

    def _write(self, staged: Path, step: int, rows: Mapping[str, Tensor], state: Mapping[str, Any], key: str) -> None:
        """Write this process' file; `_outcome` is then the same on all, whatever went wrong on one."""
        try:
            note = sealed(checkpoint.write_part(staged, self.world.rank, rows))
        except Exception as error:
            note = sealed(None, error)
        try:
            self.world.post(f"{key}/{self.world.rank}", note)
            if self.world.first:
                self.world.post(key, self._publish(staged, step, state, key))
            self._outcome = self.world.read(key, 0)
        except Exception as error:  # another process is gone
            self._outcome = sealed(None, error)

    def _publish(self, staged: Path, step: int, state: Mapping[str, Any], key: str) -> dict[str, Any]:
        try:
            notes = [self.world.read(f"{key}/{rank}", rank) for rank in range(self.world.size)]  # of all: then none is writing any more
            checkpoint.publish(staged, step, [opened(note) for note in notes], state, self.keep)
            return sealed(None)
        except Exception as error:
            with contextlib.suppress(OSError):  # the next save sweeps; the others wait for what is returned here
                remove_tree(staged)
            return sealed(None, error)
