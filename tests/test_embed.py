"""`embed`: the features are those of the encoder alone, from every source, in every format, also after a kill."""

import csv
import importlib.util
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile

import numpy as np
import pydicom
import pytest
import torch
from PIL import Image
from pyarrow import parquet

import modan_fast
from modan_fast import cli, embeddings
from modan_fast.encoders import Architecture, Encoder, save_encoder
from modan_fast.shards import ShardSet
from shard_builder.build import build
from shard_builder.manifest import Manifest, Shard
from shard_builder.options import BuildOptions
from shard_builder.settings import InputError
from shard_builder.writer import Sample, member_header, write_shard

SMALL = {"device": "cpu", "threads": 2, "batch_size": 5}
SUFFIXES = ("npz", "csv", "parquet")


@pytest.fixture(scope="session")
def run(tmp_path_factory):
    """A run folder whose encoder, a ResNet-18, was trained at 48 px."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    folder.mkdir()
    torch.manual_seed(0)
    save_encoder(folder / "encoder.safetensors", Encoder(Architecture(stem="7x7")), {})
    (folder / "config.json").write_text(json.dumps({"settings": {"method": "mulsupcon", "image_size": 48}}))
    return folder


@pytest.fixture
def small_parts(monkeypatch):
    monkeypatch.setattr(embeddings, "PART", 13)


def by_hand(encoder, paths, size):
    """Features of image files, one by one."""
    found = []
    for path in paths:
        pixels = np.asarray(Image.open(path).convert("L").resize((size, size), Image.Resampling.BILINEAR))
        with torch.no_grad():
            found.append(encoder(torch.tensor(pixels / 255, dtype=torch.float32)[None, None])[0].numpy())
    return np.stack(found)


def close(found, wanted):
    """Equal but for the order in which batches of another size are summed."""
    return np.allclose(found, wanted, rtol=1e-4, atol=1e-5)


def read(path):
    """The rows of a written file as (filename, features, {column: text})."""
    if path.suffix == ".npz":
        with np.load(path, allow_pickle=False) as found:
            labels = [dict(zip(found["fields"].tolist(), row, strict=True)) for row in found["labels"].tolist()]
            texts = [row | {"class": name} for row, name in zip(labels, found["classes"].tolist(), strict=True)]
            return list(zip(found["filenames"].tolist(), found["embeddings"], texts, strict=True))
    if path.suffix == ".csv":
        rows = list(csv.DictReader(io.StringIO(path.read_text(encoding="utf-8"), newline="")))
    else:
        rows = [
            {k: "" if v is None else v for k, v in row.items()} for row in parquet.read_table(path).to_pylist()
        ]
    names = [name for name in rows[0] if name.startswith("embedding_")]
    assert names == [f"embedding_{number}" for number in range(len(names))]
    assert list(rows[0])[: len(names) + 1] == ["filename", *names]
    return [
        (row["filename"], np.array([np.float32(row.pop(name)) for name in names]), row | {"filename": None})
        for row in rows
    ]


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("size", [None, 32])
def test_features_are_those_of_the_encoder_alone_at_the_size_of_its_run(archive, run, size):
    found = modan_fast.embed(archive, init=run, image_size=size, **SMALL)
    paths = sorted(archive.rglob("*.png"))
    assert found.filenames.tolist() == [path.relative_to(archive).as_posix() for path in paths]
    wanted = by_hand(modan_fast.load_encoder(run), paths, size or 48)
    assert found.embeddings.dtype == np.float32
    assert close(found.embeddings, wanted)
    assert not close(found.embeddings, np.roll(wanted, 1, axis=0))


def test_features_of_a_timm_encoder_are_those_of_the_encoder_alone(archive, tmp_path):
    file = tmp_path / "atto.pt"
    torch.save(Encoder(Architecture.of("timm/convnext_atto", channels=3)).weights, file)
    init = f"timm/convnext_atto={file}"
    for normalize in (True, False):
        found = modan_fast.embed(archive / "MR", init=init, image_size=32, normalize=normalize, **SMALL)
        encoder = modan_fast.load_encoder(init, normalize=normalize)
        wanted = by_hand(encoder, [archive / "MR" / name for name in found.filenames], 32)
        assert close(found.embeddings, wanted)


def test_imagenet_has_three_normalised_channels_or_one_of_their_sum(archive, tmp_path):
    torch.manual_seed(1)
    encoder = Encoder(Architecture(stem="7x7", channels=3)).eval()
    weights = {**encoder.weights, "fc.weight": torch.zeros(1000, 512), "fc.bias": torch.zeros(1000)}
    torch.save(weights, tmp_path / "imagenet.pth")
    settings = {"init": "imagenet", "imagenet_weights": tmp_path / "imagenet.pth", "image_size": 32, **SMALL}
    paths = sorted((archive / "US").rglob("*.png"))
    plain = modan_fast.embed(archive / "US", normalize=False, **settings)
    assert close(plain.embeddings, by_hand(encoder, paths, 32))
    mean, std = (torch.tensor(each)[:, None, None] for each in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    normalised = modan_fast.embed(archive / "US", **settings)
    network = encoder.network
    assert close(
        normalised.embeddings, by_hand(lambda x: network((x.expand(1, 3, 32, 32) - mean) / std), paths, 32)
    )


def test_an_image_has_the_same_features_and_labels_from_a_tree_a_table_and_a_shard_set(
    archive, run, shards, tmp_path
):
    names = sorted(path.relative_to(archive).as_posix() for path in archive.rglob("*.png"))[::-1]
    rows = [f"{name},{name.split('/')[0]},{name.split('/')[1]}" for name in names]
    (tmp_path / "table.csv").write_text("\n".join(["path,modality,region", *rows]))
    tree = modan_fast.embed(archive, init=run, **SMALL)
    table = modan_fast.embed(
        archive, init=run, table=[str(tmp_path / "table.csv")], fields="modality,region", **SMALL
    )
    stored = modan_fast.embed(shards, init=run, **SMALL)
    assert table.filenames.tolist() == names
    assert table.fields == ("modality", "region")
    assert tree.fields == stored.fields == ("modality", "anatomy")
    sources = [json.loads(text)["source"] for text in members(shards, ".json")]
    assert stored.filenames.tolist() == sources  # storage order
    place = {name: number for number, name in enumerate(tree.filenames)}
    for other in (table, stored):
        rows = [place[name] for name in other.filenames]
        assert close(other.embeddings, tree.embeddings[rows])
    rows = [place[name] for name in stored.filenames]
    assert (stored.labels == tree.labels[rows]).all()
    assert (stored.classes == tree.classes[rows]).all()
    assert tree.labels[place["US/liver/000.png"]].tolist() == ["US", "abd"]
    assert tree.classes[place["US/liver/000.png"]] == "US/abd/liver"


def members(shards, ending):
    for tar in sorted(shards.glob("*.tar")):
        with tarfile.open(tar) as opened:
            yield from (opened.extractfile(each).read() for each in opened if each.name.endswith(ending))


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_every_format_holds_what_is_returned_in_memory(shards, run, tmp_path, suffix, small_parts):
    out = tmp_path / f"features.{suffix}"
    written = modan_fast.embed(shards, init=run, out=out, **SMALL)
    wanted = modan_fast.embed(shards, init=run, **SMALL)
    rows = read(out)
    assert written.images == len(rows) == 48
    assert written.features == 512
    assert [name for name, *_ in rows] == wanted.filenames.tolist()
    assert (np.stack([features for _, features, _ in rows]) == wanted.embeddings).all()  # to the last bit
    for (_, _, texts), labels, category in zip(rows, wanted.labels, wanted.classes, strict=True):
        assert [texts["modality"], texts["anatomy"], texts["class"]] == [*labels, category]
    assert {path.name for path in tmp_path.iterdir()} == {out.name, f"{out.name}.json"}


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("source", ["archive", "shards"])
def test_a_stopped_embedding_continues_and_gives_the_same_bytes(
    source, suffix, run, tmp_path, small_parts, monkeypatch, request
):
    source = request.getfixturevalue(source)
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    modan_fast.embed(source, init=run, out=whole / f"f.{suffix}", **SMALL)

    def stop(stage, done, total, note):
        if stage == "embedding" and done > 30:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        modan_fast.embed(source, init=run, out=stopped / f"f.{suffix}", progress=stop, **SMALL)
    assert not (stopped / f"f.{suffix}").exists()
    computed = []
    features = embeddings._features
    monkeypatch.setattr(
        embeddings, "_features", lambda *given: computed.append(len(given[1])) or features(*given)
    )
    modan_fast.embed(source, init=run, out=stopped / f"f.{suffix}", **SMALL)
    assert sum(computed) == 48 - 2 * 13  # two parts were kept
    assert files(stopped) == files(whole)


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")
def test_a_killed_embedding_continues_and_gives_the_same_bytes(archive, run, tmp_path, small_parts):
    code = """
