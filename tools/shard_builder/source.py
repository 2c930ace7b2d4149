"""What a source is, a tree of images, a table of them, or DICOM files, and which images with which labels it holds."""

from __future__ import annotations

import importlib.util
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from shard_builder import dicom, terms
from shard_builder.image import ImageError
from shard_builder.manifest import Rejected
from shard_builder.options import BuildOptions
from shard_builder.pseudonym import load_key, pseudonym
from shard_builder.scan import Entry, Files, Names, Scan, as_text, class_of, is_image, scan_tree, walk
from shard_builder.settings import InputError, Progress
from shard_builder.table import PATHS, PREFIX, columns, read_names, scan_table
from shard_builder.workers import DIED, Job, Workers

USUAL = ("modality", "anatomy")
NO_LABELS = (*PATHS, "patient")
HEADERS = 256  # DICOM headers that a worker reads at a time: about half a second of work
ASKED = 1000  # files that are looked into to tell what a folder holds


def scan_source(
    source: Path, options: BuildOptions, place: Path, key: Path, workers: Workers, progress: Progress
) -> Scan:
    """The images of `source`, which is a folder, a CSV file or a DICOMDIR, and their labels.

    DICOM files are called by a hash of their paths with the key in the file `key`, which is made where there is
    none. The shard set's own folder, `place`, and the key are no part of a source that they lie in. Raises
    `InputError` for what cannot be used.
    """
    tables = [Path(each) for each in options.table]
    root = source
    if source.is_file() and source.suffix.lower() == ".csv":
        tables, root = [source, *tables], source.parent
    if tables:
        found = _tables(tables, root, options, progress)
    elif source.is_file() and source.name.upper() == "DICOMDIR":
        _need_pydicom()
        try:
            paths = dicom.referenced_files(source)
        except ImageError as error:
            raise InputError(f"{source} is {error}") from None
        found = _listed(source.parent, paths, [])
    else:
        found = _folder(source, options, [place, key], progress)
    if found.form != "tree":
        found = _opened(found, options, key, workers, progress)
    found = _required(found, options.required)
    if found.entries and not any(entry.fields for entry in found.entries):
        raise InputError(
            f"no image in {source} has a value of {' or '.join(found.fields)}: name others with `fields`"
        )
    return found


def _tables(tables: Sequence[Path], root: Path, options: BuildOptions, progress: Progress) -> Scan:
    if not root.is_dir():
        raise InputError(f"{root} is no folder: name the one that holds the images of {tables[0]}")
    offered = [name for name in columns(tables[0]) if name and name not in NO_LABELS]
    by_path = not set(USUAL) & set(offered) and set(options.chosen_fields) <= set(USUAL)
    fields = _chosen(options.chosen_fields, USUAL if by_path else offered, str(tables[0]))
    if options.anatomy and not by_path:
        raise InputError(f"`anatomy` is for labels by folder, and {tables[0]} has columns with labels: use `map`")
    found = scan_table(
        tables,
        root,
        () if by_path else fields,
        anatomy=options.anatomies,
        names=_names(options, fields),
        skip_unknown=options.skip_unknown,
        skip_missing=options.skip_missing,
        progress=progress,
    )
    return _narrowed(found, fields)


