"""The manifest, and the checks of a set's files against it."""

import json
import shutil

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shard_builder.build import build
from shard_builder.manifest import Manifest, Rejected, Shard
from shard_builder.options import BuildOptions
from shard_builder.settings import InputError

vocabulary = st.lists(st.text(max_size=4), max_size=4, unique=True).map(sorted)
shard_lists = st.lists(
    st.builds(
        Shard,
        st.integers(0, 10**7).map(lambda number: f"shard-{number:06}.tar"),
        st.integers(1, 10**6),
        st.integers(0, 2**50),
        st.binary(min_size=32, max_size=32).map(bytes.hex),
    ),
    min_size=1,
    max_size=3,
    unique_by=lambda shard: shard.name,
)
manifests = st.builds(
    lambda shards, **rest: Manifest(samples=sum(each.samples for each in shards), shards=shards, **rest),
    shard_lists,
    size=st.integers(1, 8192),
    codec=st.sampled_from(["png", "jpeg", "raw"]),
    fields=st.dictionaries(st.text(max_size=4), vocabulary, max_size=3),
    classes=vocabulary,
    rejected=st.lists(st.builds(Rejected, st.text(max_size=9), st.text(max_size=9)), max_size=3),
    options=st.dictionaries(st.text(max_size=4), st.integers() | st.none() | st.text(max_size=3), max_size=3),
)


@settings(max_examples=60)
@given(manifests)
def test_a_manifest_reads_back_as_it_was_saved(tmp_path_factory, manifest):
    folder = tmp_path_factory.mktemp("set")
    manifest.save(folder)
    assert Manifest.load(folder) == manifest
    assert len(manifest.labels) == manifest.bits
    assert [path.name for path in folder.iterdir()] == ["manifest.json"]


@pytest.fixture
def made(tree, tmp_path):
    """A set of 50 images in three shards."""
    out = tmp_path / "shards"
    build(tree, out, BuildOptions(size=16, workers=1, samples_per_shard=20))
    return out


def test_the_error_for_a_folder_without_a_manifest_says_how_to_make_one(tmp_path):
    with pytest.raises(InputError, match=r"no shard set at .*shards: make one with `modan-fast shard SOURCE`"):
        Manifest.load(tmp_path / "shards")
    with pytest.raises(InputError, match=r"holds no manifest\.json: make one with"):
        Manifest.load(tmp_path)


def test_another_format_is_named_beside_the_one_that_is_read(made):
    change(made, format=2)
    with pytest.raises(InputError, match="written by format 2, this version reads 1: "):
        Manifest.load(made)


def change(folder, **values):
    path = folder / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("samples", "50"),
        ("samples", True),
        ("samples", 51),
        ("samples", 10**8 + 1),
        ("size", 0),
        ("size", 8193),
        ("size", 10**400),
        ("codec", "gif"),
        ("fields", {"modality": ["US", "CT"]}),
        ("fields", ["modality"]),
        ("classes", [1]),
        ("shards", {}),
        ("shards", [{"name": "shard-000000.tar"}]),
        ("shards", [{"name": "../../shard-000000.tar", "samples": 50, "bytes": 1, "sha256": "0" * 64}]),
        ("shards", [{"name": "shard-000000.tar", "samples": 50, "bytes": 1, "sha256": "0"}]),
        ("shards", [{"name": "shard-٠٠٠٠٠٠.tar", "samples": 50, "bytes": 1, "sha256": "0" * 64}]),
        ("shards", [{"name": "shard-000000.tar", "samples": 50, "bytes": 2**63, "sha256": "0" * 64}]),
        ("shards", 2 * [{"name": "shard-000000.tar", "samples": 25, "bytes": 1, "sha256": "0" * 64}]),
        ("rejected", [{"source": 1, "reason": ""}]),
        ("options", None),
    ],
)
def test_a_wrong_value_is_named_by_its_key(made, key, value):
    change(made, **{key: value})
    with pytest.raises(InputError, match=rf"manifest\.json: {key}.* must be") as caught:
        Manifest.load(made)
    assert "\n" not in str(caught.value)


@settings(max_examples=60)
@given(
    key=st.sampled_from(
        ["format", "samples", "size", "codec", "fields", "classes", "shards", "rejected", "options"]
    ),
    value=st.recursive(
        st.none() | st.booleans() | st.integers(-3, 3) | st.text(max_size=3),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
        max_leaves=5,
    ),
)
def test_any_json_is_a_manifest_or_an_input_error(tmp_path_factory, key, value):
    folder = tmp_path_factory.mktemp("set")
    shard = Shard("shard-000000.tar", 1, 1, "0" * 64)
    Manifest(1, 8, "png", {}, [], [shard], [], {}).save(folder)
    change(folder, **{key: value})
    try:
        Manifest.load(folder)
    except InputError as error:
        assert "\n" not in str(error)  # noqa: PT017


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "\xff", '{"format": 1}'])
def test_other_texts_are_no_manifest(tmp_path, text):
    (tmp_path / "manifest.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(InputError, match=r"manifest\.json"):
        Manifest.load(tmp_path)


def test_a_whole_set_passes_the_checks(made):
    manifest, seen = Manifest.load(made), []
    manifest.check_files(made)
    manifest.check_hashes(made, lambda *state: seen.append(state))
    assert seen[-1] == ("checking", 3, 3, "")


def test_files_that_do_not_fit_are_named(made):
    manifest = Manifest.load(made)

    def fails(match):
        with pytest.raises(InputError, match=match):
            manifest.check_files(made)

    tar, index = made / "shard-000001.tar", made / "shard-000001.idx"
    whole, lines = tar.read_bytes(), index.read_bytes()
    tar.write_bytes(whole[:-1])
    fails(r"shard-000001\.tar has [\d,]+ bytes, not the [\d,]+ of its manifest")
    tar.unlink()
    fails(r"shard-000001\.tar cannot be read \(No such file")
    tar.write_bytes(whole)
    index.unlink()
    fails(r"shard-000001\.idx cannot be read \(No such file")
    shutil.copy(made / "shard-000002.idx", index)
    fails(r"shard-000001\.idx does not fit its shard: its first line is 'v1\.2 10'")
    index.write_bytes(b"\xff\xfe")
    fails(r"shard-000001\.idx does not fit its shard")
    index.write_bytes(lines.replace(b".json\n", b".json\n\n", 1))
    fails(r"shard-000001\.idx does not fit its shard")
    index.write_bytes(lines)
    manifest.check_files(made)


def test_one_changed_bit_is_found_by_the_hashes_and_the_shard_is_named(made):
    tar = made / "shard-000002.tar"
    data = bytearray(tar.read_bytes())
    data[700] ^= 1
    tar.write_bytes(data)
    manifest = Manifest.load(made)
    manifest.check_files(made)
    with pytest.raises(InputError, match=r"shard-000002\.tar has another SHA-256"):
        manifest.check_hashes(made)
    tar.unlink()
    with pytest.raises(InputError, match=r"shard-000002\.tar cannot be read"):
        manifest.check_hashes(made)
