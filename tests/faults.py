"""Faults for tests: children that are killed, at a call of the file system or wherever the test says, and disks that are full."""

from __future__ import annotations

import builtins
import errno
import gc
import itertools
import os
import resource
import signal
import sys
import traceback
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

CALLS = ((builtins, "open"), *((os, name) for name in ("open", "mkdir", "fsync", "rename", "unlink", "rmdir")))
KILLED = -signal.SIGKILL
"""What `in_child` returns of a child that `die` ended."""


def in_child(work: Callable[[], Any]) -> int:
    """Fork, do `work` there, and return how that ended: 0 where it came to its end, 1 where it raised, -N by signal N."""
    return _ended(_started(work))


def in_children(works: Iterable[Callable[[], Any]], at_once: int = 2) -> Iterator[int]:
    """The same of each in turn, while the next is at work already."""
    running: deque[int] = deque()
    try:
        for work in works:
            running.append(_started(work))
            if len(running) == at_once:
                yield _ended(running.popleft())
        while running:
            yield _ended(running.popleft())
    finally:
        for pid in running:
            _ended(pid)


def die() -> None:
    """As if by `kill -9`: nothing is flushed, closed or tidied up."""
    os.kill(os.getpid(), signal.SIGKILL)
    signal.pause()  # another thread may run on for a moment


def dying_at(k: int, work: Callable[[], Any]) -> Callable[[], None]:
    """For a child: `work`, which ends as by `kill -9` at its k-th filesystem call, in whichever thread."""

    def dying() -> None:
        calls = itertools.count(1)
        for module, name in CALLS:
            original = getattr(module, name)

            def wrapper(*args: Any, _original: Any = original, **kwargs: Any) -> Any:
                if next(calls) == k:
                    die()
                return _original(*args, **kwargs)

            setattr(module, name, wrapper)
        work()

    return dying


def in_child_killed_at(k: int, work: Callable[[], Any]) -> bool:
    """Fork; run `work` and die at its k-th filesystem call. Returns whether it got there."""
    code = in_child(dying_at(k, work))
    assert code in (0, KILLED)
    return code == KILLED


def largest_file(size: int) -> None:
    """From now on no file of this process can grow beyond `size` bytes: as on a full disk, writing fails in the middle of one.

    For a child of its own: the limit can be lowered, not raised again.
    """
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def full_disk(path: str | Path) -> OSError:
    """What writing raises there."""
    return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))


def _started(work: Callable[[], Any]) -> int:
    sys.stdout.flush()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # from Python 3.12 on, a library's idle threads are enough for one
        pid = os.fork()
    if pid == 0:
        code = 1
        gc.disable()  # it would touch, and so copy, every page that holds an object
        try:
            work()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)
    return pid


def _ended(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


class Bomb:
    """Makes a directory when unpickled."""

    def __init__(self, sentinel: Path) -> None:
        self.sentinel = sentinel

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.sentinel),)
