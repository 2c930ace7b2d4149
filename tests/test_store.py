"""What the store holds against what Pillow reads from the tars."""

import io
import json
import shutil
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

from modan_fast.shards import open_shards
from modan_fast.store import dali_installed, open_store
from shard_builder.build import BuildOptions, build
from shard_builder.settings import InputError

RENDERERS = ["torch", pytest.param("dali", marks=pytest.mark.skipif(not dali_installed(), reason="no DALI here"))]
CPU = torch.device("cpu")


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
    store = open_store(
        open_shards(tmp_path / "set"),
        renderer=renderer,
        device=CPU,
        threads=2,
        report=lambda stage, done, total, note="": seen.append((stage, done, total)),
    )
    pixels, labels, targets = read_by_hand(tmp_path / "set")
    assert (store.pixels.numpy() == pixels).all()
    assert (store.labels.numpy() == labels).all()
    assert (store.targets.numpy() == targets).all()
    assert ("decoding", 48, 48) in seen


def test_a_shard_whose_bytes_changed_is_named(shards, tmp_path):
    damaged = shutil.copytree(shards, tmp_path / "set")
    content = bytearray((damaged / "shard-000001.tar").read_bytes())
    content[5000] ^= 1
    (damaged / "shard-000001.tar").write_bytes(content)
    with pytest.raises(InputError, match="shard-000001.tar"):
        open_store(open_shards(damaged), device=CPU, threads=1)


def test_pixels_that_do_not_fit_are_refused_with_their_size(shards, tmp_path):
    vast = shutil.copytree(shards, tmp_path / "set")
    manifest = json.loads((vast / "manifest.json").read_text())
    manifest["size"] = 2_000_000  # 48 images of 4 TB
    (vast / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(InputError, match="GiB of pixels do not fit"):
        open_store(open_shards(vast), device=CPU, threads=1)


@pytest.mark.skipif(torch.cuda.is_available(), reason="only where there is no GPU")
def test_a_gpu_store_without_a_gpu_is_refused(shards):
    with pytest.raises(InputError, match="--store gpu needs a GPU"):
        open_store(open_shards(shards), tier="gpu", device=CPU, threads=1)
