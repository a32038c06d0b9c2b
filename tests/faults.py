"""Faults for tests: a child killed at its k-th filesystem call."""

from __future__ import annotations

import builtins
import itertools
import os
from collections.abc import Callable
from typing import Any

CALLS = ((builtins, "open"), *((os, name) for name in ("open", "mkdir", "fsync", "rename", "unlink", "rmdir")))


def in_child_killed_at(k: int, work: Callable[[], Any]) -> bool:
    """Fork; run `work` and die, as by SIGKILL, at its k-th filesystem call. Returns whether it got there."""
    pid = os.fork()
    if pid == 0:
        calls = itertools.count(1)
        for module, name in CALLS:
            original = getattr(module, name)

            def wrapper(*args: Any, _original: Any = original, **kwargs: Any) -> Any:
                if next(calls) == k:
                    os._exit(9)
                return _original(*args, **kwargs)

            setattr(module, name, wrapper)
        try:
            work()
            os._exit(0)
        finally:
            os._exit(1)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert code in (0, 9)
    return code == 9
