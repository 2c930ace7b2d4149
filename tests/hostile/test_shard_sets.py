"""Shard sets from strangers: manifests, indices and tars that lie, and files that are no files."""

import copy
import hashlib
import io
import json
import os
import random
import socket
import struct
import tarfile
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from modan_fast.shards import ShardSet, open_shards
from modan_fast.stream import Stream
from shard_builder import inspect as inspecting
from shard_builder import manifest as manifests
from shard_builder.build import build
from shard_builder.index import format_index, parse_index
from shard_builder.inspect import describe, read_contents
from shard_builder.manifest import Manifest
from shard_builder.options import BuildOptions
from shard_builder.settings import InputError, printable
from shard_builder.sheet import strips, write_sheet
from shard_builder.verify import verify

SIZE = 8
DEEP = b"[" * 100_000 + b"]" * 100_000
ESCAPE = "\x1b]0;owned\x07\x1b[2J"

# As JSON, so that also values which Python would not write can be among them.
VALUES = [
    *("null", "true", "false", "0", "-1", "1", "2", "1.0", "0.5", "NaN", "Infinity", "-Infinity", "1e999", "-0"),
    *(str(2**31), str(2**63 - 1), str(2**63), str(-(2**63)), "1" + "0" * 400, "1" + "0" * 5000),
    *(
        '""',
        '" "',
        '"."',
        '".."',
        '"../../etc/passwd"',
        '"/etc/passwd"',
        '"C:\\\\x"',
        '"a/b"',
        '"shard-000000.tar"',
    ),
    *(
        '"shard-000000.tar\\n"',
        '"shard-../x.tar"',
        '"\\u0000"',
        '"\\ud800"',
        '"\\udcff"',
        '"\\u202ex"',
        '"%s{0}$x"',
    ),
    *(
        json.dumps(ESCAPE),
        json.dumps("x" * 100_000),
        '"<script>"',
        '"=cmd()"',
        '"\\\\input{x}"',
        '"[red]x[/]"',
        '"🦴"',
    ),
    *(
        "[]",
        "{}",
        "[[]]",
        '[""]',
        '["a", "a"]',
        '["b", "a"]',
        '[null, "a"]',
        '{"": ""}',
        '{"a": ["b"]}',
        "[1e308]",
    ),
    *("[" * 900 + "]" * 900, "[" * 980 + "]" * 980, '{"a":' * 990 + "1" + "}" * 990, DEEP.decode()),
]


@pytest.fixture(scope="module", params=["png", "jpeg", "raw"])
def codec(request):
    return request.param


@pytest.fixture(scope="module")
def whole(archive, tmp_path_factory):
    """The files of a set of four images in one shard, by codec and name."""
    sets = {}
    for codec in ("png", "jpeg", "raw"):
        folder = tmp_path_factory.mktemp("whole") / "set"
        build(archive, folder, BuildOptions(size=SIZE, codec=codec, workers=1, per_class=1))
        sets[codec] = {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix != ".html"}
    return sets


laid = {}  # what `lay` has written, by path: to write a file takes longer than most tests of it


def lay(files, folder):
    """Make `folder` hold these files: bytes, or a function that makes something at a path."""
    for name, content in files.items():
        path = folder / name
        if callable(content):
            path.unlink(missing_ok=True)
            content(path)
        elif laid.get(path) is not content:
            path.write_bytes(content)
        laid[path] = content


def read_all(folder):
    """Everything that reads a set; raises what the first of them raises."""
    open_shards(folder)
    contents = read_contents(folder)
    said = describe(contents)
    assert all(printable(line) == line for line in said.split("\n"))
    return contents


def checked(folder):
    """The damage that `verify` finds, each a line that commands no terminal."""
    found = verify(folder, workers=1).damage
    assert all(line and printable(line) == line for line in found)
    return found


