"""Scan any source: decide whether it is a tree, tables or DICOM files, and list its images with their label fields."""

from __future__ import annotations

import importlib.util
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from shard_builder import dicom, terms
from shard_builder.entries import Entry, Scan, ValueMap, as_text, class_of
from shard_builder.image import ImageError
from shard_builder.manifest import Rejected
from shard_builder.options import BuildOptions
from shard_builder.pseudonym import load_key, pseudonym
from shard_builder.scan import Files, is_image, scan_tree, walk
from shard_builder.settings import InputError, Progress
from shard_builder.table import PATHS, PREFIX, columns, read_value_map, scan_table
from shard_builder.workers import DIED, Job, Workers

DEFAULT_FIELDS = ("modality", "anatomy")
NO_LABELS = (*PATHS, "patient")
CHUNK = 256  # DICOM headers that a worker reads at a time: about half a second of work
INSPECTED = 1000  # files opened at most to find out whether a folder holds DICOM files


def scan_source(
    source: Path, options: BuildOptions, out: Path, key: Path, workers: Workers, progress: Progress
) -> Scan:
    """The images of `source`, a folder, a CSV file or a DICOMDIR, with their labels.

    DICOM files are named by a hash of their paths with the key in the file `key`, which is made if missing. If the
    shard set's folder `out` or the key lies within the source, it is not part of it. Raises `InputError` for a source
    or options that cannot be used.
    """
    tables = [Path(each) for each in options.table]
    root = source
    if source.is_file() and source.suffix.lower() == ".csv":
        tables, root = [source, *tables], source.parent
    if tables:
        scan = _scan_tables(tables, root, options, progress)
    elif source.is_file() and source.name.upper() == "DICOMDIR":
        scan = _scan_dicomdir(source)
    else:
        scan = _scan_folder(source, options, [out, key], progress)
    if scan.form != "tree":
        scan = _with_headers(scan, options, key, workers, progress)
    scan = _with_required(scan, options.required)
    if scan.entries and not any(entry.fields for entry in scan.entries):
        raise InputError(
            f"no image in {source} has a value of {' or '.join(scan.fields)}: name other fields with `fields`"
        )
    return scan


def _scan_tables(tables: Sequence[Path], root: Path, options: BuildOptions, progress: Progress) -> Scan:
    if not root.is_dir():
        raise InputError(f"{root} is no folder: name the one that holds the images of {tables[0]}")
    offered = [name for name in columns(tables[0]) if name and name not in NO_LABELS]
    by_path = not set(DEFAULT_FIELDS) & set(offered) and set(options.chosen_fields) <= set(DEFAULT_FIELDS)
    fields = _chosen_fields(options, DEFAULT_FIELDS if by_path else offered, str(tables[0]))
    if options.anatomy and not by_path:
        raise InputError(
            f"`anatomy` is for labels from folders, and {tables[0]} has columns of labels: rename values with `map`"
        )
    scan = scan_table(
        tables,
        root,
        () if by_path else fields,
        anatomy=options.anatomies,
        value_map=_value_map(options, fields),
        skip_unknown=options.skip_unknown,
        skip_missing=options.skip_missing,
        progress=progress,
    )
    return _with_fields(scan, fields)


def _scan_dicomdir(directory: Path) -> Scan:
    _need_pydicom()
    try:
        paths = dicom.referenced_files(directory)
    except ImageError as error:
        raise InputError(f"{directory} is {error}") from None
    return _unread_dicom(directory.parent, paths, [])


