"""The processes of a run: one, or as many as torchrun started. Everything that they decide together goes through here.

Two kinds of talk, apart from the gradients' and weights' own (FSDP2):

collectives   every process must call them in the same order; they end in an error after the run's `timeout`.
the board     notes in the store that the processes met in: one posts, others read it when it is there. Waiting for a note has no
              time limit of its own, since one process may prepare text for hours while the others wait; it ends when a
              process that is waited for shows no sign of life for `timeout` seconds.

Notes and decisions are JSON: nothing is pickled.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import re
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar

from shearling.board import lost, opened, peer_errors, sealed, session_name, told
from shearling.errors import ConfigError, PeerError, Problem, ShearlingError

if TYPE_CHECKING:
    from torch import Tensor, nn

T = TypeVar("T")
_BEAT_SECONDS = 2.0
_POLL_SECONDS = 0.01, 0.5
_LEAVING_SECONDS = 10.0
_LOST = re.compile(r"connection|peer|timed? ?out|broken pipe|socket|gloo|nccl|store", re.IGNORECASE)


class World:
    """One process alone; the base of many. Use it as a context manager around everything that the processes do together."""

    rank = 0
    """Number of this process, from 0."""
    size = 1
    """How many there are."""
    local_rank = 0
    """Number of this process on its machine."""
    local_size = 1
    """How many there are on its machine."""

    def __init__(self) -> None:
        self.signal: Callable[[], int] = lambda: 0
        """Gives the number of the signal that asked this process to stop, 0 for none. While it waits, it passes this on."""
        self._notes: dict[str, Any] = {}

    def __enter__(self) -> World:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        return None

    @property
    def first(self) -> bool:
        """Whether this is process 0, which alone writes what is written once."""
        return self.rank == 0

    def largest(self, value: int) -> int:
        """The largest of all processes' values. A collective."""
        return value

    def sum_(self, tensor: Tensor) -> Tensor:
        """Add up a tensor over all processes, in place, to the same bits on each. A collective."""
        return tensor

    def gather(self, tensor: Tensor) -> list[Tensor]:
        """Every process' tensor (all of one shape), in order of the processes. A collective."""
        return [tensor]

    def post(self, key: str, value: Any) -> None:
        """Put a JSON value on the board, under a key that is used once."""
        self._notes[key] = value

    def read(self, key: str, rank: int) -> Any:
        """Wait for a value that process `rank` posts. Raises `PeerError` where that process is gone."""
        return self._notes[key]

    def rank0_decides(self, work: Callable[[], T]) -> T:
        """Do `work` on process 0 alone; every process gets its JSON value, or raises its error. Others may wait for hours."""
        return work()

    def everywhere(self, work: Callable[[], T]) -> T:
        """Do `work`, in which no process may wait for another, on each; where one fails, all raise the error of the lowest rank."""
        return work()

    def in_turns(self, work: Callable[[], T]) -> T:
        """As `everywhere`, but the processes of one machine one after the other, so that what it takes for a while is taken once."""
        return work()

    def stop_asked(self) -> int:
        """For work of process 0 alone: number of the signal that asked any process to stop, 0 for none."""
        return self.signal()

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """Work that the others wait for: where it does not go on for `timeout`, its stack is written out and the process ends."""
        yield

    def goes_on(self) -> None:
        """Inside `watched`: a part of the work begins, which may take `timeout` again."""


