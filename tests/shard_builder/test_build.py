"""Whole builds: the shards read back by other software, and the output folder in every state."""

import errno
import hashlib
import io
import json
import os
import re
import signal
import subprocess
import sys
import tarfile
import time
from collections import Counter

import numpy as np
import pytest
import webdataset
from PIL import Image

from shard_builder import image, output, pack, writer
from shard_builder.build import build
from shard_builder.index import parse_index
from shard_builder.manifest import Manifest, Rejected
from shard_builder.options import BuildOptions
from shard_builder.settings import InputError

ENDINGS = {"png": "png", "jpeg": "jpg", "raw": "raw"}
SMALL = {"size": 24, "workers": 1, "samples_per_shard": 20}


def bytes_of(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def by_pillow(path, size):
    return np.asarray(Image.open(path).convert("L").resize((size, size), Image.Resampling.BILINEAR))


def samples_of(folder):
    urls = [str(path) for path in sorted(folder.glob("*.tar"))]
    return list(webdataset.WebDataset(urls, shardshuffle=False))


def expect_samples(folder, archive, codec="png"):
    """Compare every sample with the image that it came from; return the sources."""
    manifest, samples = Manifest.load(folder), samples_of(folder)
    assert len(samples) == manifest.samples
    for number, sample in enumerate(samples):
        assert sample["__key__"] == f"{number:08}"
        metadata = json.loads(sample["json"])
        source, fields = metadata["source"], metadata["fields"]
        modality, *above, category, _ = source.split("/")
        anatomy = above[0] if above else {"liver": "abd", "thyroid_nodule": "thyroid"}[category]
        assert fields == {"modality": modality, "anatomy": anatomy}
        assert metadata["class"] == f"{modality}/{anatomy}/{category}"
        assert manifest.classes[int.from_bytes(sample["target"], "little")] == metadata["class"]
        labels = np.frombuffer(sample["labels"], np.uint8)
        set_bits = {name for name, bit in zip(manifest.labels, labels, strict=True) if bit}
        assert set_bits == {f"modality={modality}", f"anatomy={anatomy}"}
        expected, data = by_pillow(archive / source, manifest.size), sample[ENDINGS[codec]]
        if codec == "raw":
            assert data == expected.tobytes()
        elif codec == "png":
            assert np.array_equal(np.asarray(Image.open(io.BytesIO(data))), expected)
        else:
            assert np.abs(np.asarray(Image.open(io.BytesIO(data))).astype(int) - expected).mean() < 2
    return [json.loads(sample["json"])["source"] for sample in samples]


@pytest.mark.parametrize("codec", ["png", "jpeg", "raw"])
def test_the_webdataset_library_reads_back_every_image_with_its_labels(tree, tmp_path, codec):
    result = build(tree, tmp_path / "set", BuildOptions(codec=codec, **SMALL))
    assert result.built
    assert result.manifest == Manifest.load(tmp_path / "set")
    sources = expect_samples(tmp_path / "set", tree, codec)
    images = [path for path in tree.rglob("*") if path.suffix in {".png", ".JPG"}]
    assert sorted(sources) == sorted(path.relative_to(tree).as_posix() for path in images)
    assert [shard.samples for shard in result.manifest.shards] == [20, 20, 10]


def test_the_tars_are_plain_ustar_without_identities_and_the_indices_point_at_their_members(tree, tmp_path):
    build(tree, tmp_path / "set", BuildOptions(**SMALL))
    manifest, key = Manifest.load(tmp_path / "set"), 0
    for shard in manifest.shards:
        path = tmp_path / "set" / shard.name
        assert path.read_bytes()[257:265] == b"ustar\x0000"
        assert (shard.bytes, shard.sha256) == (path.stat().st_size, hashlib.sha256(path.read_bytes()).hexdigest())
        with tarfile.open(path) as tar:
            members = tar.getmembers()
        assert {(m.mtime, m.uid, m.gid, m.mode, m.uname, m.gname) for m in members} == {(0, 0, 0, 0o644, "", "")}
        endings = ("png", "labels", "target", "json")
        assert [m.name for m in members] == [f"{key + n:08}.{e}" for n in range(shard.samples) for e in endings]
        listed = [each for sample in parse_index(path.with_suffix(".idx").read_text()) for each in sample]
        assert listed == [(m.name[9:], m.offset_data, m.size, m.name) for m in members]
        key += shard.samples


@pytest.mark.parametrize("codec", ["png", "jpeg", "raw"])
def test_dali_reads_the_shards_by_their_indices(tree, tmp_path, codec):
    dali = pytest.importorskip("nvidia.dali", reason="DALI is not installed")
    build(tree, tmp_path / "set", BuildOptions(codec=codec, **SMALL))
    manifest, tars = Manifest.load(tmp_path / "set"), sorted((tmp_path / "set").glob("*.tar"))
    fn, pipeline = dali.fn, dali.Pipeline(batch_size=10, num_threads=1, device_id=None)
    with pipeline:
        data, labels, target = fn.readers.webdataset(
            paths=[str(path) for path in tars],
            index_paths=[str(path.with_suffix(".idx")) for path in tars],
            ext=[ENDINGS[codec], "labels", "target"],
            missing_component_behavior="error",
        )
        if codec == "raw":
            pixels = fn.reshape(data, shape=[24, 24, 1])
        else:
            pixels = fn.decoders.image(data, output_type=dali.types.GRAY)
        pipeline.set_outputs(pixels, fn.reshape(labels, shape=[manifest.bits]), target)
    pipeline.build()
    samples = samples_of(tmp_path / "set")
    for start in range(0, 50, 10):
        pixels, labels, target = (output.as_array() for output in pipeline.run())
        for row, sample in enumerate(samples[start : start + 10]):
            data = sample[ENDINGS[codec]]
            if codec != "raw":
                data = np.asarray(Image.open(io.BytesIO(data))).tobytes()
            assert pixels[row].tobytes() == data
            assert labels[row].tobytes() == sample["labels"]
            assert target[row].tobytes() == sample["target"]


def test_the_same_source_and_options_give_the_same_bytes_with_any_number_of_workers(tree, tmp_path, monkeypatch):
    monkeypatch.setattr(pack, "CHUNK", 8)
    sets = {}
    for name, workers in (("first", 1), ("again", 1), ("two", 2)):
        out = tmp_path / name
        build(tree, out, BuildOptions(size=24, workers=workers, samples_per_shard=20))
        sets[name] = bytes_of(out)
    assert sets["first"] == sets["again"] == sets["two"]
    monkeypatch.setattr(pack, "CHUNK", 50)
    build(tree, tmp_path / "chunk", BuildOptions(**SMALL))
    assert bytes_of(tmp_path / "chunk") == sets["first"]
    assert sorted(sets["first"]) == ["manifest.json", "report.html"] + [
        f"shard-00000{number}.{ending}" for number in range(3) for ending in ("idx", "tar")
    ]
    assert str(tmp_path).encode() not in b"".join(sets["first"].values())


def test_the_manifest_records_what_shapes_the_content_and_no_path(tree, tmp_path):
    found = build(tree, tmp_path / "set", BuildOptions(per_class=4, **SMALL)).manifest
    assert found.options.keys() == {
        *("source", "fields", "per_class", "size", "codec", "seed", "anatomy", "skip_unknown"),
        *("samples_per_shard", "duplicates"),
    }
    assert found.options["source"].keys() == {"form", "images", "digest"}
    assert (found.samples, found.size, found.codec) == (20, 24, "png")
    assert Counter(
        json.loads(sample["json"])["class"] for sample in samples_of(tmp_path / "set")
    ) == dict.fromkeys(found.classes, 4)


def test_damaged_images_are_listed_with_their_reasons_and_are_in_no_shard(damaged, tmp_path, monkeypatch):
    archive, reasons = damaged
    monkeypatch.setattr(pack, "CHUNK", 7)
    found = build(archive, tmp_path / "set", BuildOptions(**SMALL)).manifest
    assert {each.source: each.reason for each in found.rejected} == reasons
    assert found.samples == 50
    assert not set(expect_samples(tmp_path / "set", archive)) & set(reasons)


def test_a_source_without_any_usable_image_is_an_error_and_leaves_nothing(tmp_path):
    (tmp_path / "archive/CT/lung/x").mkdir(parents=True)
    (tmp_path / "archive/CT/lung/x/a.png").write_text("no image")
    with pytest.raises(
        InputError, match=r"no usable image in .*: 1 were rejected, such as CT/lung/x/a\.png: not a"
    ):
        build(tmp_path / "archive", tmp_path / "set", BuildOptions(**SMALL))
    assert [path.name for path in tmp_path.iterdir()] == ["archive"]


def test_a_class_whose_images_are_all_damaged_is_no_class(damaged, tmp_path):
    archive, _ = damaged
    (archive / "PT/lung/x").mkdir(parents=True)
    (archive / "PT/lung/x/a.png").touch()
    found = build(archive, tmp_path / "set", BuildOptions(**SMALL)).manifest
    assert found.fields["modality"] == ["CT", "MR", "US"]
    assert len(found.classes) == 5


def test_progress_of_each_stage_reaches_its_total(tree, tmp_path):
    seen = {}
    build(
        tree, tmp_path / "set", BuildOptions(**SMALL), progress=lambda stage, *state: seen.update({stage: state})
    )
    assert list(seen) == ["scanning", "listing", "packing", "writing", "reading"]
    assert all(done == total > 0 for done, total, _ in seen.values())


# Outputs that exist already.


def test_an_identical_finished_set_is_left_alone(tree, tmp_path):
    first = build(tree, tmp_path / "set", BuildOptions(**SMALL))
    stamp = (tmp_path / "set" / "manifest.json").stat().st_mtime_ns
    again = build(tree, tmp_path / "set", BuildOptions(**{**SMALL, "workers": 2}))
    assert (first.built, again.built) == (True, False)
    assert again.manifest == first.manifest
    assert (tmp_path / "set" / "manifest.json").stat().st_mtime_ns == stamp


def test_another_set_is_refused_and_replaced_only_with_overwrite(tree, tmp_path):
    build(tree, tmp_path / "set", BuildOptions(**SMALL))
    before = bytes_of(tmp_path / "set")
    with pytest.raises(
        InputError, match=r"another seed: 0, not 1: pass `overwrite=True` to replace it, or choose"
    ):
        build(tree, tmp_path / "set", BuildOptions(seed=1, **SMALL))
    with pytest.raises(InputError, match=r"another per_class: 100, not 3: pass `overwrite=True` to replace it"):
        build(tree, tmp_path / "set", BuildOptions(per_class=3, **SMALL))
    next(tree.rglob("*.png")).unlink()
    with pytest.raises(InputError, match=r"another source: pass `overwrite=True` to replace it"):
        build(tree, tmp_path / "set", BuildOptions(**SMALL))
    assert bytes_of(tmp_path / "set") == before
    assert build(tree, tmp_path / "set", BuildOptions(**SMALL), overwrite=True).manifest.samples == 49
    assert {path.name for path in tmp_path.iterdir()} == {"archive", "set"}


@pytest.mark.parametrize("overwrite", [False, True])
def test_what_is_no_shard_set_is_never_replaced(tree, tmp_path, overwrite):
    build(tree, tmp_path / "set", BuildOptions(**SMALL))
    (tmp_path / "set" / "notes.txt").write_text("mine")
    (tmp_path / "file").touch()
    for out, match in (("set", r"holds notes\.txt"), ("file", "is a file"), ("archive", "holds CT")):
        with pytest.raises(InputError, match=match):
            build(tree, tmp_path / out, BuildOptions(**SMALL), overwrite=overwrite)
    assert (tmp_path / "set" / "notes.txt").exists()


def test_a_damaged_set_is_named_as_damaged_and_can_be_replaced(tree, tmp_path):
    build(tree, tmp_path / "set", BuildOptions(**SMALL))
    (tmp_path / "set" / "shard-000001.idx").unlink()
    with pytest.raises(InputError, match=r"holds a damaged shard set: pass `overwrite=True` to replace it \("):
        build(tree, tmp_path / "set", BuildOptions(**SMALL))
    build(tree, tmp_path / "set", BuildOptions(**SMALL), overwrite=True).manifest.check_files(tmp_path / "set")


def test_an_empty_folder_or_a_link_to_one_may_be_the_output(tree, tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    assert build(tree, tmp_path / "link", BuildOptions(**SMALL)).built
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real" / "manifest.json").exists()


def test_a_mount_point_is_refused_before_any_work(tree, tmp_path, monkeypatch):
    out = tmp_path / "set"
    out.mkdir()
    monkeypatch.setattr("os.path.ismount", lambda path: path == out)
    with pytest.raises(
        InputError, match="is a mount point, which cannot be replaced: choose a folder in it with `out`"
    ):
        build(tree, out, BuildOptions(**SMALL))
    assert not list(out.iterdir())


# Builds that do not finish.


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
@pytest.mark.parametrize("step", ["packing", "writing", "manifest", "swap"])
def test_a_build_that_fails_leaves_the_old_set_as_it_was_and_the_next_one_continues_it(
    tree, tmp_path, monkeypatch, error, step
):
    build(tree, tmp_path / "set", BuildOptions(**SMALL))
    before = bytes_of(tmp_path / "set")
    build(tree, tmp_path / "other", BuildOptions(seed=1, **SMALL))
    real = os.replace

    def fail(*_, **__):
        raise error

    def fail_at_last(old, new):
        return fail() if "/set-" in str(old) and new == tmp_path / "set" else real(old, new)

    steps = {
        "packing": (image, "encode"),
        "writing": (writer, "format_index"),
        "manifest": (Manifest, "save"),
    }
    with monkeypatch.context() as patch:
        if step == "swap":
            patch.setattr(output.os, "replace", fail_at_last)
        else:
            patch.setattr(*steps[step], fail)
        with pytest.raises(type(error)):
            build(tree, tmp_path / "set", BuildOptions(seed=1, **SMALL), overwrite=True)
    assert bytes_of(tmp_path / "set") == before
    left = set() if step == "packing" else {".set.building"}
    assert {path.name for path in tmp_path.iterdir()} == {"archive", "other", "set", *left}
    if left:
        monkeypatch.setattr(image, "decode", fail)  # nothing is packed twice
    build(tree, tmp_path / "set", BuildOptions(seed=1, **SMALL), overwrite=True)
    assert bytes_of(tmp_path / "set") == bytes_of(tmp_path / "other")
    assert {path.name for path in tmp_path.iterdir()} == {"archive", "other", "set"}


def test_leftovers_of_killed_builds_are_cleaned_up(tree, tmp_path):
    build(tree, tmp_path / "set", BuildOptions(**SMALL))
    before = bytes_of(tmp_path / "set")
    (tmp_path / ".set.building").mkdir()
    for name in ("spool-00.1234abcd.part", "spool-01.part"):  # the first versions wrote no token
        (tmp_path / ".set.building" / name).write_text("half")
    (tmp_path / "set").rename(tmp_path / ".set.replaced")  # killed between the two renames
    assert not build(tree, tmp_path / "set", BuildOptions(**SMALL)).built
    assert bytes_of(tmp_path / "set") == before
    (tmp_path / ".set.replaced").mkdir()  # killed after them
    for name in ("manifest.json", "shard-000000.tar.part", "shard-000000.idx.1234abcd.part"):
        (tmp_path / ".set.replaced" / name).touch()
    build(tree, tmp_path / "set", BuildOptions(**SMALL), overwrite=True)
    assert bytes_of(tmp_path / "set") == before
    assert {path.name for path in tmp_path.iterdir()} == {"archive", "set"}


def test_a_folder_for_building_that_holds_anything_else_is_left_alone(tree, tmp_path):
    (tmp_path / ".set.building").mkdir()
    (tmp_path / ".set.building" / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match=r"holds notes\.txt, which does not belong to a build: move it away"):
        build(tree, tmp_path / "set", BuildOptions(**SMALL))
    assert (tmp_path / ".set.building" / "notes.txt").exists()


def test_two_builds_never_write_to_one_folder(tree, tmp_path):
    out = tmp_path / "set"
    with output.building(out, out) as folder:
        with pytest.raises(
            InputError,
            match="another build is writing to .*set: wait for it, or choose another folder with `out`",
        ):
            build(tree, out, BuildOptions(**SMALL))
        assert folder.exists()  # the first one's own


def test_a_build_works_on_a_file_system_without_locks(tree, tmp_path, monkeypatch):
    def none(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(output.fcntl, "flock", none)
    assert build(tree, tmp_path / "set", BuildOptions(**SMALL)).built


def script(tmp_path, tree, text):
    path = tmp_path / "script.py"
    path.write_text(
        "from pathlib import Path\nfrom shard_builder import pack\nfrom shard_builder.build import *\n"
        f"pack.CHUNK = 5\nsource, out = Path({str(tree)!r}), Path({str(tmp_path / 'set')!r})\n{text}"
    )
    return [sys.executable, str(path)]


def test_a_full_disk_in_a_worker_is_the_callers_error(tree, tmp_path):
    pytest.importorskip("resource", reason="needs limits on files")
    text = (
        "import resource\nresource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))  # workers inherit it\n"
        "try:\n    build(source, out, BuildOptions(size=224, codec='raw', workers=2))\n"
        "except OSError as error:\n    print(error)\n"
    )
    done = subprocess.run(script(tmp_path, tree, text), capture_output=True, text=True, timeout=60, check=False)
    assert re.fullmatch(r"\[Errno 27\] File too large: '.*spool-[0-9a-f]{32}'\n", done.stdout)
    assert done.stderr == ""
    assert {path.name for path in tmp_path.iterdir()} == {"archive", "script.py"}


def test_a_script_without_a_main_guard_may_build_with_many_workers(tree, tmp_path):
    call = "print(build(source, out, BuildOptions(size=24, workers=2)).built)\n"
    done = subprocess.run(script(tmp_path, tree, call), capture_output=True, text=True, timeout=60, check=False)
    assert (done.stdout, done.stderr) == ("True\n", "")


def test_ctrl_c_ends_workers_and_keeps_what_is_done(tree, tmp_path):
    text = (
        "def progress(stage, done, total, note):\n    if stage == 'packing': print('at work', flush=True)\n"
        "build(source, out, BuildOptions(size=1500, workers=2), progress=progress)\n"
    )
    command = script(tmp_path, tree, text)
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        assert process.stdout.readline() == "at work\n"
        os.killpg(process.pid, signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    assert process.returncode in (1, 130, -signal.SIGINT)
    assert errors.count("Traceback") <= 2  # the script's own, none of a worker
    assert "Process SpawnProcess" not in errors
    assert {path.name for path in tmp_path.iterdir()} == {"archive", "script.py", ".set.building"}
    left = [path.name for path in (tmp_path / ".set.building").iterdir()]
    assert left
    assert not [name for name in left if not name.startswith("spool-") or name.endswith(".part")]


@pytest.mark.skipif(not os.path.isdir("/proc"), reason="needs /proc")
def test_workers_do_not_outlive_a_parent_that_is_killed(tree, tmp_path):
    text = (
        "import multiprocessing, os, signal\n"
        "def progress(stage, done, total, note):\n"
        "    if stage == 'packing':\n"
        "        print(*[each.pid for each in multiprocessing.active_children()], flush=True)\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "build(source, out, BuildOptions(size=24, workers=2), progress=progress)\n"
    )
    done = subprocess.run(
        script(tmp_path, tree, text), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, check=False
    )
    workers = [int(word) for word in done.stdout.split()]
    assert len(workers) == 2

    def alive(pid):
        try:
            with open(f"/proc/{pid}/stat") as file:
                return file.read().rpartition(")")[2].split()[0] != "Z"
        except FileNotFoundError:
            return False

    deadline = time.monotonic() + 10
    while any(map(alive, workers)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(alive, workers))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"per_class": -1}, "`per_class` must be at least 0, got -1"),
        ({"size": 0}, "`size` must be at least 1 and at most 8192, got 0"),
        ({"size": 10**6}, "`size` must be at least 1 and at most 8192, got 1000000"),
        ({"codec": "gif"}, "`codec` must be one of png, jpeg, raw, got 'gif'"),
        ({"duplicates": "some"}, "`duplicates` must be one of keep, first, drop, got 'some'"),
        ({"workers": 0}, "`workers` must be at least 1, got 0"),
        ({"samples_per_shard": 0}, "`samples_per_shard` must be at least 1"),
        ({"frames": 0}, "`frames` must be at least 1, got 0"),
        (
            {"fields": "modality,,view"},
            "`fields` must be different names with commas between, got 'modality,,view'",
        ),
        ({"fields": ""}, "`fields` must be different names with commas between, got ''"),
        ({"require": "view,view"}, "`require` must be different names with commas between, got 'view,view'"),
        ({"anatomy": ("US/spleen2",)}, "`anatomy` must be PATH=VALUE, such as US/spleen2=abd, got 'US/spleen2'"),
        ({"anatomy": ("US/spleen2=a/b",)}, "`anatomy` must be PATH=VALUE"),
    ],
)
def test_options_that_make_no_sense_are_named(options, message):
    with pytest.raises(InputError, match=message):
        BuildOptions(**options)


def test_all_real_images_are_packed_with_their_pixels_and_labels(real_data, tmp_path):
    found = build(real_data / "radiology", tmp_path / "set", BuildOptions(per_class=0)).manifest
    assert found.samples == 2759
    assert found.rejected == [Rejected("CT/brain/mixed/006993.jpeg", "empty: every pixel is 25")]
    assert len(set(expect_samples(tmp_path / "set", real_data / "radiology"))) == 2759
    found.check_files(tmp_path / "set")
    found.check_hashes(tmp_path / "set")
