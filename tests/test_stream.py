"""Streaming: tars from folders, commands and servers, and what is said of those that are not what they should be."""

import contextlib
import gzip
import hashlib
import http.server
import io
import os
import shlex
import shutil
import struct
import subprocess
import sys
import tarfile
import threading
import time
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from modan_fast.decode import check_header, dali_installed
from modan_fast.shards import ShardSet, open_shards
from modan_fast.store import read_all
from modan_fast.stream import Stream
from shard_builder.build import build
from shard_builder.index import first_places
from shard_builder.manifest import Manifest
from shard_builder.options import BuildOptions
from shard_builder.settings import InputError
from shard_builder.writer import Sample, write_shard

RENDERERS = ["torch", pytest.param("dali", marks=pytest.mark.skipif(not dali_installed(), reason="no DALI here"))]
WAYS = pytest.mark.parametrize("whole", [False, True], ids=["by offset", "whole"])
PARTS = [np.array([47, 3, 20]), np.array([5]), np.array([21, 4])]


def stream(location, renderer="torch", **settings):
    return Stream(open_shards(location), renderer=renderer, batch_size=8, threads=2, **settings)


@contextlib.contextmanager
def served(folder):
    """The URL of `folder` on a server of this machine."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=folder)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def check(samples, shards, renderer="torch"):
    """Compare samples with those of a store in memory."""
    store = read_all(open_shards(shards), renderer=renderer, device=torch.device("cpu"), threads=1)
    assert [each.ids.tolist() for each in samples] == [part.tolist() for part in PARTS]
    for each in samples:
        assert torch.equal(each.pixels, store.pixels[each.ids])
        assert torch.equal(each.labels, store.labels[each.ids])
        assert torch.equal(each.targets, store.targets[each.ids])


@WAYS
@pytest.mark.parametrize("renderer", RENDERERS)
@pytest.mark.parametrize("codec", ["png", "jpeg", "raw"])
def test_samples_come_in_any_order_that_is_asked_for(archive, tmp_path, codec, renderer, whole):
    build(archive, tmp_path / "set", BuildOptions(size=48, codec=codec, workers=1, samples_per_shard=20))
    check(list(stream(tmp_path / "set", renderer, whole=whole).fetch(PARTS)), tmp_path / "set", renderer)


def test_a_folder_whose_name_means_something_in_a_url_is_read(shards, tmp_path):
    odd = shutil.copytree(shards, tmp_path / "100% of: a? #1 ä")
    check(list(stream(odd).fetch(PARTS)), shards)


@pytest.mark.skipif(shutil.which("cat") is None, reason="needs cat")
def test_a_command_that_prints_the_files_is_a_shard_set(shards):
    check(list(stream(f"pipe:cat {shlex.quote(str(shards))}/{{}}").fetch(PARTS)), shards)


def test_a_web_server_is_a_shard_set(shards):
    with served(shards) as url:
        check(list(stream(url).fetch(PARTS)), shards)
        everything = read_all(open_shards(url), renderer="torch", device=torch.device("cpu"), threads=1)
        assert len(everything.pixels) == 48


@WAYS
def test_only_the_shards_that_are_needed_are_read(shards, tmp_path, whole):
    part = shutil.copytree(shards, tmp_path / "set")
    opened = open_shards(part)
    (part / "shard-000001.tar").unlink()  # samples 20 to 39
    few = Stream(opened, renderer="torch", batch_size=8, threads=1, whole=whole)
    assert [each.ids.tolist() for each in few.fetch([np.array([41, 7])])] == [[41, 7]]
    with pytest.raises(InputError, match=r"shard-000001.tar cannot be read \(No such file or directory\)"):
        list(few.fetch([np.array([20])]))


@pytest.mark.parametrize("location", ["pipe:false {}", "nosuchscheme://a/b"])
def test_a_url_without_a_shard_set_is_refused(location, monkeypatch):
    monkeypatch.setattr("modan_fast.remote.PAUSES", (0.01,))
    with pytest.raises(InputError, match=r"manifest.json cannot be read: "):
        open_shards(location)


def test_a_command_without_braces_for_the_name_is_refused():
    with pytest.raises(InputError, match="must have {} where the file's name"):
        open_shards("pipe:cat manifest.json")


def members_of(tar):
    """Name and content of each member of a tar."""
    with tarfile.open(tar) as opened:
        return [(member.name, opened.extractfile(member).read()) for member in opened]


def tar_of(members):
    """A tar of these names and contents."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as opened:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            opened.addfile(member, io.BytesIO(content))
    return file.getvalue()