class Many(World):
    """Several processes, as torchrun (or another launcher that sets RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT) starts them."""

    def __init__(self, timeout: float, on_gpu: bool) -> None:
        super().__init__()
        import torch.distributed as dist
        from torch.distributed.distributed_c10d import PrefixStore
        from torch.distributed.rendezvous import rendezvous

        self.rank, self.size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        self.local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        self.local_size = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        self.timeout = timeout
        span = timedelta(seconds=timeout)
        with peer_errors(timeout):
            store, _, _ = next(iter(rendezvous("env://", self.rank, self.size, timeout=span)))
            session = session_name(store, self.rank, self.size, timeout)
            self._board = PrefixStore(f"shearling/{session}", store)
            backend = "cpu:gloo,cuda:nccl" if on_gpu else "gloo"
            group = PrefixStore(f"group/{session}", store)
            dist.init_process_group(backend, store=group, rank=self.rank, world_size=self.size, timeout=span)
        self._decisions = 0
        self._passed_on = self._watching = False
        self._alive = threading.Event()
        self._beating = threading.Thread(target=self._beat, name="shearling-heartbeat", daemon=True)

    def __enter__(self) -> World:
        self._beating.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        import torch.distributed as dist

        self._alive.set()
        self._beating.join()
        together = error is None or (isinstance(error, ShearlingError) and error.told and not isinstance(error, PeerError))
        if together:  # else the others may be in the middle of something, and NCCL would wait for them
            dist.destroy_process_group()
            with contextlib.suppress(Exception):  # the board may lie in process 0, which therefore leaves last
                if self.first:
                    for rank in range(1, self.size):
                        self.read(f"left/{rank}", rank, patience=_LEAVING_SECONDS)
                else:
                    self.post(f"left/{self.rank}", True)
        if isinstance(error, RuntimeError) and not isinstance(error, ShearlingError) and _LOST.search(str(error)):
            raise lost(self.timeout, error) from error

    def largest(self, value: int) -> int:
        """See `World`."""
        import torch
        import torch.distributed as dist

        found = torch.tensor([value])
        with peer_errors(self.timeout):
            dist.all_reduce(found, dist.ReduceOp.MAX)
        return int(found)

    def sum_(self, tensor: Tensor) -> Tensor:
        """See `World`."""
        import torch.distributed as dist

        with peer_errors(self.timeout):
            dist.all_reduce(tensor)
        return tensor

    def gather(self, tensor: Tensor) -> list[Tensor]:
        """See `World`."""
        import torch
        import torch.distributed as dist

        found = [torch.empty_like(tensor) for _ in range(self.size)]
        with peer_errors(self.timeout):
            dist.all_gather(found, tensor.contiguous())
        return found

    def post(self, key: str, value: Any) -> None:
        """See `World`."""
        with peer_errors(self.timeout):
            self._board.set(key, json.dumps(value))

    def read(self, key: str, rank: int, patience: float | None = None) -> Any:
        """See `World`. `patience`: seconds without a sign of life, instead of `timeout`."""
        pause, last, seen = _POLL_SECONDS[0], time.monotonic(), b""
        patience = self.timeout if patience is None else patience
        with peer_errors(self.timeout):
            while not self._board.check([key]):
                if (number := self.signal()) and not self._passed_on:
                    self._passed_on = True
                    self._board.set("stop", json.dumps(number))
                time.sleep(pause)
                pause = min(pause * 1.5, _POLL_SECONDS[1])
                beat = self._board.get(f"beat/{rank}") if self._board.check([f"beat/{rank}"]) else b""
                if beat != seen:
                    seen, last = beat, time.monotonic()
                elif time.monotonic() - last > patience:
                    raise lost(self.timeout, f"process {rank} shows no sign of life")
            return json.loads(self._board.get(key))

    def rank0_decides(self, work: Callable[[], T]) -> T:
        """See `World`."""
        key = self._next()
        if self.rank != 0:
            decided: T = opened(self.read(key, 0))
            return decided
        outcome, error = _attempt(work)
        self.post(key, sealed(outcome, error))
        if error is not None:
            raise told(error)
        plain: T = json.loads(json.dumps(outcome))  # as the others get it
        return plain

    def everywhere(self, work: Callable[[], T]) -> T:
        """See `World`."""
        key = self._next()
        outcome, error = _attempt(work)
        self.post(f"{key}/{self.rank}", sealed(None, error))
        for rank in range(self.size):
            if rank == self.rank and error is not None:
                raise told(error)
            opened(self.read(f"{key}/{rank}", rank))
        return outcome  # type: ignore[return-value]

    def in_turns(self, work: Callable[[], T]) -> T:
        """See `World`."""
        key = self._next()

        def mine() -> T:
            try:
                if self.local_rank:  # ranks of one machine follow one another
                    self.read(f"{key}/{self.rank - 1}/done", self.rank - 1)
                return work()
            finally:
                self.post(f"{key}/{self.rank}/done", True)

        return self.everywhere(mine)

    def stop_asked(self) -> int:
        """See `World`."""
        if number := self.signal():
            return number
        with peer_errors(self.timeout):
            return int(json.loads(self._board.get("stop"))) if self._board.check(["stop"]) else 0

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """See `World`."""
        self._watching = True
        self.goes_on()
        try:
            yield
        finally:
            self._watching = False
            faulthandler.cancel_dump_traceback_later()

    def goes_on(self) -> None:
        """See `World`."""
        if self._watching:
            faulthandler.dump_traceback_later(self.timeout, exit=True)

    def _next(self) -> str:
        self._decisions += 1
        return f"decision/{self._decisions}"

    def _beat(self) -> None:
        number = 0
        while not self._alive.wait(_BEAT_SECONDS):
            number += 1
            try:
                self._board.set(f"beat/{self.rank}", str(number))
            except Exception:  # who holds the board is gone; the main thread will see it
                return


def join(device: str = "cpu", timeout: float = 600.0) -> World:
    """The processes that the launcher's environment speaks of; without one, this process alone.

    `device`: what the run computes on; with a GPU, tensors on it are exchanged by NCCL. `timeout`: seconds. Raises
    `ConfigError` where the environment is not whole, `PeerError` where the others do not come.
    """
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        return World()
    if os.environ["WORLD_SIZE"] == "1":
        return World()
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
    if missing:
        remedy = "Start with torchrun, which sets them, or unset RANK and WORLD_SIZE."
        raise ConfigError("several processes are asked for", [Problem(name, "nothing in the environment", remedy) for name in missing])
    import torch

    return Many(timeout, device.startswith("cuda") or (device == "auto" and torch.cuda.is_available()))


def launched_rank() -> int:
    """The rank that the launcher gave this process, before anything is joined."""
    return int(os.environ.get("RANK", "0"))


def restarted() -> bool:
    """Whether torchrun started this process in the place of one that failed."""
    return os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"


def local(tensor: Tensor) -> Tensor:
    """The rows of a tensor that lie on this process; all of them where it is not sharded. No copy."""
    from torch.distributed.tensor import DTensor

    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """All rows of a tensor, no copy where it is not sharded; else a collective."""
    from torch.distributed.tensor import DTensor

    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def forget_gathered(model: nn.Module) -> None:
    """Free gathered weights, and put the sharded ones back into the modules: after forward passes without a backward pass, before the
    parameters are looked at; and after they were written to."""
    for module in model.modules():
        if hasattr(module, "reshard"):
            module.reshard()  # type: ignore[operator]


def _attempt(work: Callable[[], T]) -> tuple[T | None, Exception | None]:
    try:
        return work(), None
    except Exception as error:
        return None, error
