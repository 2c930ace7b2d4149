"""Source to shard set: choose, decode in parallel, number what is left, write the shards, put them in place."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, get_args

from shard_builder import image
from shard_builder.atomic import replacing, sync_folder
from shard_builder.labels import multi_hot, vocabularies
from shard_builder.manifest import Codec, Manifest, Rejected, Shard
from shard_builder.output import building, check_place, existing_set, put_in_place, recover
from shard_builder.scan import Entry, Scan, as_text, choose, scan_tree
from shard_builder.settings import InputError, Report, option, silent, usable_cores
from shard_builder.workers import pool_of, run_in_order
from shard_builder.writer import Sample, write_shard

CHUNK = 128  # images that a worker packs at a time: half a second of work, two megabytes


@dataclass(frozen=True)
class BuildOptions:
    """How a shard set is made. Raises `InputError` for settings that make no sense."""

    per_class: int = option(100, "Images to draw from each class at random; 0 takes all.")
    size: int = option(224, "Side of the stored images in pixels.")
    codec: Codec = option(
        "png", "How pixels are stored: png (lossless), jpeg (quality 95) or raw (fastest to read)."
    )
    seed: int = option(0, "Seed of the choice and of the storage order.")
    workers: int | None = option(None, "Processes that read images; all cores by default.")
    anatomy: tuple[str, ...] = option((), "Anatomy of a folder that has none, as PATH=VALUE: US/spleen2=abd.")
    skip_unknown: bool = option(False, "Leave out folders whose anatomy is not known.")
    samples_per_shard: int = option(1000, "Images in one tar.")

    def __post_init__(self) -> None:
        for name, value, least in (
            ("per-class", self.per_class, 0),
            ("size", self.size, 1),
            ("workers", self.workers, 1),
            ("samples-per-shard", self.samples_per_shard, 1),
        ):
            if value is not None and value < least:
                raise InputError(f"--{name} must be at least {least}, got {value}")
        if self.size > 8192:
            raise InputError(f"--size must be at most 8192, got {self.size}")
        if self.codec not in get_args(Codec):
            raise InputError(f"--codec must be one of {', '.join(get_args(Codec))}, got {self.codec}")
        for each in self.anatomy:
            path, equals, anatomy = each.partition("=")
            if not (equals and path.strip("/") and anatomy) or "/" in anatomy:
                raise InputError(f"--anatomy must be PATH=VALUE, such as US/spleen2=abd, got {each}")

    @property
    def anatomies(self) -> dict[str, str]:
        """`anatomy` as a mapping from folder path to value."""
        pairs = (each.partition("=") for each in self.anatomy)
        return {path.strip("/"): value for path, _, value in pairs}


@dataclass(frozen=True)
class BuildResult:
    """The manifest of the shard set, and whether it was built now or was there already."""

    manifest: Manifest
    built: bool


@dataclass(frozen=True, slots=True)
class Kept:
    """An image that goes into the set, and where its encoded bytes lie until its shard is written."""

    entry: Entry
    spool: str
    offset: int
    size: int


def build(
    source: Path, out: Path, options: BuildOptions, *, overwrite: bool = False, report: Report = silent
) -> BuildResult:
    """Pack the images of the folder `source` into a shard set, the folder `out`.

    The same source and options give the same bytes, whatever the number of workers. `out` appears when it is
    complete; what it held is readable until then. A finished set of the same source and options is left alone.

    Raises `InputError` where the source is none, has no usable image, or `out` holds anything else and not
    `overwrite`; `OSError` where writing fails. Images that cannot be read are listed in the manifest.
    """
    place = Path(os.path.realpath(out))
    recover(place)
    check_place(place, out, overwrite)
    found = scan_tree(source, anatomy=options.anatomies, skip_unknown=options.skip_unknown, report=report)
    chosen = choose(found.entries, per_class=options.per_class, seed=options.seed)
    recorded = _recorded(source, found, chosen, options)
    if not overwrite and (existing := existing_set(place, out, recorded)):
        return BuildResult(existing, built=False)
    workers = min(options.workers or usable_cores(), -(-len(chosen) // CHUNK))
    with building(place, out) as folder, pool_of(workers) as pool:
        kept, rejected = _pack(pool, workers, source, chosen, folder, options, report)
        rejected = sorted(found.rejected + rejected, key=lambda each: (each.source, each.reason))
        if not kept:
            why = f", such as {rejected[0].source}: {rejected[0].reason}" if rejected else ""
            raise InputError(f"no usable image in {source}: {len(rejected):,} were rejected{why}")
        fields = vocabularies(found.fields, (each.entry.fields for each in kept))
        classes = sorted({each.entry.category for each in kept})
        shards = _assemble(pool, workers, kept, fields, classes, folder, options, report)
        for spool in folder.glob("spool-*"):
            spool.unlink()
        result = Manifest(
            samples=len(kept),
            size=options.size,
            codec=options.codec,
            fields=fields,
            classes=classes,
            shards=shards,
            rejected=rejected,
            options=recorded,
        )
        result.save(folder)
        sync_folder(folder)
        put_in_place(folder, place)
    return BuildResult(result, built=True)


def _recorded(source: Path, found: Scan, chosen: Sequence[Entry], options: BuildOptions) -> dict[str, Any]:
    """What shapes the content, for the manifest: equal for equal sets, without paths of this machine."""
    digest = hashlib.sha256()
    for entry in sorted(chosen, key=lambda each: each.source):
        try:
            size = (source / entry.source).stat().st_size
        except OSError:
            size = -1  # it will be rejected when it is read
        digest.update(os.fsencode(entry.source) + b"\0" + str(size).encode() + b"\0")
    return {
        "source": {"form": found.form, "images": len(chosen), "digest": digest.hexdigest()},
        "fields": list(found.fields),
        "per_class": options.per_class,
        "size": options.size,
        "codec": options.codec,
        "seed": options.seed,
        "anatomy": dict(sorted(options.anatomies.items())),
        "skip_unknown": options.skip_unknown,
        "samples_per_shard": options.samples_per_shard,
    }


def _pack(
    pool: Executor | None,
    workers: int,
    source: Path,
    chosen: Sequence[Entry],
    folder: Path,
    options: BuildOptions,
    report: Report,
) -> tuple[list[Kept], list[Rejected]]:
    """Decode, resize and encode the chosen images into spool files, in their order."""
    kept: list[Kept] = []
    rejected: list[Rejected] = []
    chunks = [chosen[start : start + CHUNK] for start in range(0, len(chosen), CHUNK)]
    spools = [f"spool-{number:06}" for number in range(len(chunks))]
    tasks = (
        (source, [entry.source for entry in chunk], folder / spool, options.size, options.codec)
        for chunk, spool in zip(chunks, spools, strict=True)
    )
    for chunk, spool, outcomes in zip(
        chunks, spools, run_in_order(pool, workers, _pack_chunk, tasks), strict=True
    ):
        offset = 0
        for entry, outcome in zip(chunk, outcomes, strict=True):
            if isinstance(outcome, str):
                rejected.append(Rejected(as_text(entry.source), outcome))
            else:
                kept.append(Kept(entry, spool, offset, outcome))
                offset += outcome
        report("packing", len(kept) + len(rejected), len(chosen), f"{len(rejected)} rejected" if rejected else "")
    return kept, rejected


def _pack_chunk(source: Path, names: Sequence[str], spool: Path, size: int, codec: Codec) -> list[int | str]:
    """Write the encoded images to `spool`; return for each its size in bytes, or the reason why it has none."""
    outcomes: list[int | str] = []
    with replacing(spool, durable=False) as file:
        for name in names:
            try:
                data = image.encode(image.decode(image.read(source / name), size), codec)
            except image.ImageError as error:
                outcomes.append(str(error))
            else:
                file.write(data)
                outcomes.append(len(data))
    return outcomes


def _assemble(
    pool: Executor | None,
    workers: int,
    kept: Sequence[Kept],
    fields: Mapping[str, list[str]],
    classes: list[str],
    folder: Path,
    options: BuildOptions,
    report: Report,
) -> list[Shard]:
    """Write all shards, copying the images from the spool files."""
    starts = range(0, len(kept), options.samples_per_shard)
    tasks = (
        (folder, number, start, kept[start : start + options.samples_per_shard], fields, classes, options.codec)
        for number, start in enumerate(starts)
    )
    shards = []
    for shard in run_in_order(pool, workers, _assemble_shard, tasks):
        shards.append(shard)
        report("writing", len(shards), len(starts), "")
    return shards


def _assemble_shard(
    folder: Path,
    number: int,
    first: int,
    kept: Sequence[Kept],
    fields: Mapping[str, list[str]],
    classes: list[str],
    codec: Codec,
) -> Shard:
    indices = {category: index for index, category in enumerate(classes)}

    def samples() -> Iterator[Sample]:
        for spool, group in groupby(kept, key=lambda each: each.spool):
            with open(folder / spool, "rb") as file:
                for each in group:
                    file.seek(each.offset)
                    entry = each.entry
                    metadata = {
                        "fields": dict(entry.fields),
                        "class": entry.category,
                        "source": as_text(entry.source),
                    }
                    yield Sample(
                        file.read(each.size), multi_hot(entry.fields, fields), indices[entry.category], metadata
                    )

    path = folder / f"shard-{number:06}.tar"
    return write_shard(path, samples(), first=first, extension=image.EXTENSIONS[codec])
