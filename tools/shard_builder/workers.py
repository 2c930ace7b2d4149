"""The processes that share the work of a build, and what is done when one of them dies."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import types
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import (
    FIRST_COMPLETED,
    BrokenExecutor,
    CancelledError,
    Executor,
    Future,
    ProcessPoolExecutor,
    wait,
)
from contextlib import contextmanager
from typing import Any, Generic, NamedTuple, TypeVar

from shard_builder.settings import InputError

Key = TypeVar("Key")
Result = TypeVar("Result")

ATTEMPTS = 3  # times that a job of one image, or one that cannot be halved, may take its worker with it
DIED = "the worker died three times while packing it"
IN_A_ROW = 100  # deaths with nothing done in between: it is not the images


class Job(NamedTuple, Generic[Key]):
    """A call of the work to be shared: what it is for, and the arguments."""

    key: Key
    arguments: tuple[Any, ...]


class Workers:
    """`count` workers behind an executor, which is made anew by `start` when one of them has died.

    `deaths` are the errors by which an executor tells that.
    """

    def __init__(
        self,
        count: int,
        start: Callable[[], Executor],
        deaths: tuple[type[BaseException], ...] = (BrokenExecutor,),
    ) -> None:
        self.count, self._start = count, start
        # A worker that runs out of memory is as good as dead: others may have had too much of it.
        self.deaths: tuple[type[BaseException], ...] = (*deaths, MemoryError)
        self._executor = start()

    def submit(self, work: Callable[..., Result], arguments: tuple[Any, ...]) -> Future[Result]:
        with hidden_main():
            try:
                return self._executor.submit(work, *arguments)
            except BrokenExecutor as error:
                fresh = self._start()
                if fresh is self._executor:  # the caller's
                    raise OSError("the executor is broken: give another one") from error
                self.close()
                self._executor = fresh
                return self._executor.submit(work, *arguments)

    def close(self) -> None:
        """End the workers after what they are at."""
        self._executor.shutdown(wait=True, cancel_futures=True)

    def finish(
        self,
        work: Callable[..., Result],
        jobs: Iterable[Job[Key]],
        halves: Callable[[Job[Key]], Sequence[Job[Key]]] = lambda job: (),
    ) -> Iterator[tuple[Key, Result | None]]:
        """(key, result of `work(*arguments)`) of each job, as they come, with two jobs a worker under way.

        When a worker dies, any of the jobs under way may have killed it. Each is done again with no other beside
        it, and if it kills once more, its `halves` are, until the one is found that kills its worker three times:
        its result is None. Any other error is raised, and `OSError` where workers die whatever they do, or where
        their cluster has gone.
        """
        waiting, running = iter(jobs), dict[Future[Result], Job[Key]]()
        suspects = deque[tuple[Job[Key], int]]()
        in_a_row = 0
        while True:
            while not suspects and len(running) < 2 * self.count and (job := next(waiting, None)):
                running[self.submit(work, job.arguments)] = job
            alone, deaths = None, 0
            if not running:
                if not suspects:
                    return
                alone, deaths = suspects.popleft()
                running[self.submit(work, alone.arguments)] = alone
            done, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                job = running.pop(future)
                try:
                    result = future.result()
                except CancelledError:
                    raise OSError("the workers have been taken away: the same command continues") from None
                except self.deaths as error:
                    in_a_row += 1
                    if in_a_row > IN_A_ROW:
                        raise OSError("the workers die whatever they do: is there enough memory?") from error
                    if alone is None:
                        suspects.append((job, 0))
                    elif parts := halves(job):
                        suspects.extendleft((part, 0) for part in reversed(parts))
                    elif deaths + 1 < ATTEMPTS:
                        suspects.appendleft((job, deaths + 1))
                    else:
                        yield job.key, None
                else:
                    in_a_row = 0
                    yield job.key, result


class SerialExecutor(Executor):
    """Runs each job in this process, when it is submitted."""

    def submit(self, work: Callable[..., Result], /, *arguments: Any, **named: Any) -> Future[Result]:
        future: Future[Result] = Future()
        try:
            future.set_result(work(*arguments, **named))
        except Exception as error:
            future.set_exception(error)
        return future


class Cluster(Executor):
    """The workers of a Dask cluster.

    Dask's own executor takes a result for an error if its worker dies between making it and handing it over; here
    the cluster makes it again.
    """

    def __init__(self, client: Any) -> None:
        self._client = client

    def submit(self, work: Callable[..., Result], /, *arguments: Any, **named: Any) -> Future[Result]:
        # Not pure: a task that killed its worker would be remembered, and never tried again.
        made = self._client.submit(work, *arguments, pure=False, **named)
        future: Future[Result] = Future()

        async def settle() -> None:
            try:
                result = await made
            except BaseException as error:
                future.set_exception(error)
            else:
                future.set_result(result)

        self._client.loop.add_callback(settle)
        return future


@contextmanager
def workers_of(count: int, dask: str | None = None, executor: Executor | None = None) -> Iterator[Workers]:
    """Workers for a build: `count` processes of this machine, or none beside this one where `count` is 1.

    Else those of the Dask cluster whose scheduler has the address `dask`, or of `executor`, which is left open.
    Raises `InputError` where Dask is not installed, `OSError` where its scheduler does not answer.
    """
    if executor is not None:
        yield Workers(count, lambda: executor)
    elif dask is not None:
        with _dask(dask) as workers:
            yield workers
    else:
        workers = Workers(count, (lambda: _processes(count)) if count > 1 else SerialExecutor)
        try:
            yield workers
        finally:
            workers.close()


@contextmanager
def _dask(address: str) -> Iterator[Workers]:
    try:
        from distributed import Client, KilledWorker
    except ImportError:
        raise InputError("`dask` needs Dask: pip install 'modan-fast[dask]'") from None
    try:
        client = Client(address)
    except (OSError, ValueError) as error:
        raise InputError(
            f"no scheduler answers at {address} ({error}): give the address that it tells"
        ) from error
    with client:
        threads = sum(client.nthreads().values())
        if not threads:
            raise InputError(
                f"the scheduler at {address} has no workers: start some with `dask worker {address}`"
            )
        yield Workers(threads, lambda: Cluster(client), (BrokenExecutor, KilledWorker))


def _processes(count: int) -> Executor:
    # Not forked from this process: the caller may have threads, and locks that they hold. Where there is a fork
    # server, it imports once what all workers need, also those in the stead of dead ones.
    method = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
    context = multiprocessing.get_context(method)
    context.set_forkserver_preload(
        ["shard_builder.build", "shard_builder.verify", "PIL.JpegImagePlugin", "PIL.PngImagePlugin"]
    )
    if method == "forkserver":
        from multiprocessing import forkserver

        forkserver.ensure_running()  # it imports while the caller goes on
    return ProcessPoolExecutor(count, context, initializer=start_worker)


def start_worker() -> None:
    """End with the parent, and leave Ctrl-C to it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # it reaches the parent too, which ends the workers
    parent = multiprocessing.parent_process()
    if parent is not None:

        def end_with_parent() -> None:
            parent.join()
            os._exit(1)

        threading.Thread(target=end_with_parent, daemon=True).start()


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