def mutations(data, count, seed):
    """`count` changes of bytes: flips, cuts, insertions, repeats, other encodings."""
    generator = random.Random(seed)
    text = data.decode("latin-1")
    yield from (b"", b"\xef\xbb\xbf" + data, text.encode("utf-16"), text.encode("utf-32"), bytes(len(data)))
    yield from (data + data, data + b"\0", b"\0" + data, data[::-1], data + bytes(10**6), b"\xff" * 1000, DEEP)
    for _ in range(count - 12):
        at, length = generator.randrange(len(data)), generator.choice([1, 1, 2, 5, 50, 500])
        some = bytes(generator.choice([0, 10, 32, 34, 45, 48, 57, 91, 123, 128, 255]) for _ in range(length))
        yield generator.choice(
            [
                data[:at] + bytes([data[at] ^ 1 << generator.randrange(8)]) + data[at + 1 :],
                data[:at],
                data[:at] + some + data[at:],
                data[:at] + some + data[at + length :],
                data[:at] + data[at + length :],
                data[:at] + data[at : at + length] * generator.choice([2, 3, 100]) + data[at + length :],
            ]
        )


def some(cases, count, *, seed=0):
    """`count` of these cases, always the same ones: a case takes some milliseconds."""
    cases = list(cases)
    return random.Random(seed).sample(cases, min(count, len(cases)))


def places(value, at=()):
    """The path of keys to every value in a JSON value."""
    yield at
    for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield from places(value[key], (*at, key))


def changed(value, at, new):
    """A copy of `value` as JSON text, with the text `new` in place of what is at this path."""
    mark = "@@HERE@@"
    if not at:
        return new.encode()
    value = copy.deepcopy(value)
    inner = value
    for key in at[:-1]:
        inner = inner[key]
    inner[at[-1]] = mark
    return json.dumps(value).replace(f'"{mark}"', new).encode()


def hostile_manifests(files):
    valid = json.loads(files["manifest.json"])
    for at in places(valid):
        for new in VALUES:
            yield changed(valid, at, new)
        if at:  # missing, renamed, twice, with something more
            inner = lesser = copy.deepcopy(valid)
            for key in at[:-1]:
                inner = inner[key]
            kept = inner.pop(at[-1])
            yield json.dumps(lesser).encode()
            if isinstance(inner, dict):
                inner["\ud800"] = kept
                yield json.dumps(lesser).encode()
                key = json.dumps(at[-1])
                yield json.dumps(valid).replace(f"{key}: ", f"{key}: 1e5, {key}: ", 1).encode()


def test_no_manifest_makes_a_reader_do_more_than_refuse_it(whole, survives):
    files = whole["png"]
    cases = [*some(hostile_manifests(files), 1100), *mutations(files["manifest.json"], 950, seed=1)]

    def use(folder):
        try:
            damage = checked(folder)
        except InputError:
            damage = ["refused"]
        contents = read_all(folder)
        # What is accepted is no more than the files beside it hold.
        assert contents.manifest.samples == 4
        assert contents.manifest.size == SIZE or damage

    accepted, refused = survives(cases, lambda case, folder: lay({**files, "manifest.json": case}, folder), use)
    assert len(cases) >= 2000
    assert accepted > 100, "names, reasons and options may be any text"
    assert refused > 1000


def hostile_indices(text):
    lines = text.decode().splitlines()
    words = [
        *("-1", "0", "1", "512", "511", "513", "+5", "0x5", "5_0", "1e3", "nan", "٣", "", " ", "\t", "\0", ESCAPE)
    ]
    words += [
        str(2**31),
        str(2**63),
        "9" * 18,
        "9" * 19,
        "9" * 5000,
        "x" * 100_000,
        "/etc/passwd",
        "../x",
        "\u202e",
    ]
    words += [
        "00000000.png",
        "png",
        "labels",
        "target",
        "json",
        "00000001.json",
        "a\nb",
        "a\r",
        "\x0c",
        "\u2028",
        "v1.2",
    ]
    for number, line in enumerate(lines):
        parts = line.split(" ")
        for at in range(len(parts)):
            for word in words:
                new = " ".join([*parts[:at], word, *parts[at + 1 :]])
                yield "\n".join([*lines[:number], new, *lines[number + 1 :], ""]).encode()
            yield "\n".join(
                [*lines[:number], " ".join(parts[:at] + parts[at + 1 :]), *lines[number + 1 :], ""]
            ).encode()
    for order in (
        lines[::-1],
        lines[:1] + lines[:0:-1],
        lines + lines[1:],
        lines[:1] + lines[1:2] * (len(lines) - 1),
    ):
        yield "\n".join([*order, ""]).encode()
    yield b"v1.2 4\n" * 10_000
    yield b"\n" * 10**6
    yield b"v1.2 4\n" + b" " * 10**7 + b"\n\n\n\n"


