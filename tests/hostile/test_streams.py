"""Shards from strangers, with checksums that fit: a stream gives the samples of the manifest, or one line."""

import hashlib
import io
import random
import struct
import tarfile

import numpy as np
import pytest
from PIL import Image

from modan_fast.shards import ShardSet
from modan_fast.stream import Stream
from shard_builder.manifest import Manifest, Shard
from shard_builder.writer import Sample, write_shard

SIZE, COUNT = 16, 4
NUMBERS = (
    b"",
    b"\0" * 12,
    b"-0000000001\0",
    b"77777777777\0",
    b"\x80" + bytes(10) + b"\1",
    b"\xff" * 12,
    b"0x10",
    b"1_0",
)
NUMBERS += (b"+1", b"99999999999\0", b"nan", b"1e3", "٣".encode(), b" 7 7 ", b"00000000000\0", b"00000001000\0")
NAMES = (
    b"",
    b"/etc/passwd",
    b"../00000000.png",
    b"00000001.png",
    b"00000000.PNG",
    b"\x1b[2J",
    b"0" * 100,
    "٠.png".encode(),
)
NAMES += (
    b"./00000000.png",
    b"00000000.png/",
    b"\xff\xfe",
    b"00000000.png.png",
    b"@LongLink",
    b"pax_global_header",
)
TYPES = [bytes([each]) for each in (*b"1234567LKSgxXDMNV", 0, 255)]


def whole_shard(folder):
    """The bytes of a shard of four samples."""
    pixels = np.arange(SIZE * SIZE, dtype=np.uint8).reshape(SIZE, SIZE)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "png")
    sample = Sample(file.getvalue(), np.array([1, 0], np.uint8), 1, {"fields": {}, "class": "b", "source": "x"})
    write_shard(folder / "shard-000000.tar", [sample] * COUNT, first=0, extension="png")
    return (folder / "shard-000000.tar").read_bytes()


def structured(whole, rng):
    """The shard with one field of one header, or one member's content, replaced by a hostile value."""
    with tarfile.open(fileobj=io.BytesIO(whole)) as opened:
        members = opened.getmembers()
    member, content = rng.choice(members), bytearray(whole)
    field = rng.choice(["name", "size", "type", "magic", "prefix", "content", "content", "content"])
    if field == "content":
        at, size = member.offset_data, member.size
        value = rng.choice(
            [b"\xff" * 8, b"\0" * 8, b"\2" * 8, struct.pack(">II", 60_000, 60_000), rng.randbytes(8)]
        )
        at += rng.choice([0, 16]) if size > 24 else 0
        content[at : at + min(8, size)] = value[: min(8, size)]
    else:
        at, width, values = {
            "name": (0, 100, NAMES),
            "size": (124, 12, NUMBERS),
            "type": (156, 1, TYPES),
            "magic": (257, 8, (b"", b"ustar  \0", b"\xff" * 8)),
            "prefix": (345, 155, (b"/", b"..", b"\xff" * 155)),
        }[field]
        content[member.offset + at : member.offset + at + width] = rng.choice(values).ljust(width, b"\0")[:width]
    return bytes(content)


def mutated(whole, rng):
    """The shard with damage that knows nothing of tars."""
    content = bytearray(whole)
    start, end = sorted(rng.randrange(len(content)) for _ in range(2))
    kind = rng.randrange(7)
    if kind == 0:
        for _ in range(rng.choice([1, 8, 64])):
            content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    elif kind == 1:
        del content[start:]
    elif kind == 2:
        del content[start:end]
    elif kind == 3:
        content[start:start] = rng.randbytes(rng.choice([1, 512, 10_000]))
    elif kind == 4:
        content[end:end] = content[start:end]
    elif kind == 5:
        content[start:end] = bytes(end - start)
    else:
        start -= start % 512
        del content[start : start + 512]
    return bytes(content)


@pytest.mark.parametrize("checksums", [False, True], ids=["by offset", "whole"])
def test_a_shard_gives_its_samples_or_one_line(survives, tmp_path_factory, checksums):
    folder = tmp_path_factory.mktemp("whole")
    rng, whole = random.Random(0), whole_shard(folder)
    index = (folder / "shard-000000.idx").read_bytes()
    cases = [
        whole,
        b"",
        b"\0" * 10_240,
        b"\xef\xbb\xbf" + whole,
        whole.decode("latin-1").encode("utf-16"),
        whole * 2,
    ]
    cases += [make(whole, rng) for _ in range(1000) for make in (structured, mutated)]

    def write(content, folder):
        (folder / "shard-000000.tar").write_bytes(content)
        (folder / "shard-000000.idx").write_bytes(index)

    def use(folder):
        content = (folder / "shard-000000.tar").read_bytes()
        shard = Shard("shard-000000.tar", COUNT, len(content), hashlib.sha256(content).hexdigest())
        manifest = Manifest(COUNT, SIZE, "png", {"f": ["a", "b"]}, ["a", "b"], [shard], [], {})
        opened = ShardSet(str(folder), manifest, "")
        stream = Stream(opened, renderer="torch", batch_size=COUNT, threads=1, whole=checksums)
        (batch,) = stream.fetch_first(COUNT)
        assert batch.pixels.shape == (COUNT, SIZE, SIZE)
        assert batch.labels.shape == (COUNT, 2)
        assert batch.labels.max() <= 1
        assert 0 <= batch.targets.min() <= batch.targets.max() <= 1

    accepted, refused = survives(cases, write, use)
    print(f"accepted {accepted}, refused {refused}")
    assert accepted > 50
    assert refused > 1000
