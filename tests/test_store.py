"""What the store holds against what Pillow reads from the tars."""

import io
import json
import os
import shutil
import socket
import subprocess
import sys
import tarfile
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from modan_fast.decode import dali_installed
from modan_fast.ranks import Ranks
from modan_fast.shards import open_shards
from modan_fast.store import InMemoryStore, open_store, read_all
from modan_fast.stream import Stream
from shard_builder.build import build
from shard_builder.options import BuildOptions
from shard_builder.settings import InputError

RENDERERS = ["torch", pytest.param("dali", marks=pytest.mark.skipif(not dali_installed(), reason="no DALI here"))]
CPU = torch.device("cpu")


def opened(folder, **settings):
    return open_store(open_shards(folder), device=CPU, batch_size=8, threads=1, **settings)


def read_by_hand(folder):
    """Pixels, labels and targets of all samples, through tarfile and Pillow."""
    pixels, labels, targets = [], [], []
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                content, kind = tar.extractfile(member).read(), member.name.partition(".")[2]
                if kind in {"png", "jpg"}:
                    pixels.append(np.asarray(Image.open(io.BytesIO(content))))
                elif kind == "raw":
                    pixels.append(np.frombuffer(content, np.uint8).reshape(48, 48))
                elif kind == "labels":
                    labels.append(list(content))
                elif kind == "target":
                    targets.append(int.from_bytes(content, "little"))
    return np.stack(pixels), np.array(labels), np.array(targets)


@pytest.mark.parametrize("renderer", RENDERERS)
@pytest.mark.parametrize("codec", ["png", "jpeg", "raw"])
def test_the_store_holds_every_sample_in_storage_order(archive, tmp_path, codec, renderer):
    build(archive, tmp_path / "set", BuildOptions(size=48, codec=codec, workers=1, samples_per_shard=20))
    seen = []
    store = read_all(
        open_shards(tmp_path / "set"),
        renderer=renderer,
        device=CPU,
        threads=2,
        progress=lambda stage, done, total, note="": seen.append((stage, done, total)),
    )
    pixels, labels, targets = read_by_hand(tmp_path / "set")
    assert (store.pixels.numpy() == pixels).all()
    assert (store.labels.numpy() == labels).all()
    assert (store.targets.numpy() == targets).all()
    assert ("decoding", 48, 48) in seen


@pytest.mark.parametrize("renderer", RENDERERS)
def test_labels_of_more_fields_and_of_none_reach_the_store(archive, tmp_path, renderer):
    rows = ["path,modality,view,laterality", "CT/lung/Nodule/000.png,CT,,L", "US/liver/001.png,,PA,"]
    rows += ["MR/brain/glioma/002.png,,,"]
    (tmp_path / "table.csv").write_text("\n".join(rows))
    options = BuildOptions(
        size=48, table=(str(tmp_path / "table.csv"),), fields="modality,view,laterality", workers=1
    )
    build(archive, tmp_path / "set", options)
    shards = open_shards(tmp_path / "set")
    assert shards.manifest.labels == ["modality=CT", "view=PA", "laterality=L"]
    store = read_all(shards, renderer=renderer, device=CPU, threads=1)
    assert sorted(map(tuple, store.labels.tolist())) == [(0, 0, 0), (0, 1, 0), (1, 0, 1)]


def test_a_shard_whose_bytes_changed_is_named(shards, tmp_path):
    damaged = shutil.copytree(shards, tmp_path / "set")
    content = bytearray((damaged / "shard-000001.tar").read_bytes())
    content[5000] ^= 1
    (damaged / "shard-000001.tar").write_bytes(content)
    with pytest.raises(
        InputError, match=r"shard-000001.tar has another SHA-256 than its manifest lists: .* copy it"
    ):
        opened(damaged)