def test_any_index_but_the_written_one_is_damage_and_readers_stay_within_the_tar(whole, survives):
    files, name = whole["png"], "shard-000000.idx"
    written = files[name]
    cases = [*some(hostile_indices(written), 1100), *mutations(written, 950, seed=2)]
    cases = [case for case in cases if case != written]

    def use(folder):
        (line,) = checked(folder)
        assert line.startswith("shard-000000.tar: ")
        read_all(folder)

    accepted, refused = survives(cases, lambda case, folder: lay({**files, name: case}, folder), use)
    assert len(cases) >= 2000
    assert accepted > 0, "a quick reader looks at labels and targets alone"
    assert refused > 1000


def test_no_index_leads_a_stream_to_anything_but_its_samples(whole, survives, tmp_path_factory):
    files, name = whole["png"], "shard-000000.idx"
    written = files[name]
    lay(files, folder := tmp_path_factory.mktemp("right"))
    (right,) = streamed(open_shards(folder))
    cases = [*some(hostile_indices(written), 1100), *mutations(written, 950, seed=2)]
    opened = open_shards(folder).manifest

    def use(folder):
        # Opened without a look at the index, as one that is exchanged afterwards.
        (batch,) = streamed(ShardSet(str(folder), opened, ""))
        for ours, theirs in (
            (batch.pixels, right.pixels),
            (batch.labels, right.labels),
            (batch.targets, right.targets),
        ):
            assert torch.equal(ours, theirs)

    accepted, refused = survives(cases, lambda case, folder: lay({**files, name: case}, folder), use)
    print(f"accepted {accepted}, refused {refused}")
    assert len(cases) >= 2000
    assert accepted > 100, "a stream needs no more of an index than where the images are"
    assert refused > 500


def streamed(opened):
    """The one batch of a set of four images, read by offsets."""
    return list(Stream(opened, renderer="torch", batch_size=4, threads=1).fetch_first(4))


def header(info, **changes):
    """A tar header with some of its fields replaced by bytes, and a right checksum."""
    block = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    fields = {"name": (0, 100), "mode": (100, 8), "uid": (108, 8), "size": (124, 12), "mtime": (136, 12)}
    fields |= {"type": (156, 1), "linkname": (157, 100), "magic": (257, 8), "prefix": (345, 155)}
    for field, value in changes.items():
        start, length = fields[field]
        block[start : start + length] = value[:length].ljust(length, b"\0")
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


SIZES = [
    b"77777777777\0",
    b"-0000000001\0",
    b"00000000000\0",
    b"           \0",
    b"99999999999\0",
    b"0x000000010\0",
]
SIZES += [
    b"\x80" + bytes(10) + b"\x08",
    b"\xff" * 12,
    b"\x80" + b"\xff" * 11,
    b"\x80\0\0\0\x7f" + b"\xff" * 7,
    b"\0" * 12,
]
NAMES = [b"/etc/passwd", b"../../etc/passwd", b"..", b".", b"", b"00000000", b"00000001.png", b"a\nb", b"\x1b[2J"]
NAMES += [b"\xff\xfe", b"x" * 100, b"C:\\x", b"00000000.png/", b"00000000.eps", b"-rf", b"\xe2\x80\xae", b"%s"]
PAX = [
    b"19 path=/etc/passwd\n",
    b"20 size=-1\n",
    b"40 size=99999999999999999999999999\n",
    b"9" * 10**6,
    b"\0" * 10**6,
]
PAX += [
    b"25 GNU.sparse.major=1\n30 GNU.sparse.realsize=1099511627776\n",
    b"20 path=" + b"a" * 10**6,
    b"5 x=\n" * 10**5,
]


