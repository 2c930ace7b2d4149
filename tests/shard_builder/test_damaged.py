"""A hundred inputs that cannot be packed: each is listed, none stops the build, and memory stays bounded."""

import errno
import io
import os
import re
import struct
import subprocess
import sys
import tarfile
import time
import zlib
from contextlib import suppress
from pathlib import Path

import numpy as np
import psutil
import pytest
from PIL import Image

from shard_builder import image
from shard_builder.manifest import Manifest

# The most memory that a worker may take, even for a file of the most bytes and pixels allowed.
BOUND = 2**30


def file_of(picture, kind):
    file = io.BytesIO()
    picture.save(file, kind)
    return file.getvalue()


def png(width, height, bits, colour, row):
    """A small PNG file of any size: `height` equal rows of bytes."""
    deflate = zlib.compressobj(1)
    pixels = b"".join(deflate.compress(b"\0" + row) for _ in range(height)) + deflate.flush()
    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", pixels), (b"IEND", b""))
    packed = [struct.pack(">I", len(b)) + k + b + struct.pack(">I", zlib.crc32(k + b)) for k, b in chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(packed)


def declaring(data, side):
    """A small PNG file with another size in its header, and a right checksum of the header."""
    header = data[12:16] + struct.pack(">II", side, side) + data[24:29]
    return data[:12] + header + struct.pack(">I", zlib.crc32(header)) + data[33:]


def hundred(folder):
    """Make the files in `folder`; return the expected reason of each, name to pattern."""
    noise = Image.effect_noise((40, 40), 60)
    whole = {kind: file_of(noise, kind) for kind in ("PNG", "JPEG")}
    generator = np.random.default_rng(0)
    contents, expected = {}, {}

    def add(name, content, reason):
        contents[name], expected[name] = content, reason

    for number in range(20):
        for kind, ending in (("PNG", "png"), ("JPEG", "jpg")):
            data = whole[kind]
            cut = data[: len(data) * number // 20]
            add(f"cut {number}.{ending}", cut, "empty file|not a PNG or JPEG image|truncated|damaged")
    for number in range(20):
        data = bytearray(whole["PNG"])
        data[100 + 30 * number] ^= 1 << int(generator.integers(8))
        add(f"flipped {number}.png", bytes(data), "damaged: the checksum of its IDAT chunk is wrong")
    for number in range(5):
        add(f"zeros {number}.png", bytes(10**number), "not a PNG or JPEG image")
        add(f"nothing {number}.jpeg", b"", "empty file")
    for side in (8193, 9000, 12000, 30000, 60000, 2**31 - 1):
        add(f"declares {side}.png", declaring(whole["PNG"], side), "declares over 67,108,864 pixels|damaged")
    tar = io.BytesIO()
    with tarfile.open(fileobj=tar, mode="w") as opened:
        opened.addfile(tarfile.TarInfo("a.png"))
    others = {"tar": tar.getvalue(), "gif": file_of(noise, "GIF"), "tiff": file_of(noise, "TIFF")}
    others |= {"text": b"no image", "dicom": bytes(128) + b"DICM" + bytes(500), "bmp": file_of(noise, "BMP")}
    for name, data in others.items():
        add(f"{name}.png", data, "not a PNG or JPEG image")
    odd = [
        "a\nb.png",
        "a\tb.png",
        "größe.png",
        "图像.png",
        "'\"<b>&.png",
        "%s{0}.png",
        "-rf.png",
        "x" * 200 + ".png",
    ]
    for name in [*odd, os.fsdecode(b"caf\xe9.png")]:
        add(name, whole["PNG"][:200], "truncated")
    row = np.arange(4 * 8192, dtype=np.uint8).tobytes()
    # The largest that are packed: 256 MiB of RGBA, and 16 bits a pixel.
    contents["large.png"] = png(8192, 8192, 8, 6, row)
    contents["deep.png"] = png(8192, 8192, 16, 0, row[: 2 * 8192])
    for name, data in contents.items():
        (folder / name).write_bytes(data)
    with open(folder / "sparse.png", "wb") as file:
        file.truncate(image.MAX_BYTES)
    with open(folder / "too long.png", "wb") as file:
        file.truncate(image.MAX_BYTES + 1)
    os.mkfifo(folder / "pipe.png")
    for name, to in (
        ("self.png", "self.png"),
        ("one.png", "two.png"),
        ("two.png", "one.png"),
        ("gone.png", "nowhere"),
    ):
        (folder / name).symlink_to(to)
    (folder / "loop").symlink_to(".")
    (folder / "unreadable.png").symlink_to("/proc/self/mem")  # no size, and its first byte cannot be read
    expected |= {
        "sparse.png": "not a PNG or JPEG image",
        "too long.png": "over 256 MiB",
        "pipe.png": "not a file",
    }
    expected |= dict.fromkeys(("self.png", "one.png", "two.png", "gone.png"), "not a file")
    expected |= {"loop": "a link below", "unreadable.png": "empty file"}
    return expected


def most_memory(process):
    """The most bytes that the process, or any that it started, ever held; returns when it ends."""
    most = 0
    while process.poll() is None:
        with suppress(psutil.Error, OSError):  # one has just ended
            for each in [process, *psutil.Process(process.pid).children(recursive=True)]:
                found = re.search(r"VmHWM:\s+(\d+)", Path(f"/proc/{each.pid}/status").read_text())
                most = max(most, int(found[1]) * 1024 if found else 0)
        time.sleep(0.02)
    return most


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs /proc")
def test_a_hundred_damaged_inputs_are_all_listed_and_memory_stays_bounded(tree, tmp_path):
    folder = tree / "CT/lung/Nodule"
    expected = hundred(folder)
    assert len(expected) >= 100
    code = (
        "import sys; from pathlib import Path; from shard_builder import pack; from shard_builder.build import *\n"
        "pack.CHUNK = 16\n"
        "build(Path(sys.argv[1]), Path(sys.argv[2]), BuildOptions(per_class=0, size=24, workers=2))"
    )
    arguments = [sys.executable, "-c", code, str(tree), str(tmp_path / "set")]
    with subprocess.Popen(arguments, stderr=subprocess.PIPE, text=True) as process:
        most = most_memory(process)
        assert process.stderr.read() == ""
    assert process.returncode == 0
    manifest = Manifest.load(tmp_path / "set")
    assert manifest.samples == 50 + 2
    found = {each.source.removeprefix("CT/lung/Nodule/"): each.reason for each in manifest.rejected}
    as_shown = {"a\nb.png": "a\\nb.png", "a\tb.png": "a\\tb.png", os.fsdecode(b"caf\xe9.png"): "caf\\xe9.png"}
    assert found.keys() == {as_shown.get(name, name) for name in expected}
    for name, pattern in expected.items():
        assert re.match(pattern, found[as_shown.get(name, name)]), (name, found[as_shown.get(name, name)])
    # The two largest files show that the bound is met by design and not by luck.
    assert image.MAX_BYTES < most < BOUND


def test_an_error_in_the_middle_of_reading_a_file_is_its_reason(tmp_path, monkeypatch):
    class Failing(io.FileIO):
        def read(self, *_):
            raise OSError(errno.EIO, "Input/output error")

    (tmp_path / "a.png").write_bytes(b"x")
    monkeypatch.setattr("builtins.open", lambda path, _: Failing(path))
    with pytest.raises(image.ImageError, match="cannot be read: Input/output error"):
        image.read(tmp_path / "a.png")