def _folder(source: Path, options: BuildOptions, own: Sequence[Path], progress: Progress) -> Scan:
    """A tree of images, or DICOM files where they are more."""
    if (source / PREFIX).is_dir():
        source = source / PREFIX
    files = _without(walk(source, progress), source, own)
    paths = ["/".join([*parts, name]) for parts, names in sorted(files.found.items()) for name in sorted(names)]
    asked = paths[:: -(-len(paths) // ASKED) or 1]
    marked = {path for path in asked if dicom.is_dicom(source / path)}
    pictures = sum(is_image(path) and path not in marked for path in asked)
    if len(marked) > pictures:
        rejected = files.rejected + [Rejected(path, "not a file") for path in files.broken]
        return _listed(source, paths, rejected)
    # A few are strays; with many, folders are likely to be patients, and must not become labels.
    if 10 * sum(not is_image(path) for path in marked) >= len(asked) > 0:
        raise InputError(
            f"{source} holds DICOM files among its PNG or JPEG images: shard either from a folder of its own, or name "
            "the images in a table with `table`"
        )
    fields = _chosen(options.chosen_fields, USUAL, str(source))
    found = scan_tree(
        source,
        files,
        anatomy=options.anatomies,
        names=_names(options, fields),
        skip_unknown=options.skip_unknown,
        progress=progress,
    )
    return _narrowed(found, fields)


def _without(files: Files, source: Path, own: Sequence[Path]) -> Files:
    """`files` of `source` without those of a build: `own` are its folder and its key."""
    root, found = Path(os.path.realpath(source)), dict(files.found)
    for path in own:
        if path.is_relative_to(root) and (parts := path.relative_to(root).parts):
            inside = [each for each in found if each[: len(parts)] == parts]
            found = {each: names for each, names in found.items() if each not in inside}
            if path.name in (names := found.get(parts[:-1], [])):
                found[parts[:-1]] = [name for name in names if name != path.name]
    return replace(files, found={parts: names for parts, names in found.items() if names})


def _listed(root: Path, paths: Iterable[str], rejected: list[Rejected]) -> Scan:
    """DICOM files that are not opened yet."""
    return Scan("dicom", (), [Entry(path, {}, "") for path in paths], rejected, root)


def _opened(found: Scan, options: BuildOptions, key: Path, workers: Workers, progress: Progress) -> Scan:
    """`found` with the frames, and from their own headers the labels, of its DICOM files, and without their names."""
    own = found.form == "dicom"
    fields, names = found.fields, dict[tuple[str, str], str]()
    if own:
        if options.anatomy:
            raise InputError("`anatomy` is for labels by folder, and DICOM files have their own: use `map`")
        fields = _chosen(options.chosen_fields, list(terms.KEYWORDS), "a DICOM file")
        for (field, old), new in _names(options, fields).items():
            if names.setdefault((field, terms.plain(old)), new) != new:
                raise InputError(f"{options.map} names {field} {old} in two spellings and two ways: keep one")
    entries = [entry for entry in found.entries if is_image(entry.source) and not own]
    hidden = [entry for entry in found.entries if own or not is_image(entry.source)]
    rejected = [each for each in found.rejected if is_image(each.source) and not own]
    unsafe = [each for each in found.rejected if own or not is_image(each.source)]
    if not hidden and not unsafe:
        return found
    _need_pydicom()
    secret = load_key(key)
    rejected += [Rejected(pseudonym(secret, each.source), each.reason) for each in unsafe]
    unknown: Counter[str] = Counter()
    headers = _headers(workers, found.root, hidden, fields if own else (), names, progress)
    for entry, header in zip(hidden, headers, strict=True):
        name = pseudonym(secret, entry.source)
        if isinstance(header, str):
            rejected.append(Rejected(name, header))
            continue
        if header.burned_in and not options.allow_burned_in:
            rejected.append(Rejected(name, "text burned into its pixels: allow_burned_in takes it"))
            continue
        values, category = entry.fields, entry.category
        if own:
            values, category = header.values, class_of(header.values, fields)
            unknown.update(header.unknown)
        count = min(options.frames, header.frames)
        middles = ((2 * part + 1) * header.frames // (2 * count) for part in range(count))
        for frame in middles:
            called = f"{name}-{frame}" if header.frames > 1 else name
            entries.append(Entry(called, values, category, entry.source, frame))
    return Scan(found.form, fields, entries, rejected, found.root, unknown)


def _need_pydicom() -> None:
    if not importlib.util.find_spec("pydicom"):  # the builder alone may have been copied to an ingest machine
        raise InputError(
            "DICOM files are read by pydicom, which is not installed: pip install pydicom python-gdcm"
        )


def _headers(
    workers: Workers,
    root: Path,
    entries: Sequence[Entry],
    fields: Sequence[str],
    names: Names,
    progress: Progress,
) -> list[dicom.Header | str]:
    """The header of each file, or why it has none."""

    def job_of(chunk: range) -> Job[range]:
        return Job(chunk, (root.absolute(), [entries[number].file for number in chunk], fields, names))

    def halves(job: Job[range]) -> list[Job[range]]:
        chunk, middle = job.key, len(job.key) // 2
        return [job_of(chunk[:middle]), job_of(chunk[middle:])] if middle else []

    headers: list[dicom.Header | str] = [DIED] * len(entries)
    chunks = (range(len(entries))[start : start + HEADERS] for start in range(0, len(entries), HEADERS))
    done = 0
    for chunk, found in workers.finish(dicom.read_headers, map(job_of, chunks), halves):
        headers[chunk.start : chunk.stop] = found or [DIED]
        done += len(chunk)
        progress("reading headers", done, len(entries), "")
    return headers


def _chosen(asked: Sequence[str], offered: Sequence[str], where: str) -> tuple[str, ...]:
    for name in asked:
        if name in NO_LABELS:
            raise InputError(
                f"`fields={name}`: it identifies an image or a person, and is no label: leave it out"
            )
        if name not in offered:
            raise InputError(f"`fields={name}`: {where} has no such field, but {', '.join(offered) or 'none'}")
    return tuple(asked) or tuple(name for name in USUAL if name in offered)


def _names(options: BuildOptions, fields: Sequence[str]) -> Names:
    return read_names(options.map, fields) if options.map else {}


def _narrowed(found: Scan, fields: tuple[str, ...]) -> Scan:
    """`found` with the labels of `fields` alone."""
    if found.fields == fields:
        return found
    entries = [
        replace(entry, fields={name: entry.fields[name] for name in fields if name in entry.fields})
        for entry in found.entries
    ]
    return replace(found, fields=fields, entries=entries)


def _required(found: Scan, required: Sequence[str]) -> Scan:
    """`found` without the images that lack a value of one of the fields `required`."""
    for name in required:
        if name not in found.fields:
            raise InputError(f"`require={name}`: it is none of the label fields {', '.join(found.fields)}")
    kept, rejected = [], list(found.rejected)
    for entry in found.entries:
        if lacks := [name for name in required if name not in entry.fields]:
            rejected.append(Rejected(as_text(entry.source), f"no value of {lacks[0]}"))
        else:
            kept.append(entry)
    return replace(found, entries=kept, rejected=rejected)
