"""The processes of one run, one for each GPU (torch.distributed): who this one is, and how they agree.

torchrun starts them. Without it there is one rank, which agrees with itself, and nothing here costs anything.
"""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from shard_builder.settings import InputError, usable_cores

Result = TypeVar("Result")

# Ranks wait for one another while a set is decoded, which takes as long as it takes; a dead one is noticed at once.
PATIENCE = timedelta(hours=4)
ARRIVAL = timedelta(minutes=10)
STOPPED = 130  # exit code after an interruption
LOST = "another rank has ended unexpectedly: see what it printed, or why it was killed"
AGREED = "agreed_by_ranks"  # attribute of an error that all ranks know of


class EndedElsewhere(Exception):  # noqa: N818 - what is wrong is said by the rank where it happened, or by rank 0
    """Another rank ended the work; `code` is the exit code that all ranks end with."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code


class LostRankError(InputError):
    """Another rank has ended without a word, as after a kill."""


class _Failure(NamedTuple):
    """What went wrong on a rank: the exit code and the message."""

    code: int
    message: str


@dataclass(frozen=True)
class Ranks:
    """The ranks of a run, and which of them this process is.

    `rank` counts from 0 to `size` - 1 over all machines, `local_rank` to `local_size` - 1 on this one. `restarts`
    is above 0 if torchrun has started them anew. `control` is the group for what ranks tell one another on CPUs
    (gloo); None for one rank.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    restarts: int = 0
    control: Any = None

    @property
    def first(self) -> bool:
        """Whether this is rank 0, which locks, writes and speaks."""
        return self.rank == 0

    @property
    def cores(self) -> int:
        """This rank's share of the machine's cores."""
        return max(1, usable_cores() // self.local_size)

    def share(self, count: int) -> int:
        """How many of `count` items, dealt out in turn, are this rank's."""
        return self.shares(count)[self.rank]

    def shares(self, count: int) -> list[int]:
        """How many of `count` items, dealt out in turn, each rank gets."""
        return [len(range(rank, count, self.size)) for rank in range(self.size)]

    def highest(self, values: Sequence[float]) -> list[float]:
        """The highest value of all ranks, for each of `values`; waits for all ranks, but not for a GPU."""
        if self.size == 1:
            return list(values)
        found = torch.tensor(values, dtype=torch.float64)
        with noticing_lost_ranks():
            dist.all_reduce(found, dist.ReduceOp.MAX, group=self.control)
        return list(found.tolist())

    def all(self, value: Result) -> list[Result]:
        """What each rank has, by rank; any object that can be pickled."""
        if self.size == 1:
            return [value]
        found: list[Any] = [None] * self.size
        with noticing_lost_ranks():
            dist.all_gather_object(found, value, group=self.control)
        return found

    def from_first(self, value: Result) -> Result:
        """What rank 0 has."""
        if self.size == 1:
            return value
        found = [value if self.first else None]
        with noticing_lost_ranks():
            dist.broadcast_object_list(found, src=0, group=self.control)
        return found[0]  # type: ignore[return-value]

    def together(self, work: Callable[[], Result]) -> Result:
        """`work()`, done on every rank; if it fails on one, all raise.

        An error is raised as it came where it happened, on rank 0 as an `InputError` that names the rank, and elsewhere
        as `EndedElsewhere`; an interruption as KeyboardInterrupt on all.
        """
        if self.size == 1:
            return work()
        raised: BaseException | None = None
        result: Any = None
        try:
            result = work()
        except (Exception, KeyboardInterrupt) as error:  # whatever it is, the others must not wait for it
            if getattr(error, AGREED, False):
                raise
            raised = error
        self.agree(raised)
        return result

    def decided(self, work: Callable[[], Result]) -> Result:
        """`work()`, done on rank 0 alone; all ranks get its result, or raise as in `together`."""
        result = self.together(lambda: work() if self.first else None)
        return self.from_first(result)  # type: ignore[return-value]

    def agree(self, raised: BaseException | None) -> None:
        """Raise, as in `together`, if an error was raised on any rank. Every rank must get here."""
        failures = self.all(None if raised is None else _failure(raised))
        failed = [(rank, failure) for rank, failure in enumerate(failures) if failure is not None]
        if not failed:
            return
        rank, failure = failed[0]
        error: BaseException
        if raised is not None and (self.first or isinstance(raised, KeyboardInterrupt)):
            error = raised
        elif failure.code == STOPPED:
            error = KeyboardInterrupt(failure.message)
        elif self.first:
            error = InputError(f"rank {rank} of {self.size}: {failure.message}")
        else:
            error = EndedElsewhere(f"rank {rank} of {self.size}: {failure.message}", failure.code)
        setattr(error, AGREED, True)
        raise error from (None if error is raised else raised)


def _failure(error: BaseException) -> _Failure:
    if isinstance(error, KeyboardInterrupt):
        return _Failure(STOPPED, str(error))
    if isinstance(error, FloatingPointError):
        return _Failure(1, str(error))
    known = isinstance(error, (InputError, OSError))
    return _Failure(2, str(error) if known else f"{type(error).__name__}: {error}")


ONE = Ranks()


@contextmanager
def noticing_lost_ranks() -> Iterator[None]:
    """Raise `LostRankError` if another rank has gone while this one talks with it."""
    try:
        yield
    except RuntimeError as error:
        if not lost_rank(error):
            raise
        raise LostRankError(LOST) from error


def lost_rank(error: BaseException) -> bool:
    """Whether an error says that another rank does not answer any more."""
    return isinstance(error, dist.DistError) or any(
        sign in str(error) for sign in ("gloo", "Connection closed by peer", "Connection reset by peer")
    )


def launched() -> bool:
    """Whether this process is one of several that torchrun, or a like program, has started."""
    return int(os.environ.get("WORLD_SIZE") or 1) > 1


def silent() -> bool:
    """Whether another rank speaks for this process."""
    return launched() and os.environ.get("RANK") != "0"


@contextmanager
def joined(device: str = "auto") -> Iterator[Ranks]:
    """The ranks of this run, connected; alone where torchrun has not started several.

    `device` is as in `PretrainConfig`. On GPUs each rank gets the GPU of its number on the machine. Raises `InputError`
    if there are fewer GPUs than ranks, or if the other ranks cannot be reached.
    """
    if not launched():
        yield ONE
        return
    rank, size, local_rank, local_size = (
        int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    )
    gpus = torch.cuda.device_count() if device != "cpu" and torch.cuda.is_available() else 0
    if gpus:
        if local_size > gpus:
            raise InputError(
                f"{local_size} ranks on a machine with {gpus} GPUs: start as many as it has, or pass `device=cpu`"
            )
        torch.cuda.set_device(local_rank)
    else:
        # torchrun leaves a process one thread if nobody says otherwise.
        torch.set_num_threads(Ranks(local_size=local_size).cores)
    begun_here, attempts = not dist.is_initialized(), 1
    if begun_here:
        found = next(iter(dist.rendezvous("env://")))[0]
        attempts = found.add("modan-fast/attempts", 1) if rank == 0 else 1
        dist.init_process_group(
            "nccl" if gpus else "gloo",
            store=part_of_store(found, rank, size),
            rank=rank,
            world_size=size,
            device_id=torch.device("cuda", local_rank) if gpus else None,
        )
    try:
        control = dist.new_group(backend="gloo", timeout=PATIENCE)
        ranks = Ranks(rank, size, local_rank, local_size, 0, control)
        # torchrun counts failures on each machine: fewer on one that came later, and none where machines come and go.
        counted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT") or 0)
        (restarts,) = ranks.highest([max(counted, attempts - 1)])
        yield replace(ranks, restarts=int(restarts))
    finally:
        if begun_here:
            dist.destroy_process_group()


def part_of_store(store: dist.Store, rank: int, size: int) -> dist.Store:
    """A part of torchrun's store for these processes alone, after all of them have come.

    torchrun restarts ranks, but not its store, which still has the addresses of the dead. Its count of restarts would
    not do as a name, because it differs between machines.
    """
    own = uuid.uuid4().hex
    store.set(f"modan-fast/come/{rank}", own)
    last = time.monotonic() + ARRIVAL.total_seconds()
    while time.monotonic() < last:
        if rank == 0:
            come = [store.get(f"modan-fast/come/{each}").decode() for each in range(size)]
            store.set("modan-fast/all", " ".join(come))
        first, *others = store.get("modan-fast/all").decode().split()
        # A list without this process is by an earlier rank 0, or from before this one had come.
        if own in (first, *others):
            store.set(f"modan-fast/{first}/{rank}", "here")
            if rank or store.check([f"modan-fast/{first}/{each}" for each in range(size)]):
                return dist.PrefixStore(f"modan-fast/{first}", store)
        time.sleep(0.02)
    raise InputError(f"rank {rank} waited {ARRIVAL.seconds // 60} minutes for the others: see what they printed")


def gathered(own: Tensor, counts: Sequence[int]) -> Tensor:
    """The rows of all ranks, rank by rank: (n, …) to (N, …); `counts` says how many each rank has, 0 included.

    No gradient flows through it. Without torch.distributed it is `own`.
    """
    if len(counts) == 1:
        return own
    most = max(counts)
    padded = own.new_zeros(most, *own.shape[1:])
    padded[: len(own)] = own.detach()
    found = own.new_empty(len(counts) * most, *own.shape[1:])
    dist.all_gather_into_tensor(found, padded)
    if min(counts) == most:
        return found
    return torch.cat([part[:count] for part, count in zip(found.split(most), counts, strict=True)])


def summed(own: Tensor) -> Tensor:
    """The sum over all ranks; no gradient flows through it."""
    total = own.detach().clone()
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(total)
    return total
