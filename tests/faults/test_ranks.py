"""Ranks that fail, are killed or get a signal: all end soon, one of them says why, and the state is whole."""

import json
import os
import signal
import socket
import sys
import time

import pytest

from modan_fast.run import load_checkpoint

SECONDS = 30  # after which torchrun would kill what has not ended
SETTINGS = [
    *(
        "--image-size",
        "32",
        "--encoder",
        "timm/test_resnet",
        "--batch-size",
        "14",
        "--lr",
        "0.0001",
        "--seed",
        "5",
    ),
    *("--epochs", "3", "--warmup-epochs", "0", "--no-drop-last", "--checkpoint-every", "1", "--threads", "1"),
    *("--device", "cpu", "--monitor-every", "0"),
]
# Runs before a rank: what it does as its step of that number begins, counted from 1.
AT_STEP = """
import modan_fast.trainer, os, signal, time
from shard_builder.settings import InputError
update, begun = modan_fast.trainer.TrainState.update, []
def updating(state, batch):
    begun.append(batch)
    if len(begun) == {step}:
        {action}
    update(state, batch)
modan_fast.trainer.TrainState.update = updating
"""


@pytest.fixture
def start_ranks(start):
    """A function that starts a command on ranks, without torchrun, which would end the others if one ends.

    `first` has Python that a rank runs before, by rank; `restarts` is what torchrun counts.
    """

    def start_ranks(size, *arguments, first=None, restarts=0):
        with socket.socket() as found:
            found.bind(("127.0.0.1", 0))
            port = found.getsockname()[1]
        started = []
        for rank in range(size):
            variables = {
                **{"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size},
                **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RESTART_COUNT": restarts},
            }
            environment = {name: str(value) for name, value in variables.items()}
            code = f"os.environ.update({environment!r})\n{(first or {}).get(rank, '')}"
            started.append(start("pretrain", *arguments, first=code))
        return started

    return start_ranks


@pytest.fixture(scope="module")
def whole(shards, tmp_path_factory):
    """The log of an undisturbed run of one process."""
    from modan_fast.recipes import pretrain_config
    from modan_fast.trainer import pretrain

    given = {
        **{
            "image_size": 32,
            "encoder": "timm/test_resnet",
            "batch_size": 14,
            "lr": 0.0001,
            "seed": 5,
            "epochs": 3,
        },
        **{"warmup_epochs": 0, "drop_last": False, "threads": 1, "device": "cpu", "monitor_every": 0},
    }
    out = tmp_path_factory.mktemp("whole") / "run"
    return losses(pretrain(pretrain_config({**given, "shards": str(shards), "out": out})))


def losses(run):
    return [json.loads(line)["loss"] for line in (run / "log.jsonl").read_text().splitlines()]


def where(run):
    state = load_checkpoint(run)
    return state["epoch"], state["step"]


def test_two_ranks_give_the_log_of_one_process_and_resume_as_one_or_three(
    start_ranks, start, shards, tmp_path, whole
):
    command = ["--shards", shards, *SETTINGS, "--out", tmp_path / "run"]
    stop = AT_STEP.format(step=3, action="os.kill(os.getpid(), signal.SIGTERM)")
    first, second = start_ranks(2, *command, first={1: stop})
    assert first.end()[0] == second.end()[0] == 130
    assert second.said() == ""
    assert first.said().splitlines()[-1].startswith("modan-fast: stopped; ")
    assert where(tmp_path / "run") == (0, 3)
    one = start("pretrain", *command, "--resume", first=AT_STEP.format(step=3, action="os.kill(os.getpid(), 15)"))
    assert one.end()[0] == 130
    assert where(tmp_path / "run") == (1, 2)
    first, *others = start_ranks(3, *command, "--resume")
    assert "ranks 3" in first.succeeds()
    assert [each.succeeds() for each in others] == ["", ""]
    assert losses(tmp_path / "run") == pytest.approx(whole, rel=1e-5)


def test_a_rank_that_is_killed_ends_the_others_with_one_line(start_ranks, shards, tmp_path, whole):
    command = ["--shards", shards, *SETTINGS, "--out", tmp_path / "run"]
    kill = AT_STEP.format(step=6, action="os.kill(os.getpid(), signal.SIGKILL)")
    first, second = start_ranks(2, *command, first={1: kill})
    assert second.end()[0] == -signal.SIGKILL
    begun = time.monotonic()
    assert "another rank has ended unexpectedly" in first.fails()
    assert time.monotonic() - begun < SECONDS
    assert where(tmp_path / "run")[0] == 1
    # As torchrun starts them again.
    for each in start_ranks(2, *command, restarts=1):
        each.succeeds()
    assert losses(tmp_path / "run") == pytest.approx(whole, rel=1e-5)


def test_if_rank_0_is_killed_another_says_so(start_ranks, shards, tmp_path):
    command = ["--shards", shards, *SETTINGS, "--out", tmp_path / "run"]
    kill = AT_STEP.format(step=6, action="os.kill(os.getpid(), signal.SIGKILL)")
    _, second, third = start_ranks(3, *command, first={0: kill})
    assert second.fails().startswith("modan-fast: rank 1: another rank has ended unexpectedly")
    assert (third.end()[0], third.said()) == (2, "")
    assert where(tmp_path / "run") == (1, 0)


def test_data_that_fail_on_one_rank_end_all_and_save_the_state(start_ranks, shards, tmp_path):
    broken = """
import modan_fast.loader
from shard_builder.settings import InputError
collect, done = modan_fast.loader.Loader.collect, []
def failing(loader, ready):
    done.append(ready)
    if len(done) == 7:
        raise InputError("shard-000000.tar holds an image that does not decode")
    return collect(loader, ready)
modan_fast.loader.Loader.collect = failing
"""
    first, second = start_ranks(2, "--shards", shards, *SETTINGS, "--out", tmp_path / "run", first={1: broken})
    line = first.fails()
    assert "rank 1 of 2: shard-000000.tar holds an image that does not decode" in line
    assert "1 epochs and 2 steps are saved" in line
    assert (second.end()[0], second.said()) == (2, "")
    assert where(tmp_path / "run") == (1, 2)


def test_a_disk_that_is_full_on_rank_0_ends_all(start_ranks, shards, tmp_path, disk):
    small = disk("20m")
    fill = f"[None for file in [open({os.fsdecode(small.folder / 'filler')!r}, 'wb', 0)] for _ in fills(file)]"
    code = f"""
def fills(file):
    try:
        while file.write(bytes(4096)):
            yield
    except OSError:
        file.close()
{AT_STEP.format(step=6, action=fill)}"""
    first, second = start_ranks(2, "--shards", shards, *SETTINGS, "--out", small.folder / "run", first={0: code})
    assert "No space left on device" in first.fails()
    assert (second.end()[0], second.said()) == (2, "")
    assert where(small.folder / "run") == (1, 0)


def test_a_loss_that_is_not_finite_is_said_once(start_ranks, shards, tmp_path):
    first, second = start_ranks(2, "--shards", shards, *SETTINGS, "--out", tmp_path / "run", "--lr", "1e30")
    code, said = first.end()
    assert code == 1
    assert said.splitlines()[-1].startswith("modan-fast: the loss is ")
    assert (second.end()[0], second.said()) == (1, "")


def test_a_restart_does_not_replace_a_run_of_other_settings(start_ranks, start, shards, tmp_path):
    run = tmp_path / "run"
    start("pretrain", "--shards", shards, *SETTINGS, "--out", run, "--epochs", "1").succeeds()
    before = {path.name: path.read_bytes() for path in run.iterdir() if path.is_file()}
    first, second = start_ranks(2, "--shards", shards, *SETTINGS, "--out", run, "--seed", "6", restarts=1)
    assert "holds a run of other settings" in first.fails()
    assert (second.end()[0], second.said()) == (2, "")
    assert {path.name: path.read_bytes() for path in run.iterdir() if path.is_file()} == before


def test_ranks_that_see_other_shards_are_told(start_ranks, shards, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    for path in shards.iterdir():
        content = path.read_bytes()
        if path.name == "manifest.json":
            content = content.replace(b'"seed": 0', b'"seed": 7')
        (other / path.name).write_bytes(content)
    change = f"sys.argv[sys.argv.index('--shards') + 1] = {os.fsdecode(other)!r}"
    first, second = start_ranks(2, "--shards", shards, *SETTINGS, "--out", tmp_path / "run", first={1: change})
    assert "is another shard set on rank 1 than on rank 0" in first.fails()
    assert (second.end()[0], second.said()) == (2, "")
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(sys.platform != "linux", reason="the nursery is for Linux")
def test_torchrun_goes_on_from_the_checkpoint_after_a_rank_was_killed(shards, tmp_path, whole):
    import subprocess

    kill = AT_STEP.format(step=6, action="os.kill(os.getpid(), signal.SIGKILL)")
    program = (
        "import os, sys\n"
        "import modan_fast.cli\n"
        "if os.environ['RANK'] == '1' and os.environ['TORCHELASTIC_RESTART_COUNT'] == '0':\n"
        + "".join(f"    {line}\n" for line in kill.strip().splitlines())
        + "modan_fast.cli.main()\n"
    )
    script = tmp_path / "killed.py"
    script.write_text(program)
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--max-restarts", "1"),
        *("--master-port", "0", "--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0"),
        *(script, "pretrain", "--shards", shards, *SETTINGS, "--out", tmp_path / "run"),
    ]
    done = subprocess.run([os.fsdecode(each) for each in command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert losses(tmp_path / "run") == pytest.approx(whole, rel=1e-5)
