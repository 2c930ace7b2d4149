"""Every kind of damage to a finished set is found and named by its first bad member."""

import hashlib
import io
import json
import shutil
import struct
import tarfile

import numpy as np
import pytest
from PIL import Image

from shard_builder.build import build
from shard_builder.index import Member, format_index
from shard_builder.manifest import Manifest
from shard_builder.options import BuildOptions
from shard_builder.settings import InputError
from shard_builder.verify import verify

CODECS = {"png": "png", "jpeg": "jpg", "raw": "raw"}


@pytest.fixture(scope="module")
def whole(tmp_path_factory, archive):
    """A set of 48 images in three shards for each codec."""
    root = tmp_path_factory.mktemp("sets")
    for codec in CODECS:
        build(archive, root / codec, BuildOptions(size=24, codec=codec, workers=1, samples_per_shard=20))
    return root


@pytest.fixture
def made(whole, tmp_path):
    """A copy of the PNG set, to damage."""
    return shutil.copytree(whole / "png", tmp_path / "set")


def members(tar):
    with tarfile.open(tar) as opened:
        return {each.name: opened.extractfile(each).read() for each in opened}


def span(tar, name):
    """Offset and size of a member's bytes in the tar."""
    with tarfile.open(tar) as opened:
        return opened.getmember(name).offset_data, opened.getmember(name).size


