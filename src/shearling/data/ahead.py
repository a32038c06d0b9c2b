"""Work done ahead of who needs it, in threads, with a bound on how far; results and errors come in the order of the work."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from queue import SimpleQueue
from typing import Any, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def read_ahead(items: Iterable[Item], depth: int) -> Generator[Item, None, None]:
    """The same items, of which up to `depth` are got ahead in a thread.

    What getting one raises is raised here, after the items before it. Once this generator is closed no further item is asked for, `items`
    is closed, if it is a generator, and the thread ends; it is not waited for, as it may hang on a network.
    """
    ready: SimpleQueue[tuple[Any, BaseException | None]] = SimpleQueue()
    room, closed, source = threading.Semaphore(depth), threading.Event(), iter(items)

    def work() -> None:
        try:
            while True:
                room.acquire()
                if closed.is_set():
                    break
                ready.put((next(source), None))
        except BaseException as error:
            ready.put((None, error))
        if (close := getattr(source, "close", None)) is not None:
            close()

    threading.Thread(target=work, name="read ahead", daemon=True).start()
    try:
        while True:
            item, error = ready.get()
            if isinstance(error, StopIteration):
                return
            if error is not None:
                raise error
            room.release()
            yield item
    finally:
        closed.set()
        room.release()


def map_ahead(work: Callable[[Item], Result], items: Iterable[Item], threads: int) -> Generator[tuple[Item, Result], None, None]:
    """Each item with what `work` makes of it, in order; `threads` items are worked on ahead of the one that is given out.

    What `work` or getting an item raises is raised here, after all that comes before it. Closed early, this generator waits for the items
    that are being worked on.
    """
    source, broken = iter(items), None
    waiting: deque[tuple[Item, Future[Result]]] = deque()
    with ThreadPoolExecutor(threads, "map ahead") as pool:
        try:
            while True:
                while broken is None and len(waiting) <= threads:
                    try:
                        item = next(source)
                    except Exception as error:
                        broken = error
                    else:
                        waiting.append((item, pool.submit(work, item)))
                if not waiting:
                    break
                item, future = waiting.popleft()
                yield item, future.result()
        finally:
            for _, future in waiting:
                future.cancel()
    if broken is not None and not isinstance(broken, StopIteration):
        raise broken