def with_first_shard(shards, folder, content):
    """A copy of the set, open, whose first shard is `content` and whose manifest says so: only the samples differ."""
    copy = shutil.copytree(shards, folder / "set")
    opened = open_shards(copy)
    (copy / "shard-000000.tar").write_bytes(content)
    first, *others = opened.manifest.shards
    first = replace(first, bytes=len(content), sha256=hashlib.sha256(content).hexdigest())
    return replace(opened, manifest=replace(opened.manifest, shards=[first, *others]))


def all_of(opened, renderer="torch", *, whole=False):
    return list(Stream(opened, renderer=renderer, batch_size=8, threads=2, whole=whole).fetch(PARTS))


@WAYS
def test_an_image_that_does_not_decode_is_named_in_one_line(shards, tmp_path, whole):
    members = members_of(shards / "shard-000000.tar")
    name, image = members[12]
    members[12] = (name, image[:60] + bytes(len(image) - 60))
    where = r"shard-000000.tar: sample 00000003 holds an image that does not decode"
    with pytest.raises(InputError, match=where) as error:
        all_of(with_first_shard(shards, tmp_path, tar_of(members)), whole=whole)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("damage", ["swapped", "truncated", "flipped"])
def test_a_shard_that_is_not_the_manifests_is_named(shards, tmp_path, damage):
    damaged = shutil.copytree(shards, tmp_path / "set")
    opened = open_shards(damaged)
    first, second = damaged / "shard-000000.tar", damaged / "shard-000001.tar"
    content = first.read_bytes()
    changed = {
        "swapped": second.read_bytes(),
        "truncated": content[: len(content) // 2],
        "flipped": content[:5000] + bytes([content[5000] ^ 1]) + content[5001:],
    }
    first.write_bytes(changed[damage])
    with pytest.raises(InputError, match=r"shard-000000.tar (has another SHA-256|cannot be read)"):
        all_of(opened, whole=True)
    if damage != "flipped":  # the flipped bit is in an image that is not asked for
        with pytest.raises(
            InputError, match=r"shard-000000.tar(: sample 0000000\d cannot be used| has [\d,]+ bytes)"
        ):
            all_of(opened)


def test_one_changed_bit_in_any_png_image_is_noticed_though_no_shard_is_hashed(shards, tmp_path):
    """zlib's own checksum is compared; Pillow ignores those of the chunks that hold pixels."""
    members = members_of(shards / "shard-000000.tar")
    name, image = members[12]
    for byte in (45, len(image) // 2, len(image) - 20):
        changed = image[:byte] + bytes([image[byte] ^ 4]) + image[byte + 1 :]
        folder = tmp_path / f"{byte}"
        folder.mkdir()
        with pytest.raises(InputError, match="sample 00000003 holds an image that does not decode"):
            all_of(with_first_shard(shards, folder, tar_of([*members[:12], (name, changed), *members[13:]])))


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
@WAYS
def test_a_pipe_in_a_shards_place_is_not_waited_for(shards, tmp_path, whole):
    copy = shutil.copytree(shards, tmp_path / "set")
    opened = open_shards(copy)
    (copy / "shard-000000.tar").unlink()
    os.mkfifo(copy / "shard-000000.tar")
    with pytest.raises(InputError, match=r"shard-000000.tar cannot be read \(not a file\)"):
        all_of(opened, whole=whole)


@WAYS
def test_a_tar_that_another_program_wrote_is_read(shards, tmp_path, whole):
    members = members_of(shards / "shard-000000.tar")
    check(all_of(with_first_shard(shards, tmp_path, tar_of(members)), whole=whole), shards)


def test_numbers_and_types_of_headers_may_be_written_in_other_ways(shards, tmp_path):
    content = bytearray((shards / "shard-000000.tar").read_bytes())
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        members = tar.getmembers()
    for member in members:
        content[member.offset + 124 : member.offset + 136] = f"{member.size:6o}".encode().ljust(12)
        content[member.offset + 156] = 0
    check(all_of(with_first_shard(shards, tmp_path, bytes(content))), shards)


def spans(shards):
    """The bytes of each sample of a set up to the end of its target, from tarfile."""
    found = []
    for path in sorted(shards.glob("*.tar")):
        with tarfile.open(path) as tar:
            members = tar.getmembers()
        found += [
            target.offset_data + target.size - image.offset
            for image, target in zip(members[::4], members[2::4], strict=True)
        ]
    return found


def test_ranks_read_each_sample_once_between_them_and_nothing_else(shards, monkeypatch):
    read, reading = [], os.preadv
    monkeypatch.setattr("os.preadv", lambda *asked: read.append(reading(*asked)) or read[-1])
    ids = np.random.default_rng(0).permutation(48).reshape(4, 12)
    for rank in range(2):
        before = len(read)
        assert sum(len(batch.ids) for batch in stream(shards).fetch([each[rank::2] for each in ids])) == 24
        assert len(read) - before == 24
    assert sorted(read) == sorted(spans(shards))


def test_no_more_files_are_open_than_allowed_and_none_stays_open(shards, monkeypatch):
    monkeypatch.setattr("modan_fast.stream.MOST_OPEN", 2)
    files, opening = [], ShardSet.open
    monkeypatch.setattr(ShardSet, "open", lambda *asked: files.append(opening(*asked)) or files[-1])
    for _ in stream(shards).fetch([np.array([0, 20, 40])] * 6):
        assert sum(not file.closed for file in files) <= 3
    assert len(files) > 3
    assert all(file.closed for file in files)


def test_a_shard_that_is_cut_while_it_is_read_is_named(shards, tmp_path):
    copy = shutil.copytree(shards, tmp_path / "set")
    reading = stream(copy).read([np.array([40]), np.array([41]), np.array([47])])
    next(reading)
    os.truncate(copy / "shard-000002.tar", 5000)
    with pytest.raises(InputError, match=r"shard-000002.tar became shorter while it was read"):
        list(reading)


def with_index(shards, folder, change):
    """A copy of the set, open, in which a line of the first index, split at its spaces, was changed after that."""
    copy = shutil.copytree(shards, folder / "set")
    opened = open_shards(copy)
    lines = (copy / "shard-000000.idx").read_text().split("\n")
    lines[6] = " ".join(change(lines[6].split(" "), lines[5].split(" ")))
    (copy / "shard-000000.idx").write_text("\n".join(lines))
    return opened


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda own, before: [own[0], before[1], *own[2:]], "tar: sample 0000000[45] cannot be used: its index"),
        (
            lambda own, before: [own[0], str(10**12), *own[2:]],
            "tar: sample 0000000[45] cannot be used: its index",
        ),
        (lambda own, before: [*own[:2], str(10**17), *own[3:]], "tar: sample 00000005 cannot be used: its index"),
        (
            lambda own, before: [*own[:2], str(int(own[2]) - 1), *own[3:]],
            "00000005 cannot be used: its index gives",
        ),
        (lambda own, before: [own[0], str(int(own[1]) + 1), *own[2:]], "tar: sample 00000005 cannot be used"),
        (lambda own, before: [own[0], "0", *own[2:]], "tar: sample 0000000[45] cannot be used: its index"),
        (lambda own, before: [own[0], "-512", *own[2:]], "shard-000000.idx does not fit its shard: .* no number"),
        (
            lambda own, before: [*own[:2], "9" * 19, *own[3:]],
            "shard-000000.idx does not fit its shard: .* no number",
        ),
        (
            lambda own, before: own[:12],
            "shard-000000.idx does not fit its shard: .* not 20 samples of four members",
        ),
    ],
)
def test_an_index_that_points_elsewhere_is_refused_with_shard_and_sample(shards, tmp_path, change, what):
    with pytest.raises(InputError, match=what) as error:
        all_of(with_index(shards, tmp_path, change))
    assert "\n" not in str(error.value)


