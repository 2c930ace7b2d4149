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
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch

from modan_fast.decode import check_header, dali_installed
from modan_fast.shards import open_shards
from modan_fast.store import read_all
from modan_fast.stream import Stream
from shard_builder.manifest import Manifest
from shard_builder.settings import InputError
from shard_builder.writer import Sample, write_shard

RENDERERS = ["torch", pytest.param("dali", marks=pytest.mark.skipif(not dali_installed(), reason="no DALI here"))]
PARTS = [np.array([47, 3, 20]), np.array([5]), np.array([21, 4])]


def stream(location, renderer="torch"):
    return Stream(open_shards(location), renderer=renderer, batch_size=8, threads=2)


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


def check(samples, shards):
    """Compare samples with those of a store in memory."""
    store = read_all(open_shards(shards), renderer="torch", device=torch.device("cpu"), threads=1)
    assert [each.ids.tolist() for each in samples] == [part.tolist() for part in PARTS]
    for each in samples:
        assert torch.equal(each.pixels, store.pixels[each.ids])
        assert torch.equal(each.labels, store.labels[each.ids])
        assert torch.equal(each.targets, store.targets[each.ids])


@pytest.mark.parametrize("renderer", RENDERERS)
def test_samples_come_in_any_order_that_is_asked_for(shards, renderer):
    check(list(stream(shards, renderer).fetch(PARTS)), shards)


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


def test_only_the_shards_that_are_needed_are_read(shards, tmp_path):
    part = shutil.copytree(shards, tmp_path / "set")
    opened = open_shards(part)
    (part / "shard-000001.tar").unlink()  # samples 20 to 39
    few = Stream(opened, renderer="torch", batch_size=8, threads=1)
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


def all_of(opened, renderer="torch"):
    return list(Stream(opened, renderer=renderer, batch_size=8, threads=2).fetch(PARTS))


@pytest.mark.parametrize("renderer", RENDERERS)
def test_an_image_that_does_not_decode_ends_the_stream_with_one_line(shards, tmp_path, renderer):
    members = members_of(shards / "shard-000000.tar")
    name, image = members[12]
    members[12] = (name, image[:60] + bytes(len(image) - 60))
    with pytest.raises(InputError, match="an image that does not decode") as error:
        all_of(with_first_shard(shards, tmp_path, tar_of(members)), renderer)
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
        all_of(opened)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
def test_a_pipe_in_a_shards_place_is_not_waited_for(shards, tmp_path):
    copy = shutil.copytree(shards, tmp_path / "set")
    opened = open_shards(copy)
    (copy / "shard-000000.tar").unlink()
    os.mkfifo(copy / "shard-000000.tar")
    with pytest.raises(InputError, match=r"shard-000000.tar cannot be read \(not a file\)"):
        all_of(opened)


def test_a_tar_that_another_program_wrote_is_read(shards, tmp_path):
    check(all_of(with_first_shard(shards, tmp_path, tar_of(members_of(shards / "shard-000000.tar")))), shards)


def png_header(width, height, bits=8, colour=0):
    return b"\x89PNG\r\n\x1a\n\0\0\0\x0dIHDR" + struct.pack(">IIBB", width, height, bits, colour)


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
def test_a_sample_that_does_not_fit_its_manifest_is_named(shards, tmp_path, ending, change, what):
    members = [
        (name, change(content) if name == f"00000005.{ending}" else content)
        for name, content in members_of(shards / "shard-000000.tar")
    ]
    with pytest.raises(InputError, match=rf"shard-000000.tar: sample 00000005 cannot be used: .*{what}"):
        all_of(with_first_shard(shards, tmp_path, tar_of(members)))


def without_a_member(members):
    del members[21]


def with_two_in_the_other_order(members):
    members[21], members[22] = members[22], members[21]


def with_one_twice(members):
    members.insert(21, members[21])


def with_another_name(members):
    members[21] = ("../00000005.labels", members[21][1])


@pytest.mark.parametrize(
    "change", [without_a_member, with_two_in_the_other_order, with_one_twice, with_another_name]
)
def test_a_shard_holds_exactly_the_members_of_its_samples(shards, tmp_path, change):
    members = members_of(shards / "shard-000000.tar")
    change(members)
    with pytest.raises(InputError, match=r"sample 00000005 cannot be used: 00000005\.\w+ is not at byte"):
        all_of(with_first_shard(shards, tmp_path, tar_of(members)))


def test_a_shard_with_more_samples_than_its_manifest_says_is_refused(shards, tmp_path):
    members = members_of(shards / "shard-000000.tar")
    more = [*members, *((name.replace("0000001", "0000002", 1), content) for name, content in members[-4:])]
    with pytest.raises(InputError, match=r"shard-000000.tar holds more than the 20 samples of its manifest"):
        all_of(with_first_shard(shards, tmp_path, tar_of(more)))


@pytest.mark.parametrize("kind", ["compressed", "sparse", "link", "huge", "negative"])
def test_a_tar_that_expands_or_leads_elsewhere_is_refused(shards, tmp_path, kind):
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
    with pytest.raises(InputError, match=r"shard-000000.tar: sample 00000000 cannot be used"):
        all_of(with_first_shard(shards, tmp_path, bytes(content)))


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
from modan_fast.decode import DaliDecoder, PillowDecoder, check_header

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
    open_decoder = (lambda: DaliDecoder(1, 1)) if sys.argv[1] == "dali" else lambda: PillowDecoder(codec, 64, 1)
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

for location in sys.argv[1:]:
    opened = open_shards(location)
    order = sample_order(0, 0, opened.counts, window=500)
    stream = Stream(opened, renderer="torch", batch_size=100, threads=2)
    seen = sum(len(samples.ids) for samples in stream.fetch(np.array_split(order, len(order) // 100)))
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
    ended = subprocess.run([sys.executable, "-c", PEAKS, *locations], check=True, capture_output=True, text=True)
    small, large = (line.split() for line in ended.stdout.splitlines())
    assert (small[0], large[0]) == ("2000", "16000")
    # Eight times the images, 229 MB more of pixels: the peak moves by a few megabytes of bookkeeping.
    assert float(large[1]) - float(small[1]) < 0.03


def test_an_opened_set_knows_its_samples_by_shard(shards):
    manifest = Manifest.load(shards)
    assert open_shards(shards).counts == [each.samples for each in manifest.shards] == [20, 20, 8]