def test_pixels_that_do_not_fit_are_refused_with_their_size(shards, tmp_path, monkeypatch):
    vast = shutil.copytree(shards, tmp_path / "set")
    manifest = json.loads((vast / "manifest.json").read_text())
    manifest["size"] = 8192  # 48 images of 64 MB
    (vast / "manifest.json").write_text(json.dumps(manifest))
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=2**31))
    with pytest.raises(
        InputError, match=r"`store=host`: .* GiB of pixels are over 80% of the .* GiB that are free"
    ):
        opened(vast, tier="host")


@pytest.mark.skipif(torch.cuda.is_available(), reason="only where there is no GPU")
def test_a_gpu_store_without_a_gpu_is_refused(shards):
    with pytest.raises(InputError, match="`store=gpu` needs a GPU"):
        opened(shards, tier="gpu")


def test_pixels_that_do_not_fit_are_streamed_with_a_warning_that_says_why(shards, monkeypatch, caplog):
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=100_000))
    assert isinstance(opened(shards), Stream)
    assert "not in host memory, because 0.00 GiB of pixels are over 80%" in caplog.text


def test_memory_that_others_take_while_it_is_filled_is_noticed(shards, monkeypatch, caplog):
    free = iter(
        [2**30, 2**30, 10_000]
    )  # before the store is made, before a shard is read, and while it is filled
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=next(free)))
    monkeypatch.setattr("modan_fast.store.READ_BATCH", 16)
    assert isinstance(opened(shards), Stream)
    assert "other programs left" in caplog.text


def test_a_store_in_memory_says_how_much_it_takes(shards, caplog):
    caplog.set_level("INFO", "modan_fast")
    assert isinstance(opened(shards), InMemoryStore)
    assert "store: in host memory (0.00 GiB of pixels" in caplog.text


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("tier", ["gpu", "host"])
def test_pixels_on_the_gpu_and_in_host_memory_are_those_of_the_tars(shards, tier):
    store = read_all(open_shards(shards), tier=tier, device=torch.device("cuda", 0), threads=2)
    assert store.pixels.is_cuda == (tier == "gpu")
    pixels, labels, targets = read_by_hand(shards)
    chosen = np.array([40, 3, 17])
    (samples,) = store.fetch([chosen])
    assert samples.pixels.is_cuda
    assert (samples.pixels.cpu().numpy() == pixels[chosen]).all()
    assert (samples.labels.cpu().numpy() == labels[chosen]).all()
    assert (samples.targets.cpu().numpy() == targets[chosen]).all()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_a_gpu_without_room_leaves_the_pixels_in_host_memory(shards, monkeypatch, caplog):
    monkeypatch.setattr("modan_fast.store.GPU_SHARE", 0.0)
    store = open_store(open_shards(shards), device=torch.device("cuda", 0), batch_size=8, threads=1)
    assert isinstance(store, InMemoryStore)
    assert not store.pixels.is_cuda
    assert "not on the GPU" in caplog.text


RANK = """
import logging, os, sys
import numpy as np
import torch
from modan_fast import store
from modan_fast.ranks import joined
from modan_fast.shards import ShardSet, open_shards

logging.basicConfig(level="INFO", format="%(message)s", stream=sys.stdout)
folder, damaged = sys.argv[1:]
read, reading = [], ShardSet.read
ShardSet.read = lambda *asked: read.append(asked[1]) or reading(*asked)


def fill(what, ranks, folder=folder, tier="auto"):
    read.clear()
    print("==", what)
    try:
        made = store.open_store(
            open_shards(folder), tier=tier, device=torch.device("cpu"), batch_size=8, threads=1, ranks=ranks
        )
    except Exception as error:
        print(type(error).__name__, error)
        return
    print(made.tier, "read", sorted(read))
    arrays = (each.numpy() for each in (made.pixels, made.labels, made.targets))
    np.savez(f"{what}-{ranks.rank}", **dict(zip(("pixels", "labels", "targets"), arrays)))
    ranks.all(None)
    made.labels[ranks.rank].fill_(7 + ranks.rank)
    ranks.all(None)
    print("sees", int(made.labels[0, 0]), int(made.labels[1, 0]))


with joined("cpu") as ranks:
    fill("shared", ranks)
    fill("damaged", ranks, damaged)
    budget = store.pixel_budget
    if ranks.rank == 1:
        store.pixel_budget = lambda tier, device: (10, 10)
    fill("no room", ranks, tier="host")
    store.pixel_budget = budget
    if hasattr(os, "memfd_create"):
        del os.memfd_create
    fill("no sharing", ranks)
"""