def test_several_shards_of_a_server_are_read_at_a_time_and_in_order(shards, monkeypatch):
    running, most, reading, lock = 0, 0, ShardSet.read, threading.Lock()

    def slow(*asked):
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        time.sleep(0.05)
        try:
            return reading(*asked)
        finally:
            with lock:
                running -= 1

    monkeypatch.setattr(ShardSet, "read", slow)
    largest = max(path.stat().st_size for path in shards.glob("*.tar"))
    with served(shards) as url:
        check(list(stream(url).fetch(PARTS)), shards)
        assert most == 3
        monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=3 * largest))
        most = 0
        assert len(list(stream(url).fetch(PARTS))) == 3
        assert most == 1, "the second shard fits only beside the first"


def test_a_stream_of_many_samples_is_opened_within_seconds():
    line = "png {0} 2977 {1:08}.png labels 4096 40 {1:08}.labels target 5120 4 {1:08}.target json 6144 200 {1:08}.json"
    lines = [line.format(512 + 8192 * number, number) for number in range(100_000)]
    text = "\n".join(["v1.2 100000", *lines, ""])
    begun = time.process_time()
    places = first_places(text, 100_000)
    assert time.process_time() - begun < 1
    assert places[-1].tolist() == [512 + 8192 * 99_999, 2977]