def members_of(tar):
    """Names and contents of a tar's members."""
    with tarfile.open(fileobj=io.BytesIO(tar)) as opened:
        return [(each.name, opened.extractfile(each).read()) for each in opened]


def tar_of(members):
    """A tar of (header block, content) pairs, ended as the format asks."""
    file = b"".join(head + data + bytes(-len(data) % 512) for head, data in members)
    return file + bytes(1024 + -(len(file) + 1024) % tarfile.RECORDSIZE)


def plain(name, data):
    info = tarfile.TarInfo(name)
    info.size = len(data)
    return header(info, magic=b"ustar\x0000"), data


def hostile_headers(tar):
    """Each member's header replaced, doubled, moved or dropped; and extension headers before each."""
    members = [plain(*each) for each in members_of(tar)]
    assert tar_of(members) == tar, "the tests write the same tar as the builder"
    for number, (_, data) in enumerate(members):
        info = tarfile.TarInfo(members_of(tar)[number][0])
        info.size = len(data)
        changes = [{"size": size} for size in SIZES] + [{"name": name} for name in NAMES]
        changes += [
            {"type": kind, "linkname": b"/etc/passwd"} for kind in (b"1", b"2", b"3", b"4", b"5", b"6", b"7")
        ]
        changes += [{"type": kind} for kind in (b"S", b"L", b"K", b"x", b"g", b"V", b"M", b"\xff", b"\0")]
        changes += [{"mode": b"0004777\0"}, {"uid": b"\xff" * 8}, {"mtime": b"\xff" * 12}, {"prefix": b"/etc"}]
        changes += [{"magic": b"ustar  \0"}, {"magic": b"\0" * 8}]
        for change in changes:
            new = header(info, **{"magic": b"ustar\x0000", **change})
            yield tar_of([*members[:number], (new, data), *members[number + 1 :]])
        for kind in (b"x", b"g", b"L", b"K"):
            for content in PAX:
                extra = tarfile.TarInfo("pax")
                extra.size = len(content)
                before = (header(extra, type=kind), content)
                yield tar_of([*members[:number], before, *members[number:]])
        yield tar_of(members[:number] + members[number + 1 :])
        yield tar_of([*members[: number + 1], *members[number:]])
        yield tar_of([*members, members[number]])
        yield tar_of([members[number], *members[:number], *members[number + 1 :]])


def with_tar(files, tar, *, fitting):
    """The files of a set with another first tar; if `fitting`, the manifest has its size and hash."""
    files = {**files, "shard-000000.tar": tar}
    if fitting:
        found = json.loads(files["manifest.json"])
        found["shards"][0] |= {"bytes": len(tar), "sha256": hashlib.sha256(tar).hexdigest()}
        files["manifest.json"] = json.dumps(found).encode()
    return files


def test_any_tar_but_the_written_one_is_damage_unless_all_agrees(whole, survives):
    files = whole["png"]
    tar, old = files["shard-000000.tar"], members_of(files["shard-000000.tar"])
    cases = [*some(hostile_headers(tar), 1100), *mutations(tar, 950, seed=3)]
    cases = [(case, fitting) for case in cases if case != tar for fitting in (False, True)]

    def use(folder):
        damage = checked(folder)
        assert all(line.startswith("shard-000000.tar: ") for line in damage)
        if not damage:  # only what a sample says of itself may be another
            now = members_of((folder / "shard-000000.tar").read_bytes())
            assert [each for each in now if "json" not in each[0]] == [
                each for each in old if "json" not in each[0]
            ]
        read_all(folder)

    accepted, refused = survives(
        some(cases, 2100), lambda case, folder: lay(with_tar(files, case[0], fitting=case[1]), folder), use
    )
    assert len(cases) >= 2000
    assert refused > 100
    assert accepted > 100, "a quick reader looks at labels and targets alone"


def png(width, height, *, bits=8, colour=0, rows=b"", more=b""):
    """A PNG file with any header, whatever its rows."""
    head = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    chunks = [(b"IHDR", head), *more, (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(b)) + k + b + struct.pack(">I", zlib.crc32(k + b)) for k, b in chunks
    )


