"""Real faults: small disks, signals, and every command as a process of its own, which does not pay for the imports."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

SECONDS = 240  # after which a command hangs; on two busy cores a step of the demo takes over a minute

# Imports everything once, then forks a process for each command. A fork runs `main` as `python -m modan_fast` does, and
# ends as any interpreter ends.
NURSERY = """
import gc, json, os, sys
import modan_fast.cli, modan_fast.demo, modan_fast.trainer, modan_fast.report.page, shard_builder.build
gc.freeze()  # else each fork would copy what was imported, only to look whether it can be freed
for line in sys.stdin:
    request = json.loads(line)
    if "wait" in request:
        print(os.waitstatus_to_exitcode(os.waitpid(request["wait"], 0)[1]), flush=True)
        continue
    pid = os.fork()
    if pid:
        print(pid, flush=True)
        continue
    os.setsid()
    os.chdir(request["cwd"])
    # The pipes to the nursery are nobody else's.
    for number, name in enumerate((os.devnull, request["said"], request["said"])):
        file = os.open(name, os.O_RDWR | os.O_APPEND)
        os.dup2(file, number)
        os.close(file)
    sys.argv = ["modan-fast", *request["arguments"]]
    exec(request.get("first", ""))
    modan_fast.cli.main()
"""


@dataclass
class Running:
    """A command that runs in a process of its own, the leader of its group."""

    pid: int
    nursery: subprocess.Popen
    output: Path
    code: int | None = None

    def said(self) -> str:
        """What it has printed until now, in both streams."""
        text = self.output.read_text(encoding="utf-8", errors="replace")
        return text.partition("nanobind: leaked ")[0]  # what triton says of `gc.freeze` as the process ends

    def ended(self) -> bool:
        """Whether it has ended, which `end` has not been told yet."""
        return Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"

    def until(self, seen) -> None:
        """Wait until `seen()` holds."""
        last = time.monotonic() + SECONDS
        while not seen():
            assert time.monotonic() < last, self.said()
            assert not self.ended(), self.said()
            time.sleep(0.001)

    def signal(self, number: int) -> None:
        """Send a signal to it and its workers, as a terminal does."""
        os.killpg(self.pid, number)

    def end(self) -> tuple[int, str]:
        """Its exit code once it ends, negative for a signal, and what it printed."""
        last = time.monotonic() + SECONDS
        while self.code is None and not self.ended():
            assert time.monotonic() < last, f"no end after {SECONDS} s: {self.said()}"
            time.sleep(0.005)
        if self.code is None:
            self.code = int(ask(self.nursery, wait=self.pid))
        return self.code, self.said()

    def succeeds(self) -> str:
        """Assert that it ends well, and return what it printed."""
        code, said = self.end()
        assert code == 0, said
        return said

    def fails(self) -> str:
        """Assert that it fails well, and return its line.

        That is: exit code 2, no traceback, and the last line is the only one with the program's name.
        """
        code, said = self.end()
        assert code == 2, (code, said)
        assert "Traceback" not in said, said
        lines = said.splitlines()
        assert [line for line in lines if line.startswith("modan-fast: ")] == lines[-1:], said
        return lines[-1]


def ask(nursery: subprocess.Popen, **request) -> str:
    """Send a request to the nursery, and return its answer."""
    nursery.stdin.write(json.dumps(request) + "\n")
    nursery.stdin.flush()
    return nursery.stdout.readline()


@pytest.fixture(scope="session")
def nursery():
    """The process that all commands are forked from."""
    if sys.platform != "linux":
        pytest.skip("these faults are made on Linux")
    with subprocess.Popen(
        [sys.executable, "-c", NURSERY], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        yield process
        process.stdin.close()


@pytest.fixture
def start(nursery, tmp_path):
    """A function that starts a command, `start("shard", archive, "--out", out)`, and returns it as `Running`.

    `first` is Python that the process runs before.
    """
    started = []

    def start(*arguments, cwd: Path = tmp_path, first: str = "") -> Running:
        said = tmp_path / f"said-{len(started)}"
        said.touch()
        words = [os.fsdecode(each) for each in arguments]
        pid = ask(nursery, arguments=words, cwd=os.fsdecode(cwd), said=str(said), first=first)
        started.append(Running(int(pid), nursery, said))
        return started[-1]

    yield start
    for each in started:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(each.pid, signal.SIGKILL)


@pytest.fixture
def succeed(start):
    """A function that runs a command that must end well."""
    return lambda *arguments, **given: start(*arguments, **given).succeeds()


@pytest.fixture
def fail(start):
    """A function that runs a command that must fail well, and returns its one line."""
    return lambda *arguments, **given: start(*arguments, **given).fails()


class Disk:
    """A small file system in memory. Its size can change while it is in use."""

    def __init__(self, folder: Path, size: str) -> None:
        self.folder = folder
        folder.mkdir()
        mount("-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder)

    def resize(self, size: str) -> None:
        """Give it another size, such as `100k`, not below what is in use."""
        mount("-o", f"remount,size={size}", self.folder)

    def read_only(self, on: bool = True) -> None:
        """Allow no more changes, as a file system with errors does; or allow them again."""
        mount("-o", f"remount,{'ro' if on else 'rw'}", self.folder)


def mount(*arguments) -> None:
    subprocess.run(["mount", *map(str, arguments)], check=True, capture_output=True)


@pytest.fixture
def disk(tmp_path):
    """A function that mounts a `Disk` of a size. Skips where nothing can be mounted: that takes root on Linux."""
    mounted = []

    def disk(size: str) -> Disk:
        if not (sys.platform == "linux" and shutil.which("mount")):
            pytest.skip("small file systems are mounted on Linux")
        try:
            mounted.append(Disk(tmp_path / f"disk{len(mounted)}", size))
        except subprocess.CalledProcessError as error:
            pytest.skip(f"no small file system can be mounted here: {error.stderr.decode().strip()}")
        return mounted[-1]

    yield disk
    for each in mounted:
        subprocess.run(["umount", "-l", each.folder], check=True)


def write_images(folder: Path, count: int, seed: int) -> None:
    """Write grey images of noise, 40 x 36 pixels."""
    folder.mkdir(parents=True)
    for number, pixels in enumerate(
        np.random.default_rng(seed).integers(0, 256, (count, 36, 40), dtype=np.uint8)
    ):
        Image.fromarray(pixels).save(folder / f"{number:02}.png")


@dataclass
class Made:
    """A folder with an archive of 16 images, a task of 16, and what undisturbed commands make of them."""

    folder: Path

    @property
    def archive(self) -> Path:
        return self.folder / "archive"

    def command(self, kind: str, out: Path) -> tuple[str | Path, ...]:
        """The command that writes `shards`, `run`, `results` or `report` to `out`."""
        folder = self.folder
        small = ("--batch-size", "8", "--image-size", "32", "--stem", "7x7", "--device", "cpu")
        if kind == "shards":
            return ("shard", folder / "archive", "--size", "32", "--workers", "1", "--out", out)
        if kind == "run":
            own = ("--epochs", "2", "--lr", "0.01", "--warmup-epochs", "0", "--renderer", "torch")
            return ("pretrain", *own, *small, "--shards", folder / "shards", "--out", out)
        if kind == "results":
            own = ("--protocol", "probe", "--repeats", "1", "--epochs", "1", "--init", folder / "run")
            return ("evaluate", *own, "--init", "scratch", *small, "--task", folder / "task", "--out", out)
        return ("report", folder / "results", "--samples", "0", "--out", out)


@pytest.fixture(scope="session")
def made(tmp_path_factory, nursery):
    """See `Made`."""
    made = Made(tmp_path_factory.mktemp("made"))
    for number, name in enumerate(("CT/lung/Nodule", "CT/abd/mass", "MR/brain/glioma", "US/liver")):
        write_images(made.archive / name, 4, number)
    for number, name in enumerate(("benign", "malignant")):
        write_images(made.folder / "task" / name, 8, 10 + number)
    said = tmp_path_factory.mktemp("said") / "said"
    for kind in ("shards", "run", "results", "report"):
        said.write_text("")
        words = list(map(str, made.command(kind, made.folder / kind)))
        pid = ask(nursery, arguments=words, cwd=str(made.folder), said=str(said))
        Running(int(pid), nursery, said).succeeds()
    return made


@pytest.fixture(scope="session")
def contents():
    """A function that returns the files below a folder, by name."""
    return _contents


def _contents(folder: Path) -> dict[str, bytes]:
    """The files below a folder, by name, without events for TensorBoard: each process has a file of its own."""
    files = sorted(each for each in folder.rglob("*") if each.is_file() and each.parent.name != "tensorboard")
    return {os.fsdecode(each.relative_to(folder)): each.read_bytes() for each in files}


@pytest.fixture(scope="session")
def same(made):
    """A function that asserts that an output equals that of the undisturbed command, but for what tells of time."""

    def same(kind: str, folder: Path) -> None:
        found, wanted = _contents(folder), _contents(made.folder / kind)
        assert found.keys() == wanted.keys()
        for name in wanted:
            timeless = TIMELESS.get((kind, name), lambda content: content)
            assert timeless(found[name]) == timeless(wanted[name]), name

    return same


def _log(content: bytes) -> list[dict]:
    timed = ("seconds", "views_per_second", "wait_share", "peak_host_gib", "monitor/seconds")
    lines = [json.loads(line) for line in content.splitlines()]
    return [{key: value for key, value in line.items() if key not in timed} for line in lines]


def _written(*paths: str):
    def rest(content: bytes) -> dict:
        written = json.loads(content)
        for path in paths:
            *outer, last = path.split("/")
            inner = written
            for name in outer:
                inner = inner[name]
            del inner[last]
        return written

    return rest


TIMELESS = {
    ("run", "log.jsonl"): _log,
    ("run", "config.json"): _written("settings/out", "settings/checkpoint_every"),
    ("run", "checkpoint.pt"): len,  # it holds the seconds of an epoch
    ("results", "runs.json"): _written("times", "config/out"),
}


LONG = {
    "run": ("--epochs", "4000", "--checkpoint-every", "4000"),
    "results": ("--repeats", "400"),
    "shards": ("--per-class", "0"),
}
WORKING = {  # what a command has written when it is in the middle of its work
    "run": "run/log.jsonl",
    "results": "results/predictions.csv",
    "shards": ".shards.building/spool-*[0-9a-f]",
}


@pytest.fixture(scope="session")
def many_images(made):
    """An archive that takes a second to pack."""
    folder = made.folder / "many"
    for number, name in enumerate(("CT/lung/Nodule", "CT/abd/mass", "MR/brain/glioma", "US/liver")):
        source = made.archive / name / "00.png"
        (folder / name).mkdir(parents=True)
        for image in range(500):
            shutil.copyfile(source, folder / name / f"{number}-{image}.png")
    return folder


@pytest.fixture
def working(made, many_images, start, tmp_path):
    """A function that starts a long command of a kind, and returns it once it is in the middle of its work."""

    def working(kind: str, *more: str):
        (tmp_path / "out").mkdir(exist_ok=True)
        words = [*made.command(kind, tmp_path / "out" / kind), *LONG[kind], *more]
        words = [many_images if word == made.archive else word for word in words]
        command = start(*words)
        command.until(lambda: any(each.stat().st_size for each in (tmp_path / "out").glob(WORKING[kind])))
        return command

    return working
