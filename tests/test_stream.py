"""Streaming: tars from folders, commands and servers, and what is said of those that are not what they should be."""

import contextlib
import http.server
import shlex
import shutil
import subprocess
import sys
import tarfile
import threading
from functools import partial

import numpy as np
import pytest
import torch

from modan_fast.decode import dali_installed
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


@pytest.mark.skipif(shutil.which("curl") is None, reason="the webdataset library starts curl")
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
    with pytest.raises(InputError, match=r"shard-000001.tar cannot be read"):
        list(few.fetch([np.array([20])]))


@pytest.mark.parametrize("location", ["pipe:false {}", "nosuchscheme://a/b"])
def test_a_url_without_a_shard_set_is_refused(location):
    with pytest.raises(InputError, match="no shard set at"):
        open_shards(location)


def test_a_command_without_braces_for_the_name_is_refused():
    with pytest.raises(InputError, match="must have {} where the file's name"):
        open_shards("pipe:cat manifest.json")


@pytest.mark.parametrize("renderer", RENDERERS)
def test_an_image_that_does_not_decode_ends_the_stream_with_one_line(shards, tmp_path, renderer):
    damaged = shutil.copytree(shards, tmp_path / "set")
    tar = damaged / "shard-000000.tar"
    with tarfile.open(tar) as opened:
        member = opened.getmember("00000003.png")
    content = bytearray(tar.read_bytes())
    content[member.offset_data : member.offset_data + member.size] = bytes(member.size)
    tar.write_bytes(content)
    with pytest.raises(InputError, match="an image that does not decode") as error:
        list(stream(damaged, renderer).fetch(PARTS))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("damage", ["swapped", "truncated"])
def test_a_shard_that_is_not_the_manifests_is_named(shards, tmp_path, damage):
    damaged = shutil.copytree(shards, tmp_path / "set")
    opened = open_shards(damaged)
    first, second = damaged / "shard-000000.tar", damaged / "shard-000001.tar"
    content = first.read_bytes()
    first.write_bytes(second.read_bytes() if damage == "swapped" else content[: len(content) // 2])
    with pytest.raises(InputError, match=r"shard-000000.tar cannot be read \("):
        list(Stream(opened, renderer="torch", batch_size=8, threads=1).fetch(PARTS))


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
