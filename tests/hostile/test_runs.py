"""Run folders from strangers: config.json, checkpoint.pt, log.jsonl and links, as `--resume` meets them."""

import io
import json
import os
import pickle
import random
from dataclasses import replace

import pytest
import torch

from modan_fast import run
from modan_fast.recipes import pretrain_config
from modan_fast.shards import open_shards
from modan_fast.step import TrainState
from modan_fast.trainer import pretrain, restore
from shard_builder.settings import InputError

DEEP: object = 0
for _ in range(100):
    DEEP = [DEEP]
HOSTILE = [
    None, True, -1, 0, 2**63, 10**400, float("nan"), float("inf"), 0.5, "", "x", "../..", "/etc", "\x00", "\ud800",
    "\x1b[2J", "\u202e", "x" * 100_000, [], {}, [[]], {"": {}}, [None], DEEP,
    "pipe:touch PWNED {}", "http://127.0.0.1:9/", "file:///etc",
]  # fmt: skip


@pytest.fixture(scope="module")
def finished(shards, tmp_path_factory):
    """A run of two epochs."""
    small = {"image_size": 32, "encoder": "timm/test_resnet", "batch_size": 24, "epochs": 2}
    config = {"shards": str(shards), **small}
    return pretrain(pretrain_config({**config, "out": tmp_path_factory.mktemp("runs") / "run"}))


def mutated(content: bytes, generator: random.Random) -> bytes:
    """The bytes with a flip, a cut, an insertion, a repetition or another encoding."""
    start, end = sorted(generator.randrange(len(content) + 1) for _ in range(2))
    return generator.choice(
        [
            lambda: content[:start],
            lambda: content[:start] + generator.randbytes(4) + content[start:],
            lambda: content[:start] + content[end:],
            lambda: content[:end] + content[start:],
            lambda: content[:start] + b"\x00" + content[start + 1 :],
            lambda: content.decode().encode("utf-16"),
            lambda: (
                content[:start] + generator.choice([b"[", b"{", b'"', b"1e999", b"-"]) * 3000 + content[start:]
            ),
        ]
    )()


def test_hostile_settings_of_a_run_are_refused_or_make_no_difference(survives, finished):
    """2,000 inputs. What is accepted still trains in the folder that was named, on a local shard set."""
    generator = random.Random(0)
    valid = (finished / "config.json").read_bytes()
    cases: list[bytes] = []
    for part in (None, "settings", "shards"):
        content = json.loads(valid)
        for name in list(content if part is None else content[part]):
            for value in HOSTILE:
                content = json.loads(valid)
                (content if part is None else content[part])[name] = value
                cases.append(json.dumps(content).encode())
    cases += [b"[" * 100_000, b'{"a":' * 100_000, b"", b"null", b"\xff\xfe", b'{"settings": 3}']
    cases += [mutated(valid, generator) for _ in range(2100 - len(cases))]

    def resume(folder):
        config = run.resumed_config(folder, {})
        assert config.run == folder
        assert "://" not in config.shards
        assert not config.shards.startswith("pipe:")

    accepted, refused = survives(cases, lambda case, folder: (folder / "config.json").write_bytes(case), resume)
    assert accepted + refused >= 2000
    assert min(accepted, refused) > 100


def test_a_recorded_command_runs_only_if_it_is_repeated(finished, tmp_path, monkeypatch):
    monkeypatch.setattr("modan_fast.remote.PAUSES", (0.0,) * 4)
    monkeypatch.chdir(tmp_path)
    given = tmp_path / "given"
    given.mkdir()
    content = json.loads((finished / "config.json").read_text())
    content["settings"]["shards"] = "pipe:touch PWNED; cat /dev/null {}"
    (given / "config.json").write_text(json.dumps(content))
    (given / "checkpoint.pt").write_bytes((finished / "checkpoint.pt").read_bytes())
    with pytest.raises(InputError, match="repeat it with `shards` to resume, a recorded URL is not opened"):
        pretrain(run.settings_for({"out": str(given)}, resume=True), resume=True)
    assert not (tmp_path / "PWNED").exists()
    with pytest.raises(InputError):  # the manifest that the command prints is empty
        pretrain(
            run.settings_for({"out": str(given), "shards": content["settings"]["shards"]}, resume=True),
            resume=True,
        )
    assert (tmp_path / "PWNED").exists(), "the user asked for it"


def test_a_recorded_output_folder_is_not_written_to(finished, shards, tmp_path):
    given, victim = tmp_path / "given", tmp_path / "victim"
    given.mkdir()
    victim.mkdir()
    for name in ("config.json", "checkpoint.pt", "log.jsonl", "encoder.safetensors"):
        (given / name).write_bytes((finished / name).read_bytes())
        (victim / name).write_bytes((finished / name).read_bytes())
    content = json.loads((finished / "config.json").read_text())
    (given / "config.json").write_text(
        json.dumps({**content, "settings": {**content["settings"], "out": str(victim)}})
    )
    before = {path.name: path.read_bytes() for path in victim.iterdir()}
    assert pretrain(run.settings_for({"out": str(given), "epochs": 3}, resume=True), resume=True) == given
    assert run.finished_epochs(given) == 3
    assert {path.name: path.read_bytes() for path in victim.iterdir()} == before


