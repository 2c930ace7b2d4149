"""What ends a training early, by real signals and kills: what is saved, and the weights that it resumes to."""

import json
import os
import random
import signal
import sys
import threading
import time

import pytest

from modan_fast import run, trainer
from modan_fast.loader import Loader
from modan_fast.recipes import pretrain_config
from modan_fast.run import load_checkpoint
from modan_fast.trainer import pretrain
from shard_builder.settings import InputError

pytestmark = pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="Windows has other signals")
ENCODER = "timm/test_resnet"
SECONDS = 10  # between a signal and the saved state, at most


def settings(shards, out, **changes):
    """Settings of a run of three epochs of four steps each, with a small network: it is about when, not about what."""
    given = {
        "shards": str(shards),
        "out": out,
        "image_size": 32,
        "encoder": ENCODER,
        "batch_size": 12,
        "epochs": 3,
    }
    return pretrain_config({**given, "lr": 0.01, "checkpoint_every": 10, **changes})


@pytest.fixture(scope="module")
def whole(shards, tmp_path_factory):
    """The encoder's bytes after an undisturbed run."""
    return (
        pretrain(settings(shards, tmp_path_factory.mktemp("whole") / "run")) / "encoder.safetensors"
    ).read_bytes()


def resumed(config):
    """The encoder's bytes after the run in `config` is resumed and ends."""
    return (pretrain(config, resume=True) / "encoder.safetensors").read_bytes()


def at_step(monkeypatch, number, action):
    """Perform `action` after the step of that number, counted from 1 over all epochs."""
    update, done = trainer.TrainState.update, []

    def updating(state, batch):
        update(state, batch)
        done.append(batch)
        if len(done) == number:
            action()

    monkeypatch.setattr(trainer.TrainState, "update", updating)


@pytest.mark.parametrize(("name", "step"), [("SIGTERM", 2), ("SIGHUP", 4), ("SIGINT", 5)])
def test_a_signal_saves_the_step_it_arrives_in(shards, tmp_path, monkeypatch, whole, name, step):
    config = settings(shards, tmp_path / "run")
    before = signal.getsignal(getattr(signal, name))
    with monkeypatch.context() as patch:
        at_step(patch, step, lambda: os.kill(os.getpid(), getattr(signal, name)))
        with pytest.raises(KeyboardInterrupt):
            pretrain(config)
    state = load_checkpoint(config.run)
    assert 4 * state["epoch"] + state["step"] == step
    assert signal.getsignal(getattr(signal, name)) == before
    assert resumed(config) == whole


def test_sigterm_again_and_again_saves_all_the_same(shards, tmp_path, monkeypatch, whole):
    config = settings(shards, tmp_path / "run")
    save = run.save_checkpoint

    def saving(folder, state):
        os.kill(os.getpid(), signal.SIGTERM)
        save(folder, state)
        os.kill(os.getpid(), signal.SIGHUP)

    with monkeypatch.context() as patch:
        patch.setattr(run, "save_checkpoint", saving)
        at_step(patch, 2, lambda: [os.kill(os.getpid(), signal.SIGTERM) for _ in range(5)])
        with pytest.raises(KeyboardInterrupt):
            pretrain(config)
    assert load_checkpoint(config.run)["step"] == 2
    assert resumed(config) == whole


def test_a_second_ctrl_c_ends_at_once_and_keeps_the_last_checkpoint(shards, tmp_path, monkeypatch):
    config = settings(shards, tmp_path / "run", checkpoint_every=1)

    def saving(*_):
        raise AssertionError("nobody waits for a checkpoint after the second Ctrl-C")

    def twice():
        monkeypatch.setattr(run, "save_checkpoint", saving)
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)

    at_step(monkeypatch, 6, twice)
    with pytest.raises(KeyboardInterrupt):
        pretrain(config)
    state = load_checkpoint(config.run)
    assert (state["epoch"], state["step"]) == (1, 0)


def test_a_hang_up_under_nohup_changes_nothing(shards, tmp_path, monkeypatch, whole):
    config = settings(shards, tmp_path / "run")
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        at_step(monkeypatch, 3, lambda: os.kill(os.getpid(), signal.SIGHUP))
        assert (pretrain(config) / "encoder.safetensors").read_bytes() == whole
    finally:
        signal.signal(signal.SIGHUP, before)


def test_sigterm_while_a_checkpoint_is_written_leaves_a_whole_one(shards, tmp_path, monkeypatch, whole):
    config = settings(shards, tmp_path / "run", checkpoint_every=1)
    save = trainer.run.torch.save

    def saving(state, file):
        os.kill(os.getpid(), signal.SIGTERM)
        save(state, file)

    with monkeypatch.context() as patch:
        patch.setattr("torch.save", saving)
        with pytest.raises(KeyboardInterrupt):
            pretrain(config)
    assert load_checkpoint(config.run)["epoch"] == 1
    assert resumed(config) == whole


