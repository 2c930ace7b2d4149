"""Run jobs in worker processes, an executor or a Dask cluster; a worker that dies costs only the job that killed it."""

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

ATTEMPTS = 3  # times that a job which cannot be split may kill its worker
DIED = "the worker died three times while packing it"
IN_A_ROW = 100  # deaths in a row without a result: the cause is not a job


class Job(NamedTuple, Generic[Key]):
    """A call of the work that is shared: a key that identifies it, and the arguments."""

    key: Key
    arguments: tuple[Any, ...]


class Workers:
    """`count` workers behind an executor; `start` makes a new executor after a worker has died.

    `death_errors` are the errors that an executor raises for a dead worker.
    """

    def __init__(
        self,
        count: int,
        start: Callable[[], Executor],
        death_errors: tuple[type[BaseException], ...] = (BrokenExecutor,),
    ) -> None:
        self.count, self._start = count, start
        # A worker without memory counts as dead: perhaps the others took too much of it.
        self.death_errors: tuple[type[BaseException], ...] = (*death_errors, MemoryError)
        self._executor = start()

    def submit(self, work: Callable[..., Result], arguments: tuple[Any, ...]) -> Future[Result]:
        """Submit a call of `work`, to a new executor if this one is broken."""
        with hidden_main():
            try:
                return self._executor.submit(work, *arguments)
            except BrokenExecutor as error:
                fresh = self._start()
                if fresh is self._executor:  # the caller's
                    raise OSError("the executor is broken: pass another one") from error
                self.close()
                self._executor = fresh
                return self._executor.submit(work, *arguments)

    def close(self) -> None:
        """End the workers after the jobs that they are running."""
        self._executor.shutdown(wait=True, cancel_futures=True)

    def finish(
        self,
        work: Callable[..., Result],
        jobs: Iterable[Job[Key]],
        halves: Callable[[Job[Key]], Sequence[Job[Key]]] = lambda job: (),
    ) -> Iterator[tuple[Key, Result | None]]:
        """Yield (key, result of `work(*arguments)`) of each job when it ends; two jobs per worker run at a time.

        When a worker dies, any of the running jobs may have killed it. Each of them is run again, alone. If it kills
        its worker again, it is split into `halves`, down to a job that cannot be split; that one is tried `ATTEMPTS`
        times, and then its result is None. Other errors are raised, and `OSError` if the workers die whatever they
        run, or their cluster is gone.
        """
        waiting, running = iter(jobs), dict[Future[Result], Job[Key]]()
        suspects = deque[tuple[Job[Key], int]]()  # with the times that each has killed its worker when run alone
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
                    raise OSError("the workers are gone: run the same command again to continue") from None
                except self.death_errors as error:
                    in_a_row += 1
                    if in_a_row > IN_A_ROW:
                        raise OSError("the workers die whatever they do: is there enough memory?") from error
                    if alone is None:
                        suspects.append((job, 0))
                    elif smaller := halves(job):
                        suspects.extendleft((half, 0) for half in reversed(smaller))
                    elif deaths + 1 < ATTEMPTS:
                        suspects.appendleft((job, deaths + 1))
                    else:
                        yield job.key, None
                else:
                    in_a_row = 0
                    yield job.key, result


class SerialExecutor(Executor):
    """Runs each call at once, in this process."""

    def submit(self, work: Callable[..., Result], /, *arguments: Any, **named: Any) -> Future[Result]:
        """Run `work`; the future that is returned is done."""
        future: Future[Result] = Future()
        try:
            future.set_result(work(*arguments, **named))
        except Exception as error:
            future.set_exception(error)
        return future


class DaskExecutor(Executor):
    """The workers of a Dask cluster.

    Dask's own executor reports an error if a worker dies between computing a result and sending it; here the cluster
    computes it again.
    """

    def __init__(self, client: Any) -> None:
        self._client = client

    def submit(self, work: Callable[..., Result], /, *arguments: Any, **named: Any) -> Future[Result]:
        """Submit a call of `work` to the cluster."""
        # Not pure: Dask would remember a task that killed its worker, and never run it again.
        task = self._client.submit(work, *arguments, pure=False, **named)
        future: Future[Result] = Future()

        async def settle() -> None:
            try:
                result = await task
            except BaseException as error:
                future.set_exception(error)
            else:
                future.set_result(result)

        self._client.loop.add_callback(settle)
        return future


@contextmanager
def workers_of(count: int, dask: str | None = None, executor: Executor | None = None) -> Iterator[Workers]:
    """Workers for a build: those of `executor`, which stays open; else of the Dask cluster whose scheduler has the
    address `dask`; else `count` processes of this machine, or this process alone if `count` is 1.

    Raises `InputError` if Dask is not installed, or its scheduler does not answer or has no workers.
    """
    if executor is not None:
        yield Workers(count, lambda: executor)
    elif dask is not None:
        with _dask_workers(dask) as workers:
            yield workers
    else:
        workers = Workers(count, (lambda: _processes(count)) if count > 1 else SerialExecutor)
        try:
            yield workers
        finally:
            workers.close()


@contextmanager
def _dask_workers(address: str) -> Iterator[Workers]:
    try:
        from distributed import Client, KilledWorker
    except ImportError:
        raise InputError("`dask` needs Dask: pip install 'modan-fast[dask]'") from None
    try:
        client = Client(address)
    except (OSError, ValueError) as error:
        raise InputError(
            f"no scheduler answers at {address} ({error}): give the address that it prints when it starts"
        ) from error
    with client:
        threads = sum(client.nthreads().values())
        if not threads:
            raise InputError(
                f"the scheduler at {address} has no workers: start some with `dask worker {address}`"
            )
        yield Workers(threads, lambda: DaskExecutor(client), (BrokenExecutor, KilledWorker))


def _processes(count: int) -> Executor:
    # Not forked from this process: the caller may have threads that hold locks. A fork server imports once what all
    # workers need, also those that replace dead ones.
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
    """Prepare a worker process: it ignores Ctrl-C, and ends when its parent ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent gets it too, and ends its workers
    parent = multiprocessing.parent_process()
    if parent is not None:

        def end_with_parent() -> None:
            parent.join()
            os._exit(1)

        threading.Thread(target=end_with_parent, daemon=True).start()


@contextmanager
def hidden_main() -> Iterator[None]:
    """Start worker processes that do not import the caller's script.

    A new process imports its parent's main module, so a script without a `__main__` guard would run again. Workers
    need nothing from it.
    """
    main = sys.modules["__main__"]
    sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main
