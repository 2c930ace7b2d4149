"""What the store holds against what Pillow reads from the tars."""

import io
import json
import shutil
import tarfile
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from modan_fast.decode import dali_installed
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
def test_pixels_on_the_gpu_and_in_pinned_memory_are_those_of_the_tars(shards, tier):
    store = read_all(open_shards(shards), tier=tier, device=torch.device("cuda", 0), threads=2)
    assert store.pixels.is_cuda == (tier == "gpu")
    assert store.pixels.is_pinned() == (tier == "host")
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
    assert store.pixels.is_pinned()
    assert "not on the GPU" in caplog.text