@pytest.mark.parametrize("resume", [False, True])
def test_sigterm_while_the_store_is_filled_ends_at_once_and_loses_nothing(
    shards, tmp_path, monkeypatch, whole, resume
):
    config = settings(shards, tmp_path / "run")
    if resume:
        with monkeypatch.context() as patch:
            at_step(patch, 5, lambda: os.kill(os.getpid(), signal.SIGTERM))
            with pytest.raises(KeyboardInterrupt):
                pretrain(config)

    def stop(stage, done, total, note=""):
        if stage == "decoding":
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(KeyboardInterrupt):
        pretrain(config, resume=resume, progress=stop)
    assert (config.run / "checkpoint.pt").exists() == resume
    if resume:
        assert resumed(config) == whole
    else:
        assert (pretrain(config) / "encoder.safetensors").read_bytes() == whole


def test_sigterm_saves_within_ten_seconds_though_the_next_batch_never_comes(shards, tmp_path, monkeypatch, whole):
    config = settings(shards, tmp_path / "run")
    epoch = Loader.epoch
    killed = []

    def stalls(loader, number, start=0):
        for step, batch in enumerate(epoch(loader, number, start), start):
            if (number, step) == (1, 1):
                threading.Timer(0.5, lambda: [killed.append(time.monotonic()), os.kill(os.getpid(), 15)]).start()
                time.sleep(60)
            yield batch

    with monkeypatch.context() as patch:
        patch.setattr(Loader, "epoch", stalls)
        with pytest.raises(KeyboardInterrupt):
            pretrain(config)
    assert time.monotonic() - killed[0] < SECONDS
    state = load_checkpoint(config.run)
    assert (state["epoch"], state["step"]) == (1, 1)
    assert resumed(config) == whole


@pytest.mark.parametrize(
    "error", [InputError("shard 7 is gone"), OSError(5, "Input/output error", "shard-7.tar")]
)
def test_data_that_fails_ends_with_one_line_and_a_saved_state(shards, tmp_path, monkeypatch, whole, error):
    config = settings(shards, tmp_path / "run")
    epoch = Loader.epoch

    def fails(loader, number, start=0):
        for step, batch in enumerate(epoch(loader, number, start), start):
            if (number, step) == (1, 2):
                raise error
            yield batch

    with monkeypatch.context() as patch:
        patch.setattr(Loader, "epoch", fails)
        saved = r"; 1 epochs and 2 steps are saved in .*run, `resume=True` continues them$"
        with pytest.raises(InputError, match="(shard 7 is gone|shard-7.tar: Input/output error)" + saved):
            pretrain(config)
    assert resumed(config) == whole


def test_a_state_whose_loss_is_not_finite_is_not_saved_when_the_data_fails(shards, tmp_path, monkeypatch):
    epoch = Loader.epoch

    def fails(loader, number, start=0):
        yield next(batches := epoch(loader, number, start))
        batches.close()
        raise InputError("shard 7 is gone")

    monkeypatch.setattr(Loader, "epoch", fails)
    forward = trainer.TrainState.forward
    monkeypatch.setattr(trainer.TrainState, "forward", lambda state, batch: forward(state, batch) * float("nan"))
    with pytest.raises(FloatingPointError, match="nothing was saved yet"):
        pretrain(settings(shards, tmp_path / "run"))
    assert not (tmp_path / "run" / "checkpoint.pt").exists()


def test_a_long_epoch_is_saved_after_checkpoint_minutes(shards, tmp_path, monkeypatch, whole):
    class DiedError(Exception):
        pass

    def die():
        raise DiedError

    for minutes, saved in ((1e-9, True), (60, False), (None, False)):
        config = settings(shards, tmp_path / str(minutes), checkpoint_minutes=minutes)
        with monkeypatch.context() as patch:
            at_step(patch, 7, die)
            with pytest.raises(DiedError):
                pretrain(config)
        assert (config.run / "checkpoint.pt").exists() == saved
        if saved:
            state = load_checkpoint(config.run)
            assert (state["epoch"], state["step"]) == (1, 2)
            assert resumed(config) == whole


def test_a_run_folder_that_vanishes_is_not_made_anew_by_halves(shards, tmp_path, monkeypatch):
    config = settings(shards, tmp_path / "run", checkpoint_every=1)
    at_step(monkeypatch, 6, lambda: config.run.rename(tmp_path / "elsewhere"))
    with pytest.raises(InputError, match=r"run/log.jsonl: No such file or directory; nothing was saved yet"):
        pretrain(config)
    assert not config.run.exists()
    assert load_checkpoint(tmp_path / "elsewhere")["epoch"] == 1