def _scan_folder(source: Path, options: BuildOptions, own: Sequence[Path], progress: Progress) -> Scan:
    """A tree of images, or DICOM files if the folder holds more of these; `own` paths of the build are left out."""
    if (source / PREFIX).is_dir():
        source = source / PREFIX
    files = _without(walk(source, progress), source, own)
    paths = list(files.paths())
    inspected = paths[:: -(-len(paths) // INSPECTED) or 1]
    dicom_files = {path for path in inspected if dicom.is_dicom(source / path)}
    images = sum(is_image(path) and path not in dicom_files for path in inspected)
    if len(dicom_files) > images:
        rejected = files.rejected + [Rejected(path, "not a file") for path in files.broken]
        return _unread_dicom(source, paths, rejected)
    # A few are strays. If there are many, folders probably name patients, and must not become labels.
    if 10 * sum(not is_image(path) for path in dicom_files) >= len(inspected) > 0:
        raise InputError(
            f"{source} holds DICOM files among its PNG or JPEG images: shard each from a folder of its own, or name "
            "the images in a table with `table`"
        )
    fields = _chosen_fields(options, DEFAULT_FIELDS, str(source))
    scan = scan_tree(
        source,
        files,
        anatomy=options.anatomies,
        value_map=_value_map(options, fields),
        skip_unknown=options.skip_unknown,
        progress=progress,
    )
    return _with_fields(scan, fields)


def _without(files: Files, source: Path, own: Sequence[Path]) -> Files:
    """`files` of `source` without those at or below the paths `own`."""
    root, found = Path(os.path.realpath(source)), dict(files.found)
    for path in own:
        if path.is_relative_to(root) and (components := path.relative_to(root).parts):
            found = {each: names for each, names in found.items() if each[: len(components)] != components}
            parent = components[:-1]
            if path.name in found.get(parent, []):
                found[parent] = [name for name in found[parent] if name != path.name]
    return replace(files, found={folder: names for folder, names in found.items() if names})


def _unread_dicom(root: Path, paths: Iterable[str], rejected: list[Rejected]) -> Scan:
    """DICOM files whose headers have not been read."""
    return Scan("dicom", (), [Entry(path, {}, "") for path in paths], rejected, root)


def _with_headers(scan: Scan, options: BuildOptions, key: Path, workers: Workers, progress: Progress) -> Scan:
    """`scan` with the frames of its DICOM files in place of the files, and hashes in place of their paths.

    In a table, every file that is not named like a PNG or JPEG file is a DICOM file. Without a table, labels come from
    the headers.
    """
    from_headers = scan.form == "dicom"
    fields, value_map = _header_fields(options) if from_headers else (scan.fields, {})

    def is_hidden(path: str) -> bool:
        return from_headers or not is_image(path)

    files = [entry for entry in scan.entries if is_hidden(entry.source)]
    unsafe = [each for each in scan.rejected if is_hidden(each.source)]
    if not files and not unsafe:
        return scan
    _need_pydicom()
    secret = load_key(key)
    entries = [entry for entry in scan.entries if not is_hidden(entry.source)]
    rejected = [each for each in scan.rejected if not is_hidden(each.source)]
    hidden = {}
    for each in unsafe:
        name = pseudonym(secret, each.source)
        rejected.append(Rejected(name, each.reason))
        hidden[name] = each.source
    unknown: Counter[str] = Counter()
    headers = _read_headers(workers, scan.root, files, fields if from_headers else (), value_map, progress)
    for file, header in zip(files, headers, strict=True):
        name = pseudonym(secret, file.source)
        if isinstance(header, str):
            rejected.append(Rejected(name, header))
            hidden[name] = file.source
            continue
        if header.burned_in and not options.allow_burned_in:
            rejected.append(Rejected(name, "text burned into its pixels: --allow-burned-in takes it"))
            hidden[name] = file.source
            continue
        labels, category = file.fields, file.category
        if from_headers:
            labels, category = header.values, class_of(header.values, fields)
            unknown.update(header.unknown)
        for frame in _spaced(header.frames, options.frames):
            frame_name = f"{name}-{frame}" if header.frames > 1 else name
            entries.append(Entry(frame_name, labels, category, file.source, frame))
    return Scan(scan.form, fields, entries, rejected, scan.root, unknown, hidden)


def _header_fields(options: BuildOptions) -> tuple[tuple[str, ...], ValueMap]:
    """The label fields to read from headers, and new values for the `plain` form of old ones."""
    if options.anatomy:
        raise InputError(
            "`anatomy` is for labels from folders, and DICOM files have their own: rename values with `map`"
        )
    fields = _chosen_fields(options, list(terms.KEYWORDS), "a DICOM file")
    value_map: dict[tuple[str, str], str] = {}
    for (field, old), new in _value_map(options, fields).items():
        if value_map.setdefault((field, terms.plain(old)), new) != new:
            raise InputError(f"{options.map} gives two spellings of {field} {old} different names: keep one")
    return fields, value_map


def _spaced(frames: int, wanted: int) -> list[int]:
    """At most `wanted` frames of a file, evenly spaced: the middles of equal parts."""
    count = min(wanted, frames)
    return [(2 * number + 1) * frames // (2 * count) for number in range(count)]


def _need_pydicom() -> None:
    if not importlib.util.find_spec("pydicom"):  # the builder alone may have been copied to an ingest machine
        raise InputError(
            "DICOM files are read by pydicom, which is not installed: pip install pydicom python-gdcm"
        )


def _read_headers(
    workers: Workers,
    root: Path,
    files: Sequence[Entry],
    fields: Sequence[str],
    value_map: ValueMap,
    progress: Progress,
) -> list[dicom.Header | str]:
    """The header of each file, or why it holds no image."""

    def job_of(chunk: range) -> Job[range]:
        return Job(chunk, (root.absolute(), [files[number].file for number in chunk], fields, value_map))

    def halves(job: Job[range]) -> list[Job[range]]:
        chunk, middle = job.key, len(job.key) // 2
        return [job_of(chunk[:middle]), job_of(chunk[middle:])] if middle else []

    headers: list[dicom.Header | str] = [DIED] * len(files)
    chunks = (range(len(files))[start : start + CHUNK] for start in range(0, len(files), CHUNK))
    done = 0
    for chunk, found in workers.finish(dicom.read_headers, map(job_of, chunks), halves):
        headers[chunk.start : chunk.stop] = found or [DIED]
        done += len(chunk)
        progress("reading headers", done, len(files), "")
    return headers


def _chosen_fields(options: BuildOptions, offered: Sequence[str], where: str) -> tuple[str, ...]:
    """The fields that the options name, each of which must be `offered`; by default modality and anatomy."""
    for name in options.chosen_fields:
        if name in NO_LABELS:
            raise InputError(
                f"`fields={name}`: it identifies an image or a person and is not a label: leave it out"
            )
        if name not in offered:
            raise InputError(
                f"`fields={name}`: {where} has no such field, but {', '.join(offered) or 'none'}: name one of these"
            )
    return options.chosen_fields or tuple(name for name in DEFAULT_FIELDS if name in offered)


def _value_map(options: BuildOptions, fields: Sequence[str]) -> ValueMap:
    return read_value_map(options.map, fields) if options.map else {}


def _with_fields(scan: Scan, fields: tuple[str, ...]) -> Scan:
    """`scan` with no other label fields than `fields`."""
    if scan.fields == fields:
        return scan
    entries = [
        replace(entry, fields={name: entry.fields[name] for name in fields if name in entry.fields})
        for entry in scan.entries
    ]
    return replace(scan, fields=fields, entries=entries)


def _with_required(scan: Scan, required: Sequence[str]) -> Scan:
    """`scan` without the images that lack a value of one of the fields `required`."""
    for name in required:
        if name not in scan.fields:
            raise InputError(
                f"`require={name}`: it is none of the label fields {', '.join(scan.fields)}: name it with `fields` too"
            )
    kept, rejected, hidden = [], list(scan.rejected), dict(scan.hidden)
    for entry in scan.entries:
        if lacks := [name for name in required if name not in entry.fields]:
            rejected.append(Rejected(as_text(entry.source), f"no value of {lacks[0]}"))
            if entry.frame is not None:
                hidden[entry.source] = entry.file
        else:
            kept.append(entry)
    return replace(scan, entries=kept, rejected=rejected, hidden=hidden)
