"""Builds that are killed at any moment, and workers that die: the next build ends with an undisturbed one's bytes."""

import os
import random
import subprocess
import sys
import time

import pytest

from shard_builder.build import build
from shard_builder.manifest import Manifest, Rejected
from shard_builder.options import BuildOptions

pytestmark = pytest.mark.skipif(os.name != "posix", reason="needs signals")


def bytes_of(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def start(tree, out, *, workers=2, environment=()):
    """A build in a process of its own; its chunks are small, so that there are many moments to kill it at."""
    code = (
        "from pathlib import Path\nfrom shard_builder import pack\nfrom shard_builder.build import *\n"
        "pack.CHUNK = 3\n"
        f"options = BuildOptions(size=64, workers={workers}, samples_per_shard=7)\n"
        f"done = build(Path({str(tree)!r}), Path({str(out)!r}), options, "
        "progress=lambda stage, done, total, note: print(stage, done, total, note, flush=True))\nprint(done.lost)"
    )
    return subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env={**os.environ, **dict(environment)}
    )


def wait_for_packed(process, images):
    """Read a build's progress until it has packed at least `images`; chunks end in any order."""
    packed = (int(line.split()[1]) for line in process.stdout if line.startswith("packing "))
    next(done for done in packed if done >= images)


def undisturbed(tree, out):
    build(tree, out, BuildOptions(size=64, workers=1, samples_per_shard=7))
    return bytes_of(out)


@pytest.mark.parametrize("moment", ["packing 9 ", "packing 45 ", "writing 1 ", "writing 7 "])
def test_a_build_killed_at_a_known_moment_is_continued_and_not_begun_anew(tree, tmp_path, moment):
    out = tmp_path / "set"
    with start(tree, out, workers=1) as process:
        for line in process.stdout:
            if line.startswith(moment):
                process.kill()
                break
    assert not out.exists()
    with start(tree, out, workers=1) as process:
        said = process.stdout.read().splitlines()
    assert process.returncode == 0
    stage, done, _ = moment.split(" ")
    first = next(line for line in said if line.startswith(stage))  # it counts what was done before
    assert int(first.split()[1]) >= int(done)
    assert bytes_of(out) == undisturbed(tree, tmp_path / "expected")
    assert not [path.name for path in tmp_path.iterdir() if path.name.startswith(".")]


def killed_often(tree, tmp_path, times, seed):
    """Kill a build `times` times at random moments and let the last one end."""
    begun = time.monotonic()
    with start(tree, tmp_path / "whole") as process:
        process.communicate()
    takes = time.monotonic() - begun
    moments = random.Random(seed)
    for _ in range(times):
        with start(tree, tmp_path / "set") as process:
            time.sleep(moments.uniform(0.1, 1) * takes)
            process.kill()
    with start(tree, tmp_path / "set") as process:
        process.communicate()
    assert process.returncode == 0
    assert bytes_of(tmp_path / "set") == bytes_of(tmp_path / "whole") == undisturbed(tree, tmp_path / "expected")
    assert not [path.name for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_three_kills_at_random_moments_change_no_byte(tree, tmp_path):
    killed_often(tree, tmp_path, 3, seed=0)


@pytest.mark.slow
def test_twenty_kills_at_random_moments_change_no_byte(tree, tmp_path):
    for seed in range(3):
        (tmp_path / str(seed)).mkdir()
        killed_often(tree, tmp_path / str(seed), 20, seed)


# Leftovers of a killed build are used only if they fit.


def test_spools_of_a_source_that_has_changed_since_are_not_used(tree, tmp_path):
    with start(tree, tmp_path / "set") as process:
        wait_for_packed(process, 45)
        process.kill()
    path = tree / "CT/lung/Nodule/CT 1.png"
    before = path.stat()
    path.write_bytes(bytes(len(path.read_bytes())))  # as many bytes, of the same name
    assert path.stat().st_size == before.st_size
    with start(tree, tmp_path / "set") as process:
        assert "50 1 rejected" in process.stdout.read()
    assert bytes_of(tmp_path / "set") == undisturbed(tree, tmp_path / "expected")


def test_a_damaged_spool_is_packed_again(tree, tmp_path):
    with start(tree, tmp_path / "set") as process:
        wait_for_packed(process, 45)
        process.kill()
    spools = sorted((tmp_path / ".set.building").glob("spool-*"))
    for spool, content in zip(
        spools, (b"", b"x", spools[2].read_bytes()[1:], spools[3].read_bytes()[:-1]), strict=False
    ):
        spool.write_bytes(content)
    with start(tree, tmp_path / "set") as process:
        process.communicate()
    assert bytes_of(tmp_path / "set") == undisturbed(tree, tmp_path / "expected")


def test_leftovers_of_other_options_are_removed(tree, tmp_path):
    with start(tree, tmp_path / "set") as process:
        next(line for line in process.stdout if line.startswith("writing 1 "))
        process.kill()
    seen = []

    def progress(*state):
        seen.append({path.name for path in (tmp_path / ".set.building").iterdir()})

    left = {path.name for path in (tmp_path / ".set.building").iterdir()} - {"lock"}
    build(tree, tmp_path / "set", BuildOptions(size=24, workers=1), progress=progress)
    assert seen[0] == left | {"lock"}
    assert not left & seen[-1]


# Workers that die.


DIE = "os.kill(os.getpid(), signal.SIGKILL)"


def test_an_image_that_kills_its_worker_three_times_is_rejected_and_all_others_are_packed(tree, tmp_path, killer):
    (tree / "US/liver/US 5.png").rename(tree / "US/liver/killer.png")
    with start(tree, tmp_path / "set", environment=killer(tmp_path, DIE)) as process:
        said = process.stdout.read().splitlines()
    assert (process.returncode, said[-1]) == (0, "1")
    manifest = Manifest.load(tmp_path / "set")
    assert manifest.samples == 49
    assert manifest.rejected == [Rejected("US/liver/killer.png", "the worker died three times while packing it")]


def test_a_worker_that_dies_once_costs_nothing(tree, tmp_path, killer):
    (tree / "US/liver/US 5.png").rename(tree / "US/liver/killer.png")
    once = f"if not flag.exists(): flag.touch(), {DIE}"
    with start(tree, tmp_path / "set", environment=killer(tmp_path, once)) as process:
        said = process.stdout.read().splitlines()
    assert (tmp_path / "flag").exists()
    assert (process.returncode, said[-1]) == (0, "0")
    assert bytes_of(tmp_path / "set") == undisturbed(tree, tmp_path / "expected")


@pytest.mark.parametrize("workers", [1, 2])
def test_an_image_for_which_there_is_no_memory_is_rejected_and_all_others_are_packed(
    tree, tmp_path, killer, workers
):
    (tree / "US/liver/US 5.png").rename(tree / "US/liver/killer.png")
    environment = killer(tmp_path, "raise MemoryError")
    with start(tree, tmp_path / "set", workers=workers, environment=environment) as process:
        said = process.stdout.read().splitlines()
    assert (process.returncode, said[-1]) == (0, "1")
    assert Manifest.load(tmp_path / "set").samples == 49