def png_header(width, height, bits=8, colour=0):
    return b"\x89PNG\r\n\x1a\n\0\0\0\x0dIHDR" + struct.pack(">IIBB", width, height, bits, colour)


@WAYS
@pytest.mark.parametrize(
    ("ending", "change", "what"),
    [
        ("labels", lambda content: content[:-1], "its labels are not 6 bytes of 0 or 1"),
        ("labels", lambda content: content + b"\0", "its labels are not 6 bytes of 0 or 1"),
        ("labels", lambda content: content[:-2] + b"\2" + content[-1:], "its labels are not 6 bytes of 0 or 1"),
        ("target", lambda content: content[:-1], "its target is not the number of one of 4 classes"),
        ("target", lambda content: struct.pack("<i", 4), "its target is not the number of one of 4 classes"),
        ("target", lambda content: struct.pack("<i", -1), "its target is not the number of one of 4 classes"),
        ("png", lambda content: png_header(60_000, 60_000) + content[26:], "not a grey PNG image of 48 x 48"),
        ("png", lambda content: png_header(48, 47) + content[26:], "not a grey PNG image of 48 x 48"),
        ("png", lambda content: png_header(48, 48, colour=2) + content[26:], "not a grey PNG image of 48 x 48"),
        ("png", lambda content: b"", "not a grey PNG image of 48 x 48"),
        ("png", lambda content: b"GIF89a" + content, "not a grey PNG image of 48 x 48"),
    ],
)
def test_a_sample_that_does_not_fit_its_manifest_is_named(shards, tmp_path, whole, ending, change, what):
    members = [
        (name, change(content) if name == f"00000005.{ending}" else content)
        for name, content in members_of(shards / "shard-000000.tar")
    ]
    with pytest.raises(InputError, match=rf"shard-000000.tar: sample 00000005 cannot be used: .*{what}"):
        all_of(with_first_shard(shards, tmp_path, tar_of(members)), whole=whole)


def without_a_member(members):
    del members[21]


def with_two_in_the_other_order(members):
    members[21], members[22] = members[22], members[21]


def with_one_twice(members):
    members.insert(21, members[21])


def with_another_name(members):
    members[21] = ("../00000005.labels", members[21][1])


