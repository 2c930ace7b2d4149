"""Contact sheets: a row of small images for each modality and anatomy, as images or a PNG file."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from shard_builder.atomic import replacing
from shard_builder.inspect import MOST_LETTERS, Contents, read_images
from shard_builder.settings import printable

COLUMNS = 8
CELL = 96  # pixels


def strips(contents: Contents, columns: int = COLUMNS) -> Iterator[tuple[str, Image.Image]]:
    """For each combination of the first two fields, its name and its first images side by side."""
    for title, samples in contents.groups(columns).items():
        yield title, strip(read_images(contents.folder, contents.manifest, samples), columns)


def strip(images: Iterable[Image.Image], columns: int) -> Image.Image:
    """At most `columns` images side by side on white, each `CELL` pixels wide."""
    row = Image.new("L", (columns * CELL, CELL), 255)
    for column, image in enumerate(images):
        row.paste(image.resize((CELL - 2, CELL - 2), Image.Resampling.BILINEAR), (column * CELL, 1))
    return row


def write_sheet(path: Path, rows: Sequence[tuple[str, Image.Image]]) -> None:
    """Write a PNG file of rows of images, each below its name."""
    line = 18  # pixels of a name
    sheet = Image.new("L", (max(row.width for _, row in rows) + 8, len(rows) * (CELL + line) + 4), 255)
    draw = ImageDraw.Draw(sheet)
    for number, (title, row) in enumerate(rows):
        top = number * (CELL + line)
        # Pillow's own font in its plainest form has Latin-1 only. What is beyond the edge is not drawn.
        shown = printable(title[:MOST_LETTERS]).encode("latin-1", "replace").decode("latin-1")
        draw.text((4, top + 4), shown, 0, ImageFont.load_default())
        sheet.paste(row, (4, top + line))
    with replacing(path) as file:
        sheet.save(file, "PNG")