@pytest.fixture(scope="module")
def of_ranks(shards, tmp_path_factory):
    """What each of two ranks says when they fill stores together, by the kind of store; and where they save them."""
    folder = tmp_path_factory.mktemp("ranks")
    damaged = shutil.copytree(shards, folder / "damaged")
    content = bytearray((damaged / "shard-000002.tar").read_bytes())
    content[5000] ^= 1
    (damaged / "shard-000002.tar").write_bytes(content)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    both = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    started = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, str(shards), str(damaged)],
            env={**os.environ, **both, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=folder,
        )
        for rank in range(2)
    ]
    said = [process.communicate(timeout=200) for process in started]
    assert [process.returncode for process in started] == [0, 0], said
    parts = [dict(part.split("\n", 1) for part in out.split("== ")[1:]) for out, _ in said]
    return folder, {what: [part[what] for part in parts] for what in parts[0]}


def check_saved(folder, what, shards):
    for rank in range(2):
        with np.load(folder / f"{what}-{rank}.npz") as saved:
            for name, expected in zip(("pixels", "labels", "targets"), read_by_hand(shards), strict=True):
                assert (saved[name] == expected).all()


@pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="Linux only")
def test_the_ranks_of_a_machine_fill_one_store_between_them(of_ranks, shards):
    folder, said = of_ranks
    assert "host read [0]\n" in said["shared"][0]
    assert "host read [1, 2]\n" in said["shared"][1], "each decodes a share"
    assert all("sees 7 8" in each for each in said["shared"]), "the memory is one"
    check_saved(folder, "shared", shards)


def test_ranks_that_cannot_share_memory_keep_a_copy_each_and_say_so(of_ranks, shards):
    folder, said = of_ranks
    for each in said["no sharing"]:
        assert "cannot share memory here, so each keeps all pixels" in each
        assert "host read [0, 1, 2]" in each
    assert "sees 7 0" in said["no sharing"][0] or "sees 7 1" in said["no sharing"][0]
    check_saved(folder, "no sharing", shards)


def test_a_rank_without_room_is_told_to_all(of_ranks):
    _, said = of_ranks
    for each in said["no room"]:
        assert "InputError `store=host`: 0.00 GiB of pixels are over" in each


def test_a_shard_that_one_rank_finds_damaged_ends_all_with_its_name(of_ranks):
    _, said = of_ranks
    first, second = said["damaged"]
    assert "InputError rank 1 of 2: " in first
    assert "shard-000002.tar has another SHA-256" in first
    assert "shard-000002.tar has another SHA-256" in second


def test_memory_that_ranks_share_is_counted_once_and_copies_are_counted(shards, monkeypatch):
    asked, manifest = [], open_shards(shards).manifest
    monkeypatch.setattr("modan_fast.store.check_room", lambda tier, size, device: asked.append(size))
    # Two ranks of one machine, of which only this one is here.
    two = Ranks(0, 2, 0, 2)
    monkeypatch.setattr(Ranks, "all", lambda self, value: [value] * self.size)
    store = read_all(open_shards(shards), renderer="torch", device=CPU, threads=1, ranks=two)
    assert len(store.pixels) == manifest.samples
    monkeypatch.setattr("modan_fast.store.share_memory", lambda size, ranks: None)
    read_all(open_shards(shards), renderer="torch", device=CPU, threads=1, ranks=two)
    assert asked == [manifest.samples * (48**2 + manifest.bits + 8) * copies for copies in (1, 2)]
