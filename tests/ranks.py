"""Runs on several processes for tests: each of them forked from a server that has imported everything, as a launcher would start them."""

from __future__ import annotations

import contextlib
import importlib
import os
import signal
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from runs import _FORKSERVER, _command

Moment = tuple[str, Any]


def launch(size: int, work: Callable[..., None], *arguments: Any) -> list[Any]:
    """So many processes, begun, that each do `work(rank, *arguments)` on one thread, where a launcher would have put them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [_FORKSERVER.Process(target=_placed, args=(rank, size, port, work, arguments)) for rank in range(size)]
    for process in processes:
        process.start()
    return processes


def codes(processes: Sequence[Any], seconds: float = 120, tell: Callable[[], str] = str) -> list[int]:
    """Exit codes of all; an assertion, with what `tell` says, where one is at it still after `seconds`."""
    end = time.monotonic() + seconds
    for process in processes:
        process.join(max(0.0, end - time.monotonic()))
    late = [rank for rank, process in enumerate(processes) if process.is_alive()]
    for rank in late:
        processes[rank].kill()
    assert not late, f"ranks {late} are at it still\n{tell()}"
    return [int(process.exitcode) for process in processes]


def _placed(rank: int, size: int, port: int, work: Callable[..., None], arguments: Sequence[Any]) -> None:
    import torch

    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(size)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    work(rank, *arguments)


class Ranks:
    """`size` processes of one run of the command line; the output of each is in FOLDER/rank-N.txt.

    `moments`: {rank: (moment, signal)}: that process sends itself the signal there (see `runs.SignalAt`; steps and notes are told to
    process 0 alone, so for others name an `inject`). `inject`: "module:function", called in every process with its rank beforehand.
    """

    def __init__(
        self,
        arguments: Sequence[str],
        folder: Path,
        size: int = 2,
        moments: Mapping[int, tuple[Moment, int]] | None = None,
        inject: str | None = None,
    ) -> None:
        self.folder, self.size = folder, size
        folder.mkdir(parents=True, exist_ok=True)
        self.processes = launch(size, _rank, list(arguments), [str(self.output(rank)) for rank in range(size)], moments or {}, inject)

    def output(self, rank: int) -> Path:
        return self.folder / f"rank-{rank}.txt"

    def codes(self, seconds: float = 120) -> list[int]:
        """Exit codes of all; an assertion where one is at it still after `seconds`."""
        return codes(self.processes, seconds, self.text)

    def text(self) -> str:
        return "\n".join(f"--- rank {rank}\n{self.output(rank).read_text()}" for rank in range(self.size) if self.output(rank).exists())

    def send(self, rank: int, number: int) -> None:
        os.kill(int(self.processes[rank].pid), number)  # type: ignore[arg-type]


def _rank(rank: int, arguments: list[str], outputs: list[str], moments: Mapping[int, tuple[Moment, int]], inject: str | None) -> None:
    if inject is not None:
        module, _, name = inject.partition(":")
        prepare: Callable[[int], None] = getattr(importlib.import_module(module), name)
        prepare(rank)
    moment, number = moments.get(rank, (None, signal.SIGTERM))
    _command(arguments, outputs[rank], moment, number, None)


@contextlib.contextmanager
def within(seconds: float) -> Any:
    """What is inside takes no longer."""
    began = time.monotonic()
    yield
    assert time.monotonic() - began < seconds
