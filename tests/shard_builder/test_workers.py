"""Every job is done once, by processes, by any executor, and by a Dask cluster."""

import os
import signal
import subprocess
import sys
from concurrent.futures import BrokenExecutor, Executor, Future, ThreadPoolExecutor

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shard_builder.build import build
from shard_builder.options import BuildOptions
from shard_builder.settings import InputError
from shard_builder.workers import Job, Workers, workers_of


class Mortal(Executor):
    """Dies of the numbers `deadly`, and with it all running jobs."""

    def __init__(self, deadly):
        self.deadly, self.dead, self.running = deadly, False, []
        self.thread = ThreadPoolExecutor(1)

    def submit(self, work, numbers):
        if self.dead:
            raise BrokenExecutor
        future = Future()
        self.running.append(future)
        self.thread.submit(self.do, future, work, numbers)
        return future

    def do(self, future, work, numbers):
        self.dead |= bool(set(numbers) & self.deadly)
        for each in self.running if self.dead else ():
            if not each.done():
                each.set_exception(BrokenExecutor())
        if not self.dead:
            future.set_result(work(numbers))

    def shutdown(self, **_):
        self.thread.shutdown()


def halves(job):
    (numbers,) = job.arguments
    middle = len(numbers) // 2
    return [Job(half, (half,)) for half in (numbers[:middle], numbers[middle:])] if middle else []


@given(st.lists(st.integers(1, 9), max_size=8), st.sets(st.integers(0, 40), max_size=3), st.integers(1, 4))
def test_all_but_the_deadly_are_done_once_and_each_of_these_is_found(sizes, deadly, count):
    numbers = iter(range(100))
    jobs = [tuple(next(numbers) for _ in range(size)) for size in sizes]
    crew = Workers(count, lambda: Mortal(deadly))
    done, lost = [], []
    for key, result in crew.finish(sum, [Job(job, (job,)) for job in jobs], halves):
        (lost if result is None else done).extend(key)
        assert result is None or result == sum(key)
    assert sorted(lost) == sorted(deadly & set(range(sum(sizes))))
    assert sorted(done + lost) == list(range(sum(sizes)))


def test_workers_that_die_whatever_they_do_are_an_error():
    crew = Workers(2, lambda: Mortal(set(range(1000))))
    with pytest.raises(OSError, match="die whatever they do: is there enough memory"):
        list(crew.finish(sum, [Job(number, ((number,),)) for number in range(1000)]))


def test_any_other_error_is_raised():
    with ThreadPoolExecutor(2) as pool, pytest.raises(ZeroDivisionError):
        list(Workers(2, lambda: pool).finish(divmod, [Job(0, (1, 0))]))


def test_the_callers_executor_is_never_closed_even_if_it_is_broken():
    class Broken(ThreadPoolExecutor):
        def submit(self, *_, **__):
            raise BrokenExecutor

    with Broken(1) as pool:
        with workers_of(1, executor=pool) as crew, pytest.raises(OSError, match="the executor is broken"):
            list(crew.finish(divmod, [Job(0, (1, 1))]))
        assert not pool._shutdown


def test_jobs_that_a_cluster_cancels_are_an_error_of_one_line():
    class Leaving(Executor):
        def submit(self, *_):
            future = Future()
            future.cancel()
            future.set_running_or_notify_cancel()
            return future

    with pytest.raises(OSError, match="the workers are gone: run the same command again to continue"):
        list(Workers(2, Leaving).finish(divmod, [Job(0, (1, 1))]))


def test_no_more_than_two_jobs_per_worker_run_at_a_time():
    taken = []

    def jobs():
        for number in range(50):
            taken.append(number)
            yield Job(number, (number, 7))

    with ThreadPoolExecutor(3) as pool:
        for done, _ in enumerate(Workers(3, lambda: pool).finish(divmod, jobs())):
            assert len(taken) - done <= 2 * 3


DIE = "os.kill(os.getpid(), signal.SIGKILL)"
SMALL = {"size": 24, "samples_per_shard": 20}


def bytes_of(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_any_executor_builds_the_same_bytes(tree, tmp_path, monkeypatch):
    monkeypatch.setattr("shard_builder.pack.CHUNK", 7)
    build(tree, tmp_path / "expected", BuildOptions(workers=1, **SMALL))
    with ThreadPoolExecutor(2) as pool:
        build(tree, tmp_path / "set", BuildOptions(**SMALL), executor=pool)
        assert pool.submit(int).result() == 0  # it is left open
    assert bytes_of(tmp_path / "set") == bytes_of(tmp_path / "expected")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory, killer):
    """The address of a Dask scheduler with two worker processes on this machine."""
    pytest.importorskip("distributed", reason="Dask is not installed")
    folder = tmp_path_factory.mktemp("dask")
    file = folder / "scheduler.json"
    local = ["--host", "127.0.0.1", "--no-dashboard"]
    commands = [["dask_scheduler", "--port", "0", *local], *[["dask_worker", "--nthreads", "1", *local]] * 2]
    # A worker's first death counts, and not its fourth, so that the tests are short.
    environment = os.environ | killer(folder, DIE) | {"DASK_DISTRIBUTED__SCHEDULER__ALLOWED_FAILURES": "0"}
    running = [
        subprocess.Popen(
            [sys.executable, "-m", f"distributed.cli.{command}", *arguments, "--scheduler-file", str(file)],
            cwd=folder,
            env=environment,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        for command, *arguments in commands
    ]
    try:
        from distributed import Client

        with Client(scheduler_file=str(file), timeout=30) as client:
            client.wait_for_workers(2, timeout=30)
            yield client.scheduler.address
    finally:
        for process in running:  # with the workers that they have started
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def test_a_dask_cluster_builds_the_same_bytes(cluster, tree, tmp_path, monkeypatch):
    monkeypatch.setattr("shard_builder.pack.CHUNK", 7)
    build(tree, tmp_path / "expected", BuildOptions(workers=1, **SMALL))
    result = build(tree, tmp_path / "set", BuildOptions(dask=cluster, **SMALL))
    assert result.built
    assert bytes_of(tmp_path / "set") == bytes_of(tmp_path / "expected")


def test_an_image_that_kills_workers_of_a_dask_cluster_is_rejected(cluster, tree, tmp_path, monkeypatch):
    monkeypatch.setattr("shard_builder.pack.CHUNK", 2)
    (tree / "US/liver/US 5.png").rename(tree / "US/liver/killer.png")
    result = build(tree, tmp_path / "set", BuildOptions(dask=cluster, **SMALL))
    assert (result.lost, result.manifest.samples) == (1, 49)


def test_a_dask_scheduler_that_does_not_answer_is_an_error(tree, tmp_path):
    dask = pytest.importorskip("dask", reason="Dask is not installed")
    short = dask.config.set({"distributed.comm.timeouts.connect": "1s"})
    with (
        short,
        pytest.raises(InputError, match=r"no scheduler answers at tcp://127\.0\.0\.1:1 .*: give the address"),
    ):
        build(tree, tmp_path / "set", BuildOptions(dask="tcp://127.0.0.1:1", **SMALL))


def test_without_dask_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "distributed", None)
    with (
        pytest.raises(InputError, match=r"`dask` needs Dask: pip install 'modan-fast\[dask\]'"),
        workers_of(1, "tcp"),
    ):
        pass