def as_file(mode, size, kind, **settings):
    file = io.BytesIO()
    Image.new(mode, size).save(file, kind, **settings)
    return file.getvalue()


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n(owned) print\nshowpage\n"


def hostile_images():
    yield from (b"", b"\0", b"\0" * 64, b"\0" * 63, b"\0" * 65, b"\0" * 10**6, EPS, b"<svg onload='x'/>", DEEP)
    for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "I;16"):
        for size in ((8, 8), (1, 64), (64, 1), (7, 8), (9, 9), (4000, 4000)):
            if mode != "I;16" or size == (8, 8):
                yield as_file(mode, size, "PNG")
    for kind in ("JPEG", "BMP", "GIF", "TIFF", "PPM", "ICO", "PCX", "TGA", "SGI", "IM", "WEBP", "JPEG2000"):
        yield as_file("L" if kind != "ICO" else "RGB", (8, 8), kind)
    for side in (60_000, 2**31 - 1, 2**32 - 1, 0):
        yield png(side, side)
        yield png(8, side)
    yield png(8, 8, rows=bytes(2 * 10**8))  # 200 MB in 200 kB
    bomb = zlib.compress(bytes(2 * 10**8))
    for kind in (b"zTXt", b"iTXt", b"iCCP"):
        yield png(8, 8, rows=bytes(72), more=[(kind, b"a\0\0" + (b"\0\0\0" if kind == b"iTXt" else b"") + bomb)])
    yield png(8, 8, rows=bytes(72), more=[(b"teXt", b"")] * 100_000) + b"trailing"
    yield png(8, 8, rows=bytes(72), more=[(b"acTL", b"\xff" * 8)])
    yield png(8, 8, rows=bytes(72), more=[(b"tRNS", b"\0")])


def contents_of_members(files, codec):
    """(member's ending, new content) pairs that lie in the member alone."""
    members = dict(members_of(files["shard-000000.tar"]))
    image = {"png": "png", "jpeg": "jpg", "raw": "raw"}[codec]
    valid = {ending: members[f"00000001.{ending}"] for ending in (image, "labels", "target", "json")}
    labels = len(valid["labels"])
    for at in range(labels):
        for value in (2, 48, 49, 128, 255, 1 - valid["labels"][at]):
            yield "labels", valid["labels"][:at] + bytes([value]) + valid["labels"][at + 1 :]
    for length in (0, 1, labels - 1, labels + 1, 10 * labels, 10**6):
        yield from (("labels", bytes([value]) * length) for value in (0, 1, 255))
    for value in (-1, -(2**31), 2**31 - 1, 4, 5, 100, 1 - valid["target"][0]):
        yield "target", struct.pack("<i", value)
        yield "target", struct.pack(">i", value)
    yield from (("target", valid["target"][:length]) for length in range(4))
    yield from (("target", valid["target"] + bytes(more)) for more in (1, 4, 10**6))
    found = json.loads(valid["json"])
    for at in places(found):
        yield from (("json", changed(found, at, new)) for new in VALUES)
    yield from (("json", case) for case in mutations(valid["json"], 600, seed=4))
    yield from ((image, case) for case in mutations(valid[image], 500, seed=5))
    yield from (("labels", case) for case in mutations(valid["labels"], 60, seed=6))