@WAYS
@pytest.mark.parametrize(
    "change", [without_a_member, with_two_in_the_other_order, with_one_twice, with_another_name]
)
def test_a_shard_holds_exactly_the_members_of_its_samples(shards, tmp_path, whole, change):
    members = members_of(shards / "shard-000000.tar")
    change(members)
    with pytest.raises(InputError, match=r"sample 00000005 cannot be used: 00000005\.\w+ is not at byte"):
        all_of(with_first_shard(shards, tmp_path, tar_of(members)), whole=whole)


def test_a_shard_with_more_samples_than_its_manifest_says_is_refused(shards, tmp_path):
    members = members_of(shards / "shard-000000.tar")
    more = [*members, *((name.replace("0000001", "0000002", 1), content) for name, content in members[-4:])]
    with pytest.raises(InputError, match=r"shard-000000.tar holds more than the 20 samples of its manifest"):
        all_of(with_first_shard(shards, tmp_path, tar_of(more)), whole=True)


@WAYS
@pytest.mark.parametrize("kind", ["compressed", "sparse", "link", "huge", "negative"])
def test_a_tar_that_expands_or_leads_elsewhere_is_refused(shards, tmp_path, kind, whole):
    content = bytearray((shards / "shard-000000.tar").read_bytes())
    if kind == "compressed":
        content = gzip.compress(content)
    elif kind == "sparse":
        content[156:157] = b"S"
        content[483:495] = b"77777777777\0"  # the size after it is expanded
    elif kind == "link":
        content[156:157] = b"2"
        content[157:170] = b"/etc/passwd\0\0"
    else:
        content[124:136] = b"77777777777\0" if kind == "huge" else b"-0000000001\0"
    opened = with_first_shard(shards, tmp_path, bytes(content))
    with pytest.raises(InputError, match=r"shard-000000.tar: sample 000000\d\d cannot be used"):
        list(Stream(opened, renderer="torch", batch_size=8, threads=1, whole=whole).fetch_first(20))


@pytest.mark.parametrize(
    "start", [b"\xff\xd8", b"\xff\xd8\xff\xe0\0\x10" + bytes(14), b"\xff\xd8\xff\xfe\xff\xff" + bytes(65533)]
)
def test_the_size_of_a_jpeg_image_is_read_from_its_header(start):
    def frame(height, width, marker=0xC0, channels=1):
        return start + struct.pack(">BBHBHHB", 0xFF, marker, 11, 8, height, width, channels) + bytes(40)

    check_header(frame(48, 48), "jpeg", 48)
    check_header(frame(48, 48, marker=0xC1), "jpeg", 48)
    for bad in (
        frame(60_000, 60_000),
        frame(48, 47),
        frame(48, 48, channels=3),
        frame(48, 48, marker=0xC2),
        frame(48, 48)[:-42],
        start + b"\xff\xda" + frame(48, 48)[2:],
        start + b"\xff\xff\0\0" * 1000,
        start + b"\xff\xe0\0\0" * 100_000,
        start,
        b"",
    ):
        with pytest.raises(ValueError, match="not a grey baseline JPEG image of 48 x 48 pixels"):
            check_header(bad, "jpeg", 48)
    with pytest.raises(ValueError, match="it has 2,303 bytes, not 48 x 48"):
        check_header(bytes(48 * 48 - 1), "raw", 48)


