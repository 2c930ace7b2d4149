"""An archive with every form that a folder may have, and every kind of damaged file."""

import struct
import zlib

import numpy as np
import pytest
from PIL import Image


def picture(seed, *, size=(40, 30)):
    """A smooth grey image (rows, columns) uint8 of its own."""
    generator = np.random.default_rng(seed)
    return np.asarray(
        Image.fromarray(generator.integers(0, 256, (6, 5), np.uint8)).resize(size, Image.Resampling.BICUBIC)
    )


def save(path, seed, **settings):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(picture(seed)).save(path, **settings)


def bomb():
    """A PNG of some 60 bytes which declares 60000 x 60000 pixels."""
    header = struct.pack(">IIBBBBB", 60000, 60000, 8, 0, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(b"")), (b"IEND", b"")]
    parts = [struct.pack(">I", len(b)) + k + b + struct.pack(">I", zlib.crc32(k + b)) for k, b in chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


@pytest.fixture
def tree(tmp_path):
    """Ten images a folder: two in CT, one in MR, and RadImageNet's US folders without an anatomy level."""
    root = tmp_path / "archive"
    folders = ("CT/lung/Nodule", "CT/abd/normal", "MR/shoulder/ca++_tendinosis", "US/liver", "US/thyroid_nodule")
    for number, folder in enumerate(folders):
        for image in range(10):
            ending = "png" if image % 2 else "JPG"
            save(root / folder / f"{folder[:2]} {image}.{ending}", number * 100 + image)
    (root / "CT" / "Thumbs.db").write_bytes(b"x")
    (root / "RadiologyAI_train.csv").write_text("filename,label\n")
    return root


@pytest.fixture
def damaged(tree):
    """`tree` with five more images in CT/lung/Nodule that cannot be packed; maps their paths to the reasons."""
    folder = tree / "CT" / "lung" / "Nodule"
    save(folder / "whole.png", 1)
    save(folder / "whole.jpeg", 2)
    for name in ("whole.png", "whole.jpeg"):
        data = (folder / name).read_bytes()
        (folder / name.replace("whole", "cut")).write_bytes(data[: len(data) // 2])
        (folder / name).unlink()
    (folder / "text.png").write_text("no image at all")
    (folder / "empty.png").touch()
    (folder / "bomb.png").write_bytes(bomb())
    reasons = {
        "bomb.png": "declares over 67,108,864 pixels",
        "cut.jpeg": "truncated",
        "cut.png": "truncated",
        "empty.png": "empty file",
        "text.png": "not a PNG or JPEG image",
    }
    return tree, {f"CT/lung/Nodule/{name}": reason for name, reason in reasons.items()}