def test_members_that_lie_are_damage_though_tar_index_and_manifest_agree(whole, codec, survives):
    files = whole[codec]
    old = members_of(files["shard-000000.tar"])
    image = old[0][0].partition(".")[2]
    cases = [*some(contents_of_members(files, codec), 620), *((image, case) for case in hostile_images())]
    before = dict(old)

    def write(case, folder):
        ending, data = case
        new = [(name, data if name == f"00000001.{ending}" else content) for name, content in old]
        tar = tar_of([plain(*each) for each in new])
        lines = [list(line) for line in parse_index(files["shard-000000.idx"].decode())]
        offset = 0
        for number, (_, content) in enumerate(new):
            line = lines[number // 4]
            line[number % 4] = line[number % 4]._replace(offset=offset + 512, size=len(content))
            offset += 512 + len(content) + -len(content) % 512
        lay(with_tar({**files, "shard-000000.idx": format_index(lines).encode()}, tar, fitting=True), folder)

    def use(folder):
        if damage := checked(folder):
            assert damage[0].startswith("shard-000000.tar: 00000001."), damage
        contents = read_all(folder)
        assert contents.labels.max() <= 1
        assert len(list(strips(contents))) <= 4
        if not damage:  # a change of the pixels or the source alone leaves labels and classes as they were
            now = dict(members_of((folder / "shard-000000.tar").read_bytes()))
            assert now["00000001.labels"] == before["00000001.labels"]
            assert now["00000001.target"] == before["00000001.target"]

    accepted, refused = survives(cases, write, use)
    assert 3 * len(cases) >= 2000, "of three codecs"
    assert accepted > 100
    assert refused > 100


def fifo(path):
    os.mkfifo(path)


def bound_socket(path):
    with socket.socket(socket.AF_UNIX) as opened:
        before = Path.cwd()
        os.chdir(path.parent)  # a socket's path has at most 107 bytes
        opened.bind(path.name)
        os.chdir(before)


def link(to):
    return lambda path: path.symlink_to(to)


def folder_at(path):
    path.mkdir()


NO_FILES = [
    fifo,
    bound_socket,
    link("/dev/zero"),
    link("/dev/urandom"),
    link("/dev/tty"),
    link("/dev/stdin"),
    folder_at,
]
NO_FILES += [
    link("nowhere"),
    link("manifest.json/x"),
    link("shard-000000.idx"),
    link("/proc/kmsg"),
    link("/proc/self/mem"),
]


@pytest.mark.parametrize("make", NO_FILES, ids=lambda make: make.__qualname__)
@pytest.mark.parametrize("name", ["manifest.json", "shard-000000.idx", "shard-000000.tar"])
def test_a_pipe_a_device_or_a_circle_in_a_set_is_refused_at_once(whole, survives, name, make):
    if name == "shard-000000.idx" and make is NO_FILES[-3]:
        make = link("shard-000000.idx")  # to itself

    def use(folder):
        try:
            assert checked(folder)[0].startswith((name.replace("idx", "tar"), str(folder)))
        except InputError:
            assert name == "manifest.json"
        read_all(folder)

    assert survives([make], lambda case, folder: lay({**whole["png"], name: case}, folder), use) == (0, 1)


def sparse(size):
    def make(path):
        with open(path, "wb") as file:
            file.truncate(size)

    return make


@pytest.mark.parametrize("name", ["manifest.json", "shard-000000.idx", "shard-000000.tar"])
def test_a_file_of_a_tebibyte_without_content_is_refused_before_it_is_read(whole, survives, name):
    files = {**whole["png"], name: sparse(2**40)}
    if name.endswith("tar"):
        found = json.loads(files["manifest.json"])
        found["shards"][0] |= {"bytes": 2**40}
        files["manifest.json"] = json.dumps(found).encode()

    def use(folder):
        try:
            assert checked(folder)
        except InputError:
            assert name == "manifest.json"
        if not name.endswith("tar"):
            read_all(folder)

    tracemalloc.start()
    try:
        survives([files], lay, use)
        assert tracemalloc.get_traced_memory()[1] < 10**7
    finally:
        tracemalloc.stop()


def test_numbers_of_the_manifest_allocate_nothing_that_its_files_do_not_hold(whole, survives):
    """A small tar, index and manifest that agree on a hundred million samples with a thousand labels."""
    samples = 10**6
    found = json.loads(whole["png"]["manifest.json"])
    found["fields"] = {"a": sorted(str(number) for number in range(10**5))}
    found["shards"][0]["samples"] = found["samples"] = samples
    index = f"v1.2 {samples}\n".encode() + b"\n" * (samples - 1) + b"png 0 1 a\n"
    files = {**whole["png"], "manifest.json": json.dumps(found).encode(), "shard-000000.idx": index}
    assert survives([files], lay, read_all) == (0, 1)


def test_a_manifest_too_large_to_be_read_is_not_written(whole, tmp_path, monkeypatch):
    lay(whole["png"], tmp_path)
    manifest = Manifest.load(tmp_path)
    monkeypatch.setattr(manifests, "MAX_BYTES", 100)
    with pytest.raises(InputError, match="pass `duplicates='keep'`"):
        manifest.save(tmp_path)
    assert (tmp_path / "manifest.json").read_bytes() == whole["png"]["manifest.json"]
    with pytest.raises(InputError, match="over 0 MiB"):
        Manifest.load(tmp_path)
    with pytest.raises(InputError, match=r"https://x/manifest\.json is over 0 MiB"):
        Manifest.parse(whole["png"]["manifest.json"], "https://x/manifest.json")


def test_a_jpeg_of_countless_scans_is_refused_before_it_is_decoded():
    from shard_builder.image import ImageError, decode, open_stored

    data = as_file("L", (64, 64), "JPEG", progressive=True)
    at = data.rindex(b"\xff\xda")
    scan, end = data[at:-2], data[-2:]
    assert open_stored(data, "jpeg", 64).size == (64, 64)
    for read in (decode, lambda data: open_stored(data, "jpeg", 64)):
        with pytest.raises(ImageError, match="over 100 scans"):
            read(data[:at] + scan * 101 + end)


def test_an_image_of_another_format_starts_no_program(whole, tmp_path, monkeypatch):
    """Pillow would start Ghostscript for PostScript."""
    import subprocess

    started = []
    monkeypatch.setattr(subprocess, "check_call", lambda *command, **_: started.append(command))
    monkeypatch.setattr(subprocess, "Popen", lambda *command, **_: started.append(command))
    old = members_of(whole["png"]["shard-000000.tar"])
    image = EPS.ljust(len(old[0][1]), b"\n")
    tar = tar_of([plain(old[0][0], image[: len(old[0][1])]), *(plain(*each) for each in old[1:])])
    lay(with_tar(whole["png"], tar, fitting=True), tmp_path)
    with pytest.raises(InputError, match="modan-fast verify"):
        list(strips(read_contents(tmp_path)))
    assert "00000000.png: cannot be decoded as png" in checked(tmp_path)[0]
    assert not started


def test_names_of_a_set_cannot_command_a_terminal_or_fill_it(whole, tmp_path):
    found = json.loads(whole["png"]["manifest.json"])
    name, long = f"MR{ESCAPE}\n\u202e[red]", "z" * 10**6
    found["classes"] = sorted([*found["classes"][1:], long])
    found["fields"]["modality"][1] = name
    found["rejected"] = [{"source": name, "reason": f"{name}: {name}"}]
    lay({**whole["png"], "manifest.json": json.dumps(found).encode()}, tmp_path)
    contents = read_contents(tmp_path)
    said = describe(contents)
    assert len(said) < 20_000
    assert {"\x1b", "\x07", "\u202e"}.isdisjoint(said)
    assert "MR\\x1b]0;owned\\x07\\x1b[2J \\u202e[red]" in said
    write_sheet(tmp_path / "sheet.png", list(strips(contents)))
    assert Image.open(tmp_path / "sheet.png").width < 1000


def test_a_sheet_has_a_bounded_number_of_rows(whole, tmp_path, monkeypatch):
    lay(whole["png"], tmp_path)
    contents = read_contents(tmp_path)
    assert len(contents.groups(1)) == 4
    monkeypatch.setattr(inspecting, "MOST_GROUPS", 2)
    assert len(contents.groups(1)) == 2


def test_labels_of_one_byte_are_not_repeated_for_all_bits(whole, tmp_path):
    """numpy would spread a single byte over all bits of the sample."""
    index = whole["png"]["shard-000000.idx"].decode().splitlines()
    words = index[1].split(" ")
    words[words.index("labels") + 2] = "1"
    lay(
        {**whole["png"], "shard-000000.idx": "\n".join([index[0], " ".join(words), *index[2:], ""]).encode()},
        tmp_path,
    )
    with pytest.raises(InputError, match="modan-fast verify"):
        read_contents(tmp_path)
    assert np.array_equal(read_contents_of(whole["png"], tmp_path), read_contents_of(whole["png"], tmp_path))


def read_contents_of(files, folder):
    lay(files, folder)
    return read_contents(folder).labels
