"""`report.html`: one page with a shard set's images, counts and rejections. The same set gives the same bytes."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from io import BytesIO
from itertools import islice
from pathlib import Path
from string import Template

from PIL import Image

from shard_builder.atomic import replacing
from shard_builder.duplicates import labels_of
from shard_builder.entries import Entry, as_text
from shard_builder.inspect import Contents, kinds
from shard_builder.sheet import strips

NAME = "report.html"
MOST = 200  # rows of a table; the manifest lists the rest

PAGE = Template("""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>Shard set: $images images</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>
body { font: 15px/1.45 system-ui, sans-serif; color: #111; background: #fff; max-width: 60rem; margin: 2rem auto;
  padding: 0 1rem }
h1 { font-size: 1.5rem } h2 { font-size: 1.15rem; margin-top: 2rem; border-bottom: 1px solid #999 }
h3 { font-size: 1rem; margin: 1rem 0 .2rem; font-weight: 600 }
table { border-collapse: collapse; width: 100% } td, th { text-align: left; padding: .1rem .6rem .1rem 0;
  vertical-align: top; overflow-wrap: anywhere }
td.n { text-align: right; white-space: nowrap; width: 6rem } td.b { width: 45% }
td.b div { background: #4a6fa5; height: .8rem; margin-top: .3rem; print-color-adjust: exact }
img { max-width: 100%; display: block } tr, h3, img { break-inside: avoid } h2, h3 { break-after: avoid }
@media print { body { margin: 0; max-width: none; font-size: 11px } }
</style></head><body>
<h1>$images images of $classes classes</h1>
<p>$facts</p>
$body
</body></html>
""")


def write_report(
    folder: Path, contents: Contents, sizes: Mapping[tuple[int, int], int], duplicates: Sequence[Sequence[Entry]]
) -> None:
    """Write the report into `folder`.

    `sizes` counts the packed images by width and height of their files, in pixels; `duplicates` are the groups of
    images with the same pixels.
    """
    manifest = contents.manifest
    options = ", ".join(
        f"{name} {value}" for name, value in manifest.options.items() if isinstance(value, str | int)
    )
    facts = (
        f"{manifest.size} × {manifest.size} pixels, {manifest.codec}, {len(manifest.shards):,} shards, "
        f"{sum(shard.bytes for shard in manifest.shards) / 2**20:,.1f} MiB; {options}. "
        "This page shows images and file names: protect it as you protect the archive."
    )
    images = [f"<h3>{escape(title)}</h3>{_image(title, row)}" for title, row in strips(contents)]
    fields = [
        _section(f"By {name}", [_bars((value or "(none)", count) for value, count in counts.items())])
        for name, counts in contents.values.items()
    ]
    rejected = [_bars(kinds(manifest.rejected).items())] if manifest.rejected else ["<p>Nothing.</p>"]
    rejected.append(_table(((each.source, each.reason) for each in manifest.rejected), len(manifest.rejected)))
    sections = [
        _section("Images", images),
        *fields,
        _section("By class", [_bars(contents.classes.items())]),
        _section("Sizes of the original images", [_bars(_size_counts(sizes))]),
        _duplicates(duplicates),
        _section(f"Left out ({len(manifest.rejected):,})", rejected),
    ]
    page = PAGE.substitute(
        images=f"{manifest.samples:,}",
        classes=f"{len(manifest.classes):,}",
        facts=escape(facts),
        body="\n".join(sections),
    )
    with replacing(folder / NAME) as file:
        file.write(page.encode("utf-8", "backslashreplace"))


def _size_counts(sizes: Mapping[tuple[int, int], int]) -> list[tuple[str, int]]:
    """Sizes as texts with their counts, most frequent first; those after the first `MOST` are summed up."""
    ordered = sorted(sizes.items(), key=lambda each: (-each[1], each[0]))
    counts = [(f"{width} × {height}", count) for (width, height), count in ordered]
    rest = counts[MOST:]
    return counts[:MOST] + ([(f"{len(rest):,} other sizes", sum(count for _, count in rest))] if rest else [])


def _duplicates(groups: Sequence[Sequence[Entry]]) -> str:
    """The groups of images with the same pixels; those with different labels come first."""
    conflicts = [group for group in groups if len(set(map(labels_of, group))) > 1]
    others = [group for group in groups if len(set(map(labels_of, group))) == 1]

    def table_of(groups: Sequence[Sequence[Entry]]) -> str:
        texts = ([f"{as_text(each.source)} ({each.category})" for each in group] for group in groups)
        rows = (["; ".join(text[:8]) + (" …" if len(text) > 8 else "")] for text in texts)
        return _table(rows, len(groups), "manifest.json lists them all, unless the option duplicates is keep")

    blocks = [
        f"<h3>{len(some):,} {which}</h3>{table_of(some)}"
        for some, which in ((conflicts, "with different labels"), (others, "with the same labels"))
        if some
    ]
    return _section(f"Images with the same pixels ({len(groups):,} groups)", blocks or ["<p>None.</p>"])


def _section(title: str, blocks: Iterable[str]) -> str:
    return f"<h2>{escape(title)}</h2>\n" + "\n".join(blocks)


def _bars(counts: Iterable[tuple[str, int]]) -> str:
    """A table of counts, with a bar for each."""
    rows = list(counts)
    most = max(count for _, count in rows)
    cells = (
        f'<tr><td>{escape(name)}</td><td class="n">{count:,}</td>'
        f'<td class="b"><div style="width:{100 * count / max(most, 1):.1f}%"></div></td></tr>'
        for name, count in rows
    )
    return "<table>" + "\n".join(cells) + "</table>"


def _table(rows: Iterable[Sequence[str]], total: int, where: str = "manifest.json lists them all") -> str:
    """A table of the first rows of texts, and `where` to find the others."""
    shown = ["<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in islice(rows, MOST)]
    more = f"<p>{total - len(shown):,} more: {where}.</p>" if total > len(shown) else ""
    return f"<table>{chr(10).join(shown)}</table>{more}"


def _image(title: str, row: Image.Image) -> str:
    file = BytesIO()
    row.save(file, "JPEG", quality=75)
    return (
        f'<img alt="{escape(title)}" src="data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}">'
    )