@pytest.mark.parametrize("name", ["config.json", "log.jsonl", "checkpoint.pt", "encoder.safetensors"])
def test_a_link_in_a_run_folder_is_replaced_and_not_followed(finished, tmp_path, name):
    given, target = tmp_path / "given", tmp_path / "target"
    given.mkdir()
    for each in ("config.json", "checkpoint.pt", "log.jsonl", "encoder.safetensors"):
        (given / each).write_bytes((finished / each).read_bytes())
    (given / name).rename(target)
    (given / name).symlink_to(target)
    before = target.read_bytes()
    pretrain(run.settings_for({"out": str(given), "epochs": 3}, resume=True), resume=True)
    assert target.read_bytes() == before
    assert run.finished_epochs(given) == 3


class Touch:
    """Runs a command when it is unpickled carelessly."""

    def __reduce__(self):
        return os.system, ("touch PWNED",)


def hostile_states(state):
    """States that a checkpoint may hold and that no run wrote."""
    for name in state:
        for value in (None, -1, "x", 10**400, [], {}, torch.zeros(3), float("nan")):
            yield {**state, name: value}
        yield {key: value for key, value in state.items() if key != name}
    first = next(iter(state["model"]))
    statistics = next(name for name in state["model"] if name.endswith("running_var"))
    for name, value in state["model"].items():
        if name in (first, "head.bias", statistics):
            for other in (
                torch.full_like(value, torch.nan),
                torch.full_like(value, torch.inf),
                value[:1],
                None,
                3,
            ):
                yield {**state, "model": {**state["model"], name: other}}
            yield {**state, "model": {**state["model"], name: torch.zeros(1).expand(10**9)}}
    yield {**state, "model": {**state["model"], "encoder.extra": torch.zeros(1)}}
    gathered = state["optimizer"]["state"]
    for value in (
        torch.zeros(1),
        torch.full_like(gathered[0]["momentum_buffer"], torch.nan),
        "x",
        None,
        {},
        10**9,
    ):
        yield {**state, "optimizer": {"state": {**gathered, 0: {"momentum_buffer": value}}}}
    for other in ({}, {0: 3}, {0: {}}, {"x": {}}, {10**6: {"momentum_buffer": torch.zeros(1)}}, 3, [], None):
        yield {**state, "optimizer": {"state": other}}
    yield {**state, "optimizer": {**state["optimizer"], "param_groups": [{"lr": "x", "params": ["y"]}]}}


def test_hostile_states_are_refused_or_make_no_difference(survives, finished, tmp_path, monkeypatch):
    config = replace(run.resumed_config(finished, {}), epochs=3)
    state = TrainState(config, classes=4, steps=2, device=torch.device("cpu"))
    given: list[object] = []
    monkeypatch.setattr(run, "load_checkpoint", lambda folder: given[-1])
    monkeypatch.setattr(run, "save_run_encoder", lambda *_, **__: None)

    def resume(folder):
        restore(state, folder)
        assert 0 <= state.epoch <= 3
        assert all(torch.isfinite(value).all() for value in state.model.state_dict().values())
        for parameter in state.model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        state.optimise()  # what was gathered fits the parameters

    saved = torch.load(finished / "checkpoint.pt", weights_only=True)
    accepted, refused = survives(hostile_states(saved), lambda case, _: given.append(case), resume)
    assert refused > 50
    assert accepted > 0


def test_hostile_checkpoint_files_are_refused_or_make_no_difference(survives, finished):
    saved = torch.load(finished / "checkpoint.pt", weights_only=True)
    file = io.BytesIO()
    torch.save({**saved, "model": {}, "optimizer": {}}, file)
    content, generator = file.getvalue(), random.Random(0)
    dangerous = io.BytesIO()
    torch.save({"x": Touch()}, dangerous)
    cases = [b"", b"PK\x03\x04", pickle.dumps(Touch()), dangerous.getvalue()]
    for _ in range(500):
        damaged = bytearray(content)
        for _ in range(generator.choice([1, 8, 64])):
            damaged[generator.randrange(len(content))] = generator.randrange(256)
        cases.append(bytes(damaged[: generator.choice([len(content), generator.randrange(len(content))])]))
    accepted, refused = survives(
        cases, lambda case, folder: (folder / "checkpoint.pt").write_bytes(case), run.load_checkpoint
    )
    assert min(accepted, refused) > 10


def test_a_shard_set_that_was_exchanged_is_refused(finished, shards, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    for path in shards.iterdir():
        (other / path.name).write_bytes(path.read_bytes())
    content = json.loads((other / "manifest.json").read_text())
    (other / "manifest.json").write_text(json.dumps({**content, "rejected": [{"source": "x", "reason": "y"}]}))
    assert open_shards(other).fingerprint != open_shards(shards).fingerprint
    with pytest.raises(InputError, match="is not the shard set that"):
        pretrain(run.settings_for({"out": str(finished), "shards": str(other)}, resume=True), resume=True)


def test_a_pipe_in_place_of_a_checkpoint_is_refused_at_once(survives, finished):
    def write(name, folder):
        (folder / "config.json").write_bytes((finished / "config.json").read_bytes())
        os.mkfifo(folder / name)

    assert survives(["checkpoint.pt"], write, run.load_checkpoint) == (0, 1)


def test_the_path_of_a_shard_set_is_recorded_as_it_is_and_a_password_is_not(finished, shards, tmp_path):
    odd = tmp_path / "set?v=2 name@host"
    odd.symlink_to(shards)
    config = replace(run.resumed_config(finished, {}), shards=str(odd), out=tmp_path / "run", epochs=1)
    pretrain(config)
    assert json.loads((tmp_path / "run" / "config.json").read_text())["settings"]["shards"] == str(odd)
    url = replace(config, shards="https://user:secret@host/set?token=secret")
    run.begin(url, open_shards(shards), preprocessing={}, chosen={}, resumed_at=None)
    assert "secret" not in (tmp_path / "run" / "config.json").read_text()
