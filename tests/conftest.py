"""What several test modules share: a small archive, a shard set made of it, and the real data's folder."""

import os
from pathlib import Path

# Before torch is imported: on images this small its threads cost more than they bring, most of all when several
# programs share the cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pytest
import torch
from hypothesis import settings
from PIL import Image

from shard_builder.build import build
from shard_builder.options import BuildOptions

# How long an example takes is the machine's affair.
settings.register_profile("unhurried", settings.get_profile(settings.get_current_profile_name()), deadline=None)
settings.load_profile("unhurried")

TREE = ("CT/lung/Nodule", "CT/abd/mass", "MR/brain/glioma", "US/liver")


def pytest_runtest_setup():
    """Undo what a library did to torch's threads in the test before: numba, under UMAP, sets their number."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def archive(tmp_path_factory):
    """A tree of 4 classes with 12 images each; a class has its own texture, so that it can be learnt."""
    root = tmp_path_factory.mktemp("archive")
    generator = np.random.default_rng(0)
    rows, columns = np.mgrid[:48, :48]
    for number, folder in enumerate(TREE):
        (root / folder).mkdir(parents=True)
        for image in range(12):
            phase, noise = generator.uniform(0, 6), generator.normal(0, 20, (48, 48))
            wave = np.sin(rows * (0.2 + 0.3 * number) + columns * 0.4 * (number % 2) + phase)
            pixels = (128 + 80 * wave + noise).clip(0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(root / folder / f"{image:03}.png")
    return root


@pytest.fixture(scope="session")
def shards(archive, tmp_path_factory):
    """The archive as a shard set of 48 images on a canvas of 48 pixels, in several shards."""
    out = tmp_path_factory.mktemp("sets") / "shards"
    build(archive, out, BuildOptions(size=48, workers=1, samples_per_shard=20))
    return out


@pytest.fixture(scope="session")
def real_data():
    """The folder of real images that MODAN_TEST_DATA names."""
    if "MODAN_TEST_DATA" not in os.environ:
        pytest.skip(
            "real images are not at hand: set MODAN_TEST_DATA to a folder with radiology/, dicom/ and downstream/"
        )
    return Path(os.environ["MODAN_TEST_DATA"])


@pytest.fixture
def make_task_folder(tmp_path):
    """A task of two class folders with 10 images each; malignant images are brighter."""
    noise = np.random.default_rng(1).integers(0, 100, (20, 40, 36), dtype=np.uint8)
    for number, pixels in enumerate(noise):
        folder = tmp_path / "task" / ("benign", "malignant")[number % 2]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels + np.uint8(100 * (number % 2))).save(folder / f"{number:02}.png")
    return tmp_path / "task"