def write(folder, changed):
    """Write the second shard again with changed members, and an index and a manifest that fit it."""
    tar = folder / "shard-000001.tar"
    whole, lines = {**members(tar), **changed}, []
    with tarfile.open(tar, "w", format=tarfile.USTAR_FORMAT) as opened:
        for name, data in whole.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            opened.addfile(member, io.BytesIO(data))
    with tarfile.open(tar) as opened:
        for member in opened:
            if member.name.endswith("png"):
                lines.append([])
            lines[-1].append(Member(member.name[9:], member.offset_data, member.size, member.name))
    tar.with_suffix(".idx").write_text(format_index(lines))
    manifest = json.loads((folder / "manifest.json").read_text())
    data = tar.read_bytes()
    manifest["shards"][1] |= {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (folder / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("workers", [1, 2])
def test_a_whole_set_has_no_damage(whole, codec, workers):
    seen = []
    found = verify(whole / codec, workers=workers, progress=lambda *state: seen.append(state))
    assert (found.samples, found.shards, found.damage) == (48, 3, [])
    assert found.bytes == sum(path.stat().st_size for path in (whole / codec).glob("*.tar"))
    assert seen[-1] == ("verifying", 48, 48, "")


def test_a_set_that_another_program_wrote_by_the_format_is_whole(made):
    write(made, {})
    assert verify(made, workers=1).damage == []


@pytest.mark.parametrize("codec", CODECS)
def test_each_changed_byte_is_found_and_its_member_is_named_where_it_can_be(whole, tmp_path, codec):
    folder = shutil.copytree(whole / codec, tmp_path / "set")
    tar, generator = folder / "shard-000002.tar", np.random.default_rng(0)
    content = tar.read_bytes()
    with tarfile.open(tar) as opened:
        all_members = opened.getmembers()
    for at in generator.integers(0, len(content), 60).tolist():
        tar.write_bytes(content[:at] + bytes([content[at] ^ 1 << int(generator.integers(8))]) + content[at + 1 :])
        (line,) = verify(folder, workers=1).damage
        hit = [each for each in all_members if each.offset <= at < each.offset_data + each.size]
        # Pixels of a JPEG or raw member, and the name of a source, have no checksum but the shard's.
        if hit and (codec == "png" or at < hit[0].offset_data) and not hit[0].name.endswith("json"):
            sample = hit[0].name[:8]
            assert line.startswith(f"shard-000002.tar: {sample}."), (line, hit[0].name)
        else:
            assert line.startswith("shard-000002.tar: ")


def test_a_tar_that_ends_early_is_named_by_the_member_that_it_ends_in(made):
    tar = made / "shard-000001.tar"
    offset, _ = span(tar, "00000031.png")
    tar.write_bytes(tar.read_bytes()[: offset + 100])
    assert verify(made).damage == ["shard-000001.tar: 00000031.png: the tar ends within it"]
    tar.unlink()
    assert verify(made).damage == ["shard-000001.tar: cannot be read: No such file or directory"]


def test_bytes_between_and_after_the_members_are_checked_too(made):
    tar = made / "shard-000001.tar"
    content = bytearray(tar.read_bytes())
    offset, size = span(tar, "00000030.json")
    content[offset + size] = 1
    tar.write_bytes(content)
    assert verify(made, workers=1).damage == [
        "shard-000001.tar: 00000030.json: the padding after it is not empty"
    ]
    content[offset + size] = 0
    for end in (bytes(512), b""):
        tar.write_bytes(content + end if end else content[:-1])
        assert verify(made, workers=1).damage == ["shard-000001.tar: it does not end after 00000039.json"]


def png(image):
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


SMALL, COLOUR = png(Image.new("L", (23, 24))), png(Image.new("RGB", (24, 24)))


def whole_png():
    """A PNG file of the set's canvas."""
    return png(Image.effect_noise((24, 24), 60))


METADATA = {"fields": {"modality": "CT", "anatomy": "lung"}, "class": "CT/lung/Nodule", "source": "a"}


@pytest.mark.parametrize(
    ("member", "data", "said"),
    [
        ("png", b"no image", "cannot be decoded as png: UnidentifiedImageError"),
        ("png", SMALL, "is 23 x 24 L, not 24 x 24 grey"),
        ("png", COLOUR, "is 24 x 24 RGB, not 24 x 24 grey"),
        ("png", SMALL[:-14], "truncated"),
        ("png", whole_png()[:-14], "truncated"),
        ("labels", bytes(6), "are not the bits of the fields in 00000025.json"),
        ("labels", b"", "are not the bits of the fields in 00000025.json"),
        ("target", struct.pack("<i", 7), "is not the class in 00000025.json"),
        ("json", b"{", "is not an object with fields, class and source"),
        ("json", b"[]", "is not an object with fields, class and source"),
        ("json", json.dumps({**METADATA, "fields": {"view": "ap"}}).encode(), "is not an object with fields"),
        ("json", json.dumps({**METADATA, "fields": ["modality"]}).encode(), "is not an object with fields"),
        (
            "json",
            json.dumps({**METADATA, "fields": {"modality": "PT"}}).encode(),
            "a value of its fields is not in",
        ),
        ("json", json.dumps({**METADATA, "class": "x"}).encode(), "its class is not in manifest.json"),
    ],
)
def test_members_that_do_not_fit_each_other_are_named_though_all_checksums_fit(made, member, data, said):
    changed = {f"00000025.{member}": data}
    if member == "json":
        names = Manifest.load(made).labels
        changed["00000025.labels"] = bytes(int(name in {"modality=CT", "anatomy=lung"}) for name in names)
    write(made, changed)
    (line,) = verify(made, workers=1).damage
    assert line.startswith(f"shard-000001.tar: 00000025.{member}: {said}")


def test_a_wrong_index_is_named(made):
    index = made / "shard-000000.idx"
    lines = index.read_text()
    index.write_text(lines.replace("png 512 ", "png 513 ", 1))
    assert verify(made, workers=1).damage == [
        "shard-000000.tar: 00000000.png: its entry in the index shard-000000.idx is wrong"
    ]
    first, rest = lines.split("\n", 2)[:2], lines.split("\n", 2)[2]
    index.write_text("\n".join([first[0], first[1] + " png 99 5 evil.png", rest]))
    assert verify(made, workers=1).damage == [
        "shard-000000.tar: 00000000.json: the index shard-000000.idx has more entries after it"
    ]
    index.write_text("v1.2 0\n")
    (line,) = verify(made, workers=1).damage
    assert line == "shard-000000.tar: its index shard-000000.idx has 0 samples, manifest.json 20"
    index.write_text("nothing")
    assert "its index shard-000000.idx is damaged" in verify(made, workers=1).damage[0]


def test_all_bad_shards_are_listed_in_order_and_so_is_a_tar_or_index_that_the_manifest_lacks(made):
    shutil.copy(made / "shard-000002.tar", made / "shard-000009.tar")
    shutil.copy(made / "shard-000002.idx", made / "shard-000008.idx")
    for number in (2, 0):
        (made / f"shard-00000{number}.tar").write_bytes(b"")
    assert [line.partition(": ")[0] for line in verify(made).damage] == [
        "shard-000000.tar",
        "shard-000002.tar",
        "shard-000008.idx",
        "shard-000009.tar",
    ]


def test_a_damaged_manifest_is_damage_and_none_at_all_is_wrong_use(made, tmp_path):
    (made / "manifest.json").write_text("{")
    assert "manifest.json is not valid JSON" in verify(made).damage[0]
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(InputError, match="make one with"):
            verify(folder)
