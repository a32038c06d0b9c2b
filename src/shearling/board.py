"""What the processes of a run write to one another: notes that carry a value or an error, and the name under which they meet."""

from __future__ import annotations

import contextlib
import json
import secrets
import time
from collections.abc import Iterator
from typing import Any, TypeVar

from shearling import errors
from shearling.errors import PeerError, Problem, ProblemsError, ShearlingError

E = TypeVar("E", bound=Exception)
_POLL_SECONDS = 0.01


def session_name(store: Any, rank: int, size: int, timeout: float) -> str:
    """A name that the processes which are there now share, and no earlier ones had.

    torchrun may keep one store over restarts, with all that was posted in it: process 0's decision of an earlier try would be read as
    of this one. So each process greets with a word of its own, process 0 answers with that word and its own, and the answer is
    acknowledged; process 0's word is the name.
    """
    own, end = secrets.token_hex(8), time.monotonic() + timeout
    store.set(f"hello/{rank}", own)
    missing = set(range(1, size)) if rank == 0 else {rank}
    while missing:
        for other in sorted(missing):
            if rank == 0:
                if store.check([f"hello/{other}"]):
                    store.set(f"welcome/{other}", json.dumps([store.get(f"hello/{other}").decode(), own]))
                if store.check([f"heard/{other}"]) and store.get(f"heard/{other}").decode() == own:
                    missing.discard(other)
            elif store.check([f"welcome/{rank}"]):
                hello, name = json.loads(store.get(f"welcome/{rank}"))
                if hello == own:
                    store.set(f"heard/{rank}", name)
                    return str(name)
        if time.monotonic() > end:
            raise RuntimeError(f"processes {sorted(missing)} of {size} did not come")
        time.sleep(_POLL_SECONDS)
    return own


def sealed(value: Any, error: Exception | None = None) -> dict[str, Any]:
    """A JSON value, or an error, in a form that goes over the board."""
    if error is None:
        return {"value": value}
    if isinstance(error, ProblemsError):
        problems = [[problem.field, problem.found, problem.remedy] for problem in error.problems]
        return {"error": type(error).__name__, "text": error.headline, "problems": problems}
    return {"error": type(error).__name__, "text": str(error)}


def opened(envelope: dict[str, Any]) -> Any:
    """The value that was sealed; or the error that was, raised: one of ours as it was, any other as a `PeerError` that names it."""
    if "error" not in envelope:
        return envelope["value"]
    kind: Any = getattr(errors, envelope["error"], object)
    error: ShearlingError
    if not issubclass(kind, ShearlingError):
        error = PeerError(f"a process of this run failed: {envelope['error']}: {envelope['text']}")
    elif "problems" in envelope:
        error = kind(envelope["text"], [Problem(*problem) for problem in envelope["problems"]])
    else:
        error = kind(envelope["text"])
    raise told(error)


@contextlib.contextmanager
def alike() -> Iterator[None]:
    """Around what every process does with the same values: an error of ours inside is raised by all of them."""
    try:
        yield
    except ShearlingError as error:
        raise told(error) from error.__cause__


def told(error: E) -> E:
    """Mark an error that every process raises, so that it is printed once."""
    if isinstance(error, ShearlingError):
        error.told = True
    return error


@contextlib.contextmanager
def peer_errors(timeout: float) -> Iterator[None]:
    """Turn what torch raises over a closed connection, a timeout or a store that is gone into a `PeerError`."""
    try:
        yield
    except ShearlingError:
        raise
    except RuntimeError as error:
        raise lost(timeout, error) from error


def lost(timeout: float, why: object) -> PeerError:
    """The error of a process that waited for another in vain, `timeout` being in seconds."""
    found = " ".join(str(why).split())[:200]
    return PeerError(
        f"another process of this run ended, or did not answer for {timeout:g} s ({found}). What was saved is whole: "
        "look at that process' output, and run the same command to go on."
    )