import os, signal, sys, modan_fast
from modan_fast import embeddings
embeddings.PART = 13
def kill(stage, done, total, note):
    if stage == "embedding" and done > 30: os.kill(os.getpid(), signal.SIGKILL)
modan_fast.embed(sys.argv[1], init=sys.argv[2], out=sys.argv[3], progress=kill, device="cpu", threads=2, batch_size=5)
"""
    out = tmp_path / "killed" / "f.npz"
    done = subprocess.run([sys.executable, "-c", code, archive, run, out], check=False)
    assert done.returncode == -signal.SIGKILL
    assert not out.exists()
    kept = sorted(path.name for path in (tmp_path / "killed" / "f.npz.parts").glob("*.npz"))
    assert [name[-10:] for name in kept] == ["000000.npz", "000001.npz"]
    modan_fast.embed(archive, init=run, out=out, **SMALL)
    modan_fast.embed(archive, init=run, out=tmp_path / "whole" / "f.npz", **SMALL)
    assert files(tmp_path / "killed") == files(tmp_path / "whole")


@pytest.mark.parametrize("moment", ["before the record", "after the record"])
def test_a_stop_while_the_file_is_written_costs_nothing(moment, archive, run, tmp_path, monkeypatch):
    real = embeddings.write_json

    def stop(*given):
        if moment == "after the record":
            real(*given)
        raise KeyboardInterrupt

    monkeypatch.setattr(embeddings, "write_json", stop)
    out = tmp_path / "stopped" / "f.npz"
    with pytest.raises(KeyboardInterrupt):
        modan_fast.embed(archive, init=run, out=out, **SMALL)
    assert not out.exists()
    monkeypatch.setattr(embeddings, "write_json", real)
    modan_fast.embed(archive, init=run, out=tmp_path / "whole" / "f.npz", **SMALL)
    monkeypatch.setattr(embeddings, "_features", None)  # nothing is computed again
    modan_fast.embed(archive, init=run, out=out, **SMALL)
    assert files(tmp_path / "stopped") == files(tmp_path / "whole")


def test_parts_of_other_settings_are_not_used(archive, run, tmp_path, small_parts):
    def stop(stage, done, total, note):
        if stage == "embedding" and done > 30:
            raise KeyboardInterrupt

    out = tmp_path / "f.npz"
    with pytest.raises(KeyboardInterrupt):
        modan_fast.embed(archive, init=run, out=out, progress=stop, **SMALL)
    assert len(list((tmp_path / "f.npz.parts").iterdir())) == 2
    modan_fast.embed(archive, init=run, out=out, image_size=32, **SMALL)
    with np.load(out) as found:
        assert (
            found["embeddings"] == modan_fast.embed(archive, init=run, image_size=32, **SMALL).embeddings
        ).all()


def test_a_finished_file_is_left_alone_and_another_is_not_replaced_unasked(archive, run, tmp_path):
    out = tmp_path / "f.npz"
    source = shutil.copytree(archive / "CT", tmp_path / "in")
    assert modan_fast.embed(source, init=run, out=out, **SMALL).made
    before = out.read_bytes(), out.stat().st_mtime_ns
    again = modan_fast.embed(source, init=run, out=out, **SMALL)
    assert not again.made
    assert (again.images, again.features) == (24, 512)
    assert (out.read_bytes(), out.stat().st_mtime_ns) == before

    changes = {"another size": {"image_size": 32}, "another source": {}}
    for name, settings in changes.items():
        if name == "another source":
            (source / "lung/Nodule/000.png").write_bytes((source / "lung/Nodule/001.png").read_bytes())
        with pytest.raises(InputError, match="another source, encoder or setting: pass `overwrite=True`"):
            modan_fast.embed(source, init=run, out=out, **settings, **SMALL)
        assert (out.read_bytes(), out.stat().st_mtime_ns) == before
    assert modan_fast.embed(source, init=run, out=out, overwrite=True, **SMALL).made
    assert out.read_bytes() != before[0]

    (tmp_path / "mine.csv").write_text("mine")
    with pytest.raises(InputError, match="mine.csv exists and has no mine.csv.json"):
        modan_fast.embed(source, init=run, out=tmp_path / "mine.csv", **SMALL)
    assert (tmp_path / "mine.csv").read_text() == "mine"


def test_images_that_cannot_be_read_are_left_out_and_listed(archive, run, tmp_path, small_parts):
    source = shutil.copytree(archive, tmp_path / "in")
    (source / "CT/abd/mass/003.png").write_bytes(b"no image")
    whole = (source / "US/liver/011.png").read_bytes()
    (source / "US/liver/011.png").write_bytes(whole[: len(whole) // 2])  # the last one of all
    (source / "CT/abd/mass/x.tif").write_bytes(b"II")
    out = tmp_path / "f.csv"
    written = modan_fast.embed(source, init=run, out=out, **SMALL)
    reasons = {each.source: each.reason for each in written.left_out}
    assert reasons == {
        "CT/abd/mass/003.png": "not a PNG or JPEG image",
        "US/liver/011.png": "truncated",
        "CT/abd/mass/x.tif": "not a PNG or JPEG image: convert it",
    }
    assert json.loads((tmp_path / "f.csv.json").read_text())["left_out"] == [
        {"source": each.source, "reason": each.reason} for each in written.left_out
    ]
    rows = {name: features for name, features, _ in read(out)}
    assert len(rows) == written.images == 46
    wanted = by_hand(modan_fast.load_encoder(run), [source / name for name in rows], 48)
    assert close(np.stack(list(rows.values())), wanted)
    again = modan_fast.embed(source, init=run, out=out, **SMALL)
    assert again.left_out == written.left_out


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_folder_of_any_layout_needs_no_labels(archive, run, tmp_path, suffix):
    (tmp_path / "in/deep/er").mkdir(parents=True)
    for name in ("a.png", "deep/er/b.png"):
        shutil.copy(archive / "US/liver/000.png", tmp_path / "in" / name)
    (tmp_path / "in/notes.txt").write_text("no image")
    out = tmp_path / f"f.{suffix}"
    modan_fast.embed(tmp_path / "in", init=run, out=out, **SMALL)
    assert [(name, texts.get("class")) for name, _, texts in read(out)] == [("a.png", ""), ("deep/er/b.png", "")]
    assert all("modality" not in texts for *_, texts in read(out))


def test_a_name_that_a_spreadsheet_would_run_is_quoted_in_csv_and_whole_elsewhere(archive, run, tmp_path):
    names = ["=cmd|' C calc'!A0.png", '-1,"2.png', "plain.png"]
    (tmp_path / "in").mkdir()
    for name in names:
        shutil.copy(archive / "US/liver/000.png", tmp_path / "in" / name)
    for suffix in SUFFIXES:
        modan_fast.embed(tmp_path / "in", init=run, out=tmp_path / f"f.{suffix}", **SMALL)
    exact = sorted(names)
    assert [name for name, *_ in read(tmp_path / "f.npz")] == exact
    assert [name for name, *_ in read(tmp_path / "f.parquet")] == exact
    assert [name for name, *_ in read(tmp_path / "f.csv")] == ["'" + exact[0], "'" + exact[1], exact[2]]


def test_a_line_end_or_an_escape_in_a_name_is_no_line_and_no_escape_in_a_file(archive, run, tmp_path):
    (tmp_path / "in").mkdir()
    shutil.copy(archive / "US/liver/000.png", tmp_path / "in" / "a\nb\x1b[2J\u202e.png")
    for suffix in SUFFIXES:
        modan_fast.embed(tmp_path / "in", init=run, out=tmp_path / f"f.{suffix}", **SMALL)
        ((name, *_),) = read(tmp_path / f"f.{suffix}")
        assert name == r"a\nb\x1b[2J\u202e.png"


def hostile_set(folder, record=None, *, fields=None, classes=("c",)):
    """A shard set of one image whose json member is `record`."""
    folder.mkdir()
    sample = Sample(bytes(range(256)) * 9, np.array([1], np.uint8), 0, {})
    tar = folder / "shard-000000.tar"
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(json, "dumps", lambda found: record)
        shard = write_shard(tar, [sample], first=0, extension="raw")
    Manifest(1, 48, "raw", fields or {"modality": ["CT"]}, list(classes), [shard], [], {}).save(folder)


@pytest.mark.parametrize(
    "record",
    [
        "",
        "{}",
        "[]",
        "null",
        "1",
        '{"source": 1}',
        '{"source": null}',
        '{"source": ["a"]}',
        "[" * 100_000,
        "x" * 2**21,
        '{"source": "%s"}' % ("x" * 5000),
        '{"source": NaN}',
        '{"source": 1' + "0" * 5000 + "}",
        '"source"',
    ],
    ids=range(14),
)
def test_a_hostile_record_of_a_sample_is_refused_in_one_line(record, run, tmp_path):
    hostile_set(tmp_path / "set", record)
    with pytest.raises(InputError, match=r"sample 00000000 cannot be used|has over 4,096 characters") as refused:
        modan_fast.embed(tmp_path / "set", init=run, **SMALL)
    assert len(str(refused.value).splitlines()) == 1
    assert len(str(refused.value)) < 500


def mutated(data, generator):
    """`data` with a byte flipped, a part cut, repeated or replaced."""
    at, end = sorted(generator.integers(0, len(data) + 1, 2).tolist())
    junk = generator.bytes(int(generator.integers(1, 9)))
    changes = [
        data[:at],
        data[:at] + junk + data[end:],
        data[:end] + data[at:],
        data[at:end],
        b"\xef\xbb\xbf" + data,
    ]
    return changes[int(generator.integers(len(changes)))]


def test_any_record_and_any_label_bytes_give_texts_of_bounded_length_or_one_line():
    manifest = Manifest(1, 2, "raw", {"modality": ["CT", "MR"]}, ["c"], [Shard("x", 1, 1, "0" * 64)], [], {})
    shards, generator = ShardSet("set", manifest, "0" * 64), np.random.default_rng(0)
    valid = {"json": b'{"fields": {"modality": "CT"}, "class": "c", "source": "a/b.png"}', "raw": b"\0\1\2\3"}
    valid |= {"labels": b"\1\0", "target": b"\0\0\0\0"}
    values = [
        b"null",
        b"1",
        b"NaN",
        b"[]",
        b"{}",
        b'""',
        b"-1",
        b"1e400",
        b'"\\ud800"',
        b'"\\u0000"',
        b"[" * 100_000,
    ]
    values += [
        b'"%s"' % (b"x" * 10_000),
        b'{"source": "b"}',
        b"9" * 5000,
        b'"../../a"',
        b'"\\u202e"',
        b"\xff",
        b"\0",
    ]
    cases = [{"json": valid["json"].replace(b'"a/b.png"', each)} for each in values]
    cases += [{"json": each} for each in values] + [
        {"json": b'{"source": %s, "source": %s}' % (a, b)} for a in values for b in values
    ]
    cases += [{name: mutated(valid[name], generator)} for name in valid for _ in range(500)]
    accepted, refused = 0, []
    for case in cases:
        content = b"".join(
            member_header(f"00000000.{name}", len(data)) + data + bytes(-len(data) % 512)
            for name in ("raw", "labels", "target", "json")
            for data in [(valid | case)[name]]
        )
        try:
            (item,) = embeddings._samples(shards, 0, 0, content, 2, 0)
            (name,) = embeddings._texts([item.name])
            assert name.isprintable()
            assert len(name) <= 10 * embeddings.LONGEST_NAME
            assert item.category == "c"
            accepted += 1
        except InputError as error:
            refused.append(str(error))
    assert accepted + len(refused) > 2000
    assert accepted > 100
    assert len(refused) > 1000
    assert not [message for message in refused if len(message.splitlines()) != 1 or len(message) > 1000]


def test_hostile_names_in_a_shard_set_are_made_printable(run, tmp_path):
    hostile_set(
        tmp_path / "set", r'{"source": "\u0000\ud800=\u001b[2J\u202e"}', fields={"\ud800\x1b": ["\x00\n"]}
    )
    for suffix in SUFFIXES:
        modan_fast.embed(tmp_path / "set", init=run, out=tmp_path / f"f.{suffix}", **SMALL)
        ((name, _, texts),) = read(tmp_path / f"f.{suffix}")
        assert name == r"\x00\ud800=\x1b[2J\u202e"
        assert texts[r"\ud800\x1b"] == r"\x00 "


@pytest.mark.parametrize("name", ["filename", "class", "embedding_3"])
def test_a_field_with_the_name_of_a_column_is_refused_where_it_would_be_one(name, run, tmp_path):
    hostile_set(tmp_path / "set", '{"source": "a"}', fields={name: ["CT"]})
    for suffix in ("csv", "parquet"):
        with pytest.raises(InputError, match=f"the label field {name} has the name of another column"):
            modan_fast.embed(tmp_path / "set", init=run, out=tmp_path / f"f.{suffix}", **SMALL)
    modan_fast.embed(tmp_path / "set", init=run, out=tmp_path / "f.npz", **SMALL)
    assert read(tmp_path / "f.npz")[0][2] in ({name: "CT", "class": "c"}, {"class": "c"})


def test_neither_headers_nor_names_of_dicom_files_are_written_or_said(run, tmp_path, monkeypatch, capfd, caplog):
    marker = "ZQXMARK"
    folder = tmp_path / "in" / marker
    folder.mkdir(parents=True)
    found = pydicom.dcmread(pydicom.data.get_testdata_file("MR_small.dcm"))
    for keyword in ("PatientName", "PatientID", "StudyDescription", "SeriesDescription", "InstitutionName"):
        setattr(found, keyword, marker)
    for number in range(3):
        found.save_as(folder / f"{marker}{number}.dcm")
    (folder / f"{marker}cut").write_bytes((folder / f"{marker}0.dcm").read_bytes()[:-500])
    (folder / f"{marker}text").write_text(marker)
    monkeypatch.chdir(tmp_path)
    for suffix in SUFFIXES:
        words = [
            "embed",
            "in",
            "--init",
            str(run),
            "--out",
            f"out/f.{suffix}",
            "--key",
            "a.key",
            "--threads",
            "1",
        ]
        monkeypatch.setattr(sys, "argv", ["modan-fast", *words, "--device", "cpu"])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        said = capfd.readouterr()
        assert not ended.value.code, said.err
        assert "3 images" in said.out
        assert "left out in all: 2" in said.out
        names = [name for name, *_ in read(tmp_path / f"out/f.{suffix}")]
        assert all(len(name) == 32 and set(name) <= set("0123456789abcdef") for name in names)
        record = (tmp_path / f"out/f.{suffix}.json").read_text()
        texts = [said.out, said.err, caplog.text, str(read(tmp_path / f"out/f.{suffix}")), record]
        texts += [path.read_bytes().decode("latin1") for path in (tmp_path / "out").iterdir()]
        assert not any(marker.lower() in text.lower() for text in texts)
    options = BuildOptions(size=48, workers=1, per_class=0, duplicates="keep", key=tmp_path / "a.key")
    build(tmp_path / "in", tmp_path / "set", options)
    stored = modan_fast.embed(tmp_path / "set", init=run, **SMALL)
    direct = modan_fast.embed(tmp_path / "in", init=run, key=tmp_path / "a.key", **SMALL)
    assert set(stored.filenames) == set(direct.filenames)  # named as `shard` names them
    assert close(stored.embeddings, direct.embeddings)  # three times the same pixels


def test_dicom_files_among_images_are_refused_rather_than_ignored(archive, run, tmp_path):
    source = shutil.copytree(archive / "US", tmp_path / "in")
    for number in range(3):
        shutil.copy(pydicom.data.get_testdata_file("MR_small.dcm"), source / f"IM{number}")
    with pytest.raises(InputError, match="holds DICOM files among its PNG or JPEG images"):
        modan_fast.embed(source, init=run, **SMALL)


def test_dicom_files_in_memory_need_a_named_key_and_nothing_is_written_without(run, tmp_path, monkeypatch):
    (tmp_path / "in").mkdir()
    shutil.copy(pydicom.data.get_testdata_file("MR_small.dcm"), tmp_path / "in" / "a")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="name the key's file with `key`"):
        modan_fast.embed("in", init=run, **SMALL)
    with pytest.raises(InputError, match="lies in in, each file of which is read as DICOM"):
        modan_fast.embed("in", init=run, out="in/f.npz", **SMALL)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["a", "in"]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"out": "f.txt"}, r"`out=.*f.txt` must end in .npz, .csv, .parquet"),
        ({"out": "f"}, "must end in"),
        ({"init": "scratch"}, "random weights"),
        ({"init": "nowhere"}, "no encoder at nowhere"),
        ({"imagenet_weights": "x.pth"}, "`imagenet_weights` needs `init=imagenet`"),
        ({"image_size": 8}, "`image_size` must be at least 32"),
        ({"batch_size": 0}, "`batch_size` must be at least 1"),
        ({"source": "nowhere"}, "nowhere does not exist"),
        ({"source": "empty"}, "no images in .*empty|no usable image in .*empty"),
        ({"source": "SHARDS", "fields": "modality"}, "`fields` is for folders and tables of images"),
        ({"out": "folder.npz"}, "folder.npz is a folder"),
        ({"colour": True}, "unknown setting `colour`"),
    ],
)
def test_wrong_use_is_one_clear_line_and_writes_nothing(
    settings, said, archive, shards, run, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.npz").mkdir()
    (tmp_path / "empty").mkdir()
    given = {"source": archive, "init": run, "out": "f.npz", **SMALL, **settings}
    given["source"] = shards if given["source"] == "SHARDS" else given["source"]
    with pytest.raises(InputError, match=said) as refused:
        modan_fast.embed(given.pop("source"), **given)
    assert len(str(refused.value).splitlines()) == 1
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["empty", "folder.npz"]


def test_without_pyarrow_parquet_is_refused_before_any_work(archive, run, tmp_path, monkeypatch):
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "pyarrow" else real(name))
    with pytest.raises(InputError, match=r"needs pyarrow: pip install 'modan-fast\[parquet\]'"):
        modan_fast.embed(archive, init=run, out=tmp_path / "f.parquet", **SMALL)
    assert not list(tmp_path.iterdir())


def test_features_that_are_not_finite_are_refused(archive, tmp_path):
    encoder = Encoder(Architecture(stem="7x7"))
    with torch.no_grad():
        for value in encoder.network.layer4.parameters():
            value.fill_(1e30)
    save_encoder(tmp_path / "huge.safetensors", encoder, {})
    with pytest.raises(InputError, match="features are not finite"):
        modan_fast.embed(
            archive, init=tmp_path / "huge.safetensors", image_size=32, out=tmp_path / "f.npz", **SMALL
        )
    assert not (tmp_path / "f.npz").exists()


def test_another_file_in_the_folder_of_parts_is_kept_and_named(archive, run, tmp_path):
    (tmp_path / "f.npz.parts").mkdir()
    (tmp_path / "f.npz.parts" / "mine").write_text("mine")
    with pytest.raises(InputError, match="mine is no part of an embedding"):
        modan_fast.embed(archive, init=run, out=tmp_path / "f.npz", **SMALL)
    assert (tmp_path / "f.npz.parts" / "mine").read_text() == "mine"


def test_the_command_says_what_it_wrote_and_what_it_left_out(archive, run, tmp_path, monkeypatch, capsys):
    source = shutil.copytree(archive / "US", tmp_path / "in")
    (source / "liver/bad.png").write_bytes(b"no image")

    def command(*more):
        words = ["modan-fast", "embed", str(source), "--init", str(run), "--device", "cpu", *more]
        monkeypatch.setattr(sys, "argv", words)
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return ended.value.code or 0, capsys.readouterr()

    out = str(tmp_path / "f.npz")
    code, said = command("--out", out)
    assert code == 0
    assert said.out.splitlines() == [
        f"{out}: 12 images, 512 features each",
        "left out: liver/bad.png: not a PNG or JPEG image",
        f"left out in all: 1 (1 not a PNG or JPEG image), see {out}.json",
    ]
    code, said = command("--out", out)
    assert code == 0
    assert "left as it is" in said.out
    for more, words in (((), "--out FILE.npz"), (("--out", out, "--image-size", "32"), "pass --overwrite")):
        code, said = command(*more)
        assert code == 2
        assert words in said.err
        assert len(said.err.splitlines()) == 1
    assert command("--out", out, "--image-size", "32", "--overwrite")[0] == 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_a_gpu_gives_the_features_of_a_cpu(archive, run):
    settings = {"precision": "float32", "batch_size": 5}
    on_gpu = modan_fast.embed(archive, init=run, device="cuda", **settings).embeddings
    on_cpu = modan_fast.embed(archive, init=run, device="cpu", **settings).embeddings
    assert np.abs(on_gpu - on_cpu).max() < 1e-2 * np.abs(on_cpu).max()  # TF32
    assert (on_gpu == modan_fast.embed(archive, init=run, device="cuda", **settings).embeddings).all()


def test_real_images_have_the_features_of_the_encoder_alone(real_data, run, tmp_path):
    source = tmp_path / "in"
    for folder in ("CT/kidney/cyst", "XR/lung/mixed"):
        (source / folder).mkdir(parents=True)
        for path in sorted((real_data / "radiology" / folder).iterdir())[:4]:
            shutil.copy(path, source / folder / path.name)
    found = modan_fast.embed(source, init=run, **SMALL)
    assert close(
        found.embeddings, by_hand(modan_fast.load_encoder(run), [source / n for n in found.filenames], 48)
    )
    assert os.path.isdir(source)
