"""Processes that share the work of a build."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import types
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from contextlib import contextmanager
from typing import Any, TypeVar

Result = TypeVar("Result")


@contextmanager
def pool_of(workers: int) -> Iterator[Executor | None]:
    """As many processes, or none for one worker; on an error they stop after what they are at."""
    if workers <= 1:
        yield None
        return
    # Not forked: the caller may have threads, and locks that they hold.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, context, initializer=start_worker)
    try:
        yield pool
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def start_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent too, which ends the workers
    parent = multiprocessing.parent_process()
    if parent is not None:

        def end_with_parent() -> None:
            parent.join()
            os._exit(1)

        threading.Thread(target=end_with_parent, daemon=True).start()


def run_in_order(
    pool: Executor | None, workers: int, work: Callable[..., Result], tasks: Iterable[tuple[Any, ...]]
) -> Iterator[Result]:
    """The results of `work(*task)`, in order, with two tasks a worker under way."""
    if pool is None:
        for task in tasks:
            yield work(*task)
        return
    running: deque[Future[Result]] = deque()
    for task in tasks:
        with hidden_main():
            running.append(pool.submit(work, *task))
        if len(running) >= 2 * workers:
            yield running.popleft().result()
    while running:
        yield running.popleft().result()


@contextmanager
def hidden_main() -> Iterator[None]:
    """Start workers without the caller's script.

    A new process imports its parent's main module, and so would run a script without a `__main__` guard again.
    Workers need nothing of it.
    """
    main = sys.modules["__main__"]
    sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main
