"""A set as text, contact sheet and page, against what the webdataset library reads."""

import base64
import io
import json
import shutil
from collections import Counter
from html.parser import HTMLParser

import numpy as np
import pytest
import webdataset
from PIL import Image

from shard_builder.build import build
from shard_builder.inspect import describe, kinds, read_contents, read_images
from shard_builder.manifest import Rejected
from shard_builder.options import BuildOptions
from shard_builder.settings import InputError
from shard_builder.sheet import CELL, strips, write_sheet


@pytest.fixture(params=["png", "raw"])
def made(request, tree, tmp_path):
    """A set of 49 images in three shards; one image of the tree is in it under two classes, and one is empty."""
    shutil.copy(tree / "CT/abd/normal/CT 3.png", tree / "CT/lung/Nodule/<b>.png")
    Image.new("L", (30, 30), 0).save(tree / "US/liver/US 5.png")
    out = tmp_path / "set"
    build(tree, out, BuildOptions(size=24, codec=request.param, workers=1, samples_per_shard=20))
    return out


def samples_of(folder):
    return list(webdataset.WebDataset([str(each) for each in sorted(folder.glob("*.tar"))], shardshuffle=False))


def test_the_counts_are_those_of_the_metadata(made):
    contents, metadata = read_contents(made), [json.loads(each["json"]) for each in samples_of(made)]
    assert contents.classes == Counter(each["class"] for each in metadata)
    for field, counts in contents.values.items():
        assert counts == Counter(each["fields"][field] for each in metadata)
    for title, ids in contents.groups(4).items():
        assert ids == [n for n, each in enumerate(metadata) if " ".join(each["fields"].values()) == title][:4]


def test_samples_without_a_value_are_counted_as_such(made):
    contents = read_contents(made)
    contents.labels[:7, :3] = 0
    assert contents.values["modality"][""] == 7
    assert "(none)" in describe(contents)
    assert set(contents.groups(3)) > {"abd"}


def test_images_are_found_by_their_ids(made):
    samples, ids = samples_of(made), [0, 48, 19, 20, 21, 7]
    manifest = read_contents(made).manifest
    for sample, image in zip(ids, read_images(made, manifest, ids), strict=True):
        data = samples[sample]["raw" if manifest.codec == "raw" else "png"]
        expected = data if manifest.codec == "raw" else Image.open(io.BytesIO(data)).tobytes()
        assert image.tobytes() == expected


def test_the_description_lists_sizes_counts_and_what_was_left_out(made):
    said = describe(read_contents(made))
    assert said.startswith("49 images of 24 x 24 pixels, ")
    for line in ("modality (3)", "CT 20", "class (5)", "US/abd/liver 9", "left out (2)", "label conflict 1"):
        assert line in " ".join(said.split()), line


def test_the_sheet_shows_the_first_images_of_each_modality_and_anatomy(made, tmp_path):
    rows = list(strips(read_contents(made)))
    assert [title for title, _ in rows] == ["CT abd", "CT lung", "MR shoulder", "US abd", "US thyroid"]
    write_sheet(tmp_path / "sheet.png", rows)
    sheet = np.asarray(Image.open(tmp_path / "sheet.png"))
    contents = read_contents(made)
    for title, row in rows:
        (image, *_) = read_images(made, contents.manifest, contents.groups(1)[title])
        shown = np.asarray(image.resize((CELL - 2, CELL - 2), Image.Resampling.BILINEAR))
        cell = np.asarray(row)[1 : CELL - 1, : CELL - 2]
        assert np.array_equal(cell, shown)
        assert any(np.array_equal(sheet[top : top + CELL - 2, 4 : CELL + 2], shown) for top in range(len(sheet)))


class Page(HTMLParser):
    """The texts, links and table rows of a page."""

    def __init__(self, text):
        super().__init__()
        self.links, self.rows, self.texts = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.links += [value for name, value in attributes if name in {"src", "href"}]
        if tag == "tr":
            self.rows.append([])
        elif tag == "h2":
            self.rows.append(["heading"])

    def handle_data(self, data):
        self.texts.append(data)
        if self.rows and data.strip():
            self.rows[-1].append(data)


def test_the_page_needs_no_other_file_and_shows_counts_sizes_duplicates_and_rejections(made):
    page = Page((made / "report.html").read_text("utf-8"))
    assert len(page.links) == 5
    for link in page.links:
        kind, _, data = link.partition(",")
        assert kind == "data:image/jpeg;base64"
        assert Image.open(io.BytesIO(base64.b64decode(data))).height == CELL
    assert not [text for text in page.texts if "url(" in text or "@import" in text]
    assert ["CT", "20"] in page.rows
    assert ["US/abd/liver", "9"] in page.rows
    assert ["40 × 30", "49"] in page.rows
    assert ["CT/abd/normal/CT 3.png (CT/abd/normal); CT/lung/Nodule/<b>.png (CT/lung/Nodule)"] in page.rows
    assert ["CT/lung/Nodule/<b>.png", "label conflict: the same pixels as CT/abd/normal/CT 3.png"] in page.rows
    assert (made / "report.html").stat().st_size < 100_000


def test_reasons_are_counted_by_their_kind():
    reasons = ("duplicate: the same pixels as a: b", "duplicate: x", "truncated", "empty: every pixel is 3")
    assert list(kinds(Rejected("a", reason) for reason in reasons).items()) == [
        ("duplicate", 2),
        ("empty", 1),
        ("truncated", 1),
    ]


def test_a_damaged_set_is_sent_to_verify(made):
    tar = made / "shard-000001.tar"
    index = tar.with_suffix(".idx")
    index.write_text(index.read_text().replace(" 4 ", " 3 "))
    with pytest.raises(
        InputError, match=r"shard-000001\.tar is damaged: run `modan-fast verify .*set` for details"
    ):
        read_contents(made)