DECODE = """
import io, random, resource, sys, warnings
import numpy as np
from PIL import Image
from modan_fast.decode import DaliDecoder, ThreadDecoder, check_header

warnings.simplefilter("ignore")
rng = random.Random(0)
grey = Image.fromarray(np.random.default_rng(0).integers(0, 32, (64, 64)).astype(np.uint8) * 8)


def changed(image):
    image, kind = bytearray(image), rng.randrange(6)
    start, end = sorted(rng.randrange(len(image)) for _ in range(2))
    if kind == 0:
        del image[start:]
    elif kind == 1:
        del image[start:end]
    elif kind == 2:
        image[end:end] = image[start:end] * rng.choice([1, 30])
    elif kind == 3:
        image[start:start] = rng.randbytes(rng.choice([1, 4, 70_000]))
    elif kind == 4:
        header = image.find(b"IHDR") + 4 if image.startswith(b"\\x89") else image.find(b"\\xff\\xc0") + 5
        image[header : header + rng.choice([2, 4, 8])] = rng.choice([b"\\0", b"\\xff", b"\\x7f"]) * 8
    else:
        for _ in range(rng.choice([1, 8, 64])):
            image[rng.randrange(len(image))] = rng.randrange(256)
    return bytes(image)


for codec in ("png", "jpeg"):
    file = io.BytesIO()
    grey.save(file, codec)
    open_decoder = (lambda: DaliDecoder(1, 1)) if sys.argv[1] == "dali" else lambda: ThreadDecoder(codec, 64, 1)
    decoder, counts = open_decoder(), {"refused": 0, "failed": 0, "decoded": 0}
    for number in range(400):
        image = changed(file.getvalue()) if number % 40 else file.getvalue()
        try:
            check_header(image, codec, 64)
        except ValueError:
            counts["refused"] += 1
            continue
        try:
            decoder.submit([image])
            counts["decoded"] += decoder.collect().shape == (1, 64, 64)
        except Exception:
            counts["failed"] += 1
            decoder = open_decoder()
    assert counts["refused"] and counts["failed"] and counts["decoded"] >= 10, counts
    print(codec, counts)
    if codec == "png":
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000
print("survived")
"""


@pytest.mark.parametrize("renderer", RENDERERS)
def test_no_damaged_image_crashes_a_decoder(renderer):
    ended = subprocess.run([sys.executable, "-c", DECODE, renderer], capture_output=True, text=True, check=False)
    assert ended.stdout.endswith("survived\n"), (ended.returncode, ended.stdout, ended.stderr[-2000:])


PEAKS = """
import sys
import numpy as np
from modan_fast.augment import sample_order
from modan_fast.devices import peak_memory
from modan_fast.shards import open_shards
from modan_fast.stream import Stream
import torch

for location in sys.argv[2:]:
    opened = open_shards(location)
    order = sample_order(0, 0, opened.counts, window=500)
    batches = np.array_split(order, len(order) // 100)
    stream = Stream(opened, renderer="torch", batch_size=100, threads=2, whole=sys.argv[1] == "whole")
    seen = sum(len(samples.ids) for samples in stream.fetch(batches))
    print(seen, peak_memory(torch.device("cpu"))["peak_host_gib"])
"""


def test_memory_does_not_grow_with_the_number_of_shards(tmp_path):
    size, count = 128, 200  # 3.3 MB a shard
    label, metadata = np.array([1, 0], np.uint8), {"fields": {"modality": "CT"}, "class": "CT", "source": "x"}
    for shards, name in ((10, "small"), (80, "large")):
        (tmp_path / name).mkdir()
        sample = Sample(bytes(size * size), label, 0, metadata)
        written = [
            write_shard(
                tmp_path / name / f"shard-{number:06}.tar",
                [sample] * count,
                first=number * count,
                extension="raw",
            )
            for number in range(shards)
        ]
        Manifest(shards * count, size, "raw", {"modality": ["CT", "MR"]}, ["CT"], written, [], {}).save(
            tmp_path / name
        )
    locations = [str(tmp_path / name) for name in ("small", "large")]
    for way in ("by offset", "whole"):
        command = [sys.executable, "-c", PEAKS, way, *locations]
        ended = subprocess.run(command, check=True, capture_output=True, text=True)
        small, large = (line.split() for line in ended.stdout.splitlines())
        assert (small[0], large[0]) == ("2000", "16000")
        # Eight times the images, 229 MB more of pixels: the peak moves by a few megabytes of bookkeeping.
        assert float(large[1]) - float(small[1]) < 0.03, way


def test_an_opened_set_knows_its_samples_by_shard(shards):
    manifest = Manifest.load(shards)
    assert open_shards(shards).counts == [each.samples for each in manifest.shards] == [20, 20, 8]