def test_a_run_that_another_process_finished_meanwhile_is_left_alone(shards, tmp_path, monkeypatch):
    config = settings(shards, tmp_path / "run", epochs=1)
    opening = trainer.loader_of

    def opening_for_long(*arguments, **keywords):
        monkeypatch.setattr(trainer, "loader_of", opening)
        pretrain(config)
        os.utime(config.run / "encoder.safetensors", (1, 1))
        return opening(*arguments, **keywords)

    monkeypatch.setattr(trainer, "loader_of", opening_for_long)
    pretrain(config)
    assert (config.run / "encoder.safetensors").stat().st_mtime == 1


SAY_BEGUN = """
from modan_fast import trainer

def begin(*arguments, begin=trainer.begin, **keywords):
    print("begun", flush=True)
    begin(*arguments, **keywords)

trainer.begin = begin
"""


SMALL, LARGE = ("--encoder", ENCODER), ("--stem", "7x7")


@pytest.mark.parametrize(
    ("kills", "epochs", "network", "pace"),
    [(2, 4, SMALL, 0.4), pytest.param(20, 8, LARGE, 1.0, marks=pytest.mark.slow)],
)
def test_training_that_is_killed_again_and_again_ends_with_the_same_encoder(
    shards, start, succeed, tmp_path, kills, epochs, network, pace
):
    """Each process is killed at a random moment after it has begun, also while it writes: it saves after each step.

    All its waits together are `pace` times as long as an undisturbed run, or less.
    """

    def command(name, *more):
        own = ("--epochs", str(epochs), "--lr", "0.01", "--checkpoint-minutes", "1e-9", "--store", "host")
        small = ("--batch-size", "12", "--image-size", "32", "--threads", "2", "--device", "cpu", *network)
        return ("pretrain", "--shards", shards, *own, *small, "--out", tmp_path / name, *more)

    def begun(*words):
        running = start(*words, first=SAY_BEGUN)
        running.until(lambda: "begun\n" in running.said())
        return running

    whole, run_folder = begun(*command("whole")), tmp_path / "run"
    since = time.monotonic()
    whole.succeeds()
    seconds = time.monotonic() - since
    generator = random.Random(0)
    survived = []

    def how() -> str:
        return "--resume" if (run_folder / "checkpoint.pt").exists() else "--overwrite"

    for _ in range(kills):
        killed = begun(*command("run", how()))
        time.sleep(generator.uniform(0, pace * seconds / kills))
        killed.signal(signal.SIGKILL)
        assert killed.end()[0] == -signal.SIGKILL, "it must be killed before it has finished"
        if (run_folder / "checkpoint.pt").exists():
            state = load_checkpoint(run_folder)
            survived.append((state["epoch"], state["step"]))
    assert survived == sorted(survived), "no step that was saved is lost"
    succeed(*command("run", how(), "--threads", "1"))
    encoders = [tmp_path / name / "encoder.safetensors" for name in ("run", "whole")]
    assert encoders[0].read_bytes() == encoders[1].read_bytes()
    assert not list(run_folder.glob("*.part"))
    print(f"{kills} kills after epoch and step {survived}: the same encoder", file=sys.stderr)


def test_an_epoch_whose_record_fails_is_recorded_once_the_disk_has_room(shards, tmp_path, whole):
    class Full:
        """A logger whose disk is full after the second epoch, once."""

        def __init__(self):
            self.fails = True

        def log(self, metrics, step):
            if step == 2 and self.fails:
                self.fails = False
                raise OSError(28, "No space left on device", "elsewhere.log")

    config = settings(shards, tmp_path / "run", keep=(2,))
    with pytest.raises(
        InputError, match=r"elsewhere.log: No space left on device; 1 epochs and 4 steps are saved"
    ):
        pretrain(config, loggers=[Full()])
    assert resumed(config) == whole
    log = [json.loads(line)["epoch"] for line in (config.run / "log.jsonl").read_text().splitlines()]
    assert log == [1, 2, 3]
    assert (config.run / "encoder-0002.safetensors").exists()


def test_a_ctrl_c_after_a_sigterm_still_waits_for_the_step(shards, tmp_path, monkeypatch, whole):
    config = settings(shards, tmp_path / "run")
    with monkeypatch.context() as patch:
        at_step(patch, 2, lambda: [os.kill(os.getpid(), each) for each in (signal.SIGTERM, signal.SIGINT)])
        with pytest.raises(KeyboardInterrupt):
            pretrain(config)
    assert load_checkpoint(config.run)["step"] == 2
    assert resumed(config) == whole
