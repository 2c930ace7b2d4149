"""Features of images by an encoder, as arrays or as a file: of a shard set, or of any source that the builder reads.

N images, F features, K label fields. A large set is computed in parts, which lie beside the file until it is complete.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import re
import shutil
import threading
import zipfile
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, BinaryIO

import numpy as np
import PIL
import torch
from numpy.typing import NDArray

from modan_fast import __version__
from modan_fast.config import EmbedConfig, changed, is_url
from modan_fast.devices import compute_type, pick_device
from modan_fast.downstream.inits import digest_of
from modan_fast.downstream.probe import apply
from modan_fast.encoders import IMAGENET_MEAN, IMAGENET_STD, Architecture, Encoder, encoder_file
from modan_fast.folder import check_writable, locked, read_json, write_json
from modan_fast.pretrained import imagenet_encoder, is_published, load_encoder, named_file
from modan_fast.report.formats import Table, to_csv
from modan_fast.shards import ShardSet, open_shards
from modan_fast.stream import member
from shard_builder import dicom, dicom_pixels
from shard_builder.atomic import UNFINISHED, replacing
from shard_builder.entries import Entry, Scan, as_text
from shard_builder.image import ImageError, open_stored, stretch
from shard_builder.manifest import EXTENSIONS, NAME, Rejected
from shard_builder.options import BuildOptions
from shard_builder.pack import file_states, grey
from shard_builder.pseudonym import key_beside
from shard_builder.scan import OTHER_SUFFIXES, Files, folder_labels, is_image, walk
from shard_builder.settings import InputError, Progress, no_progress, printable, usable_cores
from shard_builder.source import INSPECTED, scan_source
from shard_builder.table import PREFIX
from shard_builder.workers import workers_of

PART = 4096  # images that a kill can cost; also the rows of a parquet file's row group
IMAGE_SIZE = 224  # where no run says otherwise
LONGEST_NAME = 4096  # characters of a name or label: the longest path of a file system
LARGEST_RECORD = 2**20  # bytes of a sample's json
SOURCE_SETTINGS = ("table", "fields", "skip_missing", "frames", "allow_burned_in", "key")  # not for shard sets

Pixels = NDArray[np.uint8]
Texts = NDArray[np.str_]


@dataclass(frozen=True)
class Embeddings:
    """Features of N images: `embeddings` (N, F) float32, and `filenames` (N,), their paths within the source.

    `labels` (N, K) are the values of the label fields `fields`, and `classes` (N,) the classes; texts are empty where
    the source names none. `left_out` are the images that could not be read.
    """

    embeddings: NDArray[np.float32]
    filenames: Texts
    fields: tuple[str, ...]
    labels: Texts
    classes: Texts
    left_out: list[Rejected] = field(repr=False)


@dataclass(frozen=True)
class Written:
    """A file of features: its path, how many images and features it has, and which images could not be read.

    `made` is False if the file existed. Names of DICOM files are hashed with the key in the file `key`; `hidden` has
    the paths of those left out, by their hashes: show it to the files' owner, and write it nowhere.
    """

    path: Path
    images: int
    features: int
    left_out: list[Rejected] = field(repr=False)
    made: bool = True
    key: Path | None = None
    hidden: Mapping[str, str] = field(default_factory=dict, repr=False)


@dataclass(frozen=True)
class Item:
    """An image to embed: its name, its values of the label fields, its class, and what reads its pixels.

    `read` gives grey pixels (H, H) uint8, and raises `ImageError` if there are none.
    """

    name: str
    values: tuple[str, ...]
    category: str
    read: Callable[[], Pixels]


@dataclass(frozen=True)
class Images:
    """The images of a source in order: `items(n)` are those from number n on, and `identity` tells sources apart."""

    count: int
    fields: tuple[str, ...]
    identity: dict[str, Any]
    items: Callable[[int], Generator[Item, None, None]]
    left_out: list[Rejected]
    hashed: bool = False
    hidden: Mapping[str, str] = field(default_factory=dict, repr=False)


def embed(source: str | Path, config: EmbedConfig, progress: Progress = no_progress) -> Embeddings:
    """The features of the images in `source`, in memory.

    `source` is a shard set (folder or URL), a folder of images or DICOM files, a CSV table or a DICOMDIR. Images that
    cannot be read are left out. Raises `InputError` for bad input and settings.
    """
    device = pick_device(config.device)
    dtype = compute_type(config.precision, device)
    encoder, size = open_encoder(config)
    images = open_images(source, config, size, progress)
    parts = list(_parts(images, encoder, config, device, dtype, progress=progress))
    left_out = images.left_out + [each for part in parts for each in part.left_out]
    _check_any(source, sum(len(part.filenames) for part in parts), left_out)
    names = ("embeddings", "filenames", "labels", "classes")
    arrays = {name: np.concatenate([getattr(part, name) for part in parts]) for name in names}
    return Embeddings(fields=images.fields, left_out=left_out, **arrays)


def write_embeddings(
    source: str | Path, config: EmbedConfig, *, overwrite: bool = False, progress: Progress = no_progress
) -> Written:
    """Write the features of the images in `source` to the file `config.out`, and what made them to FILE.json.

    See `embed` for sources. The file appears when it is complete. If this is stopped or killed, the same call
    continues, and the file is the same. A finished file of the same source, encoder and settings is left alone. Raises
    `InputError` for bad input and settings, and if there is another file and `overwrite` is not set.
    """
    assert config.out is not None
    out = config.out
    write = _writer_for(out)
    check_writable(out.parent)
    if out.is_dir():
        raise InputError(f"{out} is a folder: name a file with `out`")
    record_file = out.with_name(f"{out.name}.json")
    if out.exists() and not (overwrite or record_file.exists()):
        raise InputError(
            f"{out} exists and has no {record_file.name} beside it: pass `overwrite=True`, or choose another `out`"
        )
    device = pick_device(config.device)
    dtype = compute_type(config.precision, device)
    encoder, size = open_encoder(config)
    images = open_images(source, config, size, progress)
    made = {
        "source": images.identity,
        "encoder": {"architecture": asdict(encoder.architecture), "sha256": digest_of(encoder.weights)},
        "image_size": size,
        "precision": str(dtype).removeprefix("torch."),
    }
    made = json.loads(json.dumps(made))  # as it is read back
    key = _key_file(config) if images.hashed else None
    if out.exists() and not overwrite:
        record = read_json(record_file)
        try:
            if record["made"] != made or record["bytes"] != out.stat().st_size:
                raise ValueError("of another source, encoder or setting")
            left_out = [Rejected(str(each["source"]), str(each["reason"])) for each in record["left_out"]]
            count, features = int(record["images"]), int(record["features"])
        except (LookupError, TypeError, ValueError):
            raise InputError(
                f"{out} exists, and {record_file.name} names another source, encoder or setting: pass "
                "`overwrite=True`, or choose another `out`"
            ) from None
        return Written(out, count, features, left_out, False, key, images.hidden)

    versions = [
        __version__,
        torch.__version__,
        PIL.__version__,
        *(dicom_pixels.versions() if images.hashed else []),
    ]
    digest = hashlib.sha256(json.dumps([made, versions]).encode()).hexdigest()[:32]
    folder = out.with_name(f"{out.name}.parts")
    with locked(folder, "embedding"):
        paths = [folder / f"{digest}-{number:06}.npz" for number in range(-(-images.count // PART))]
        _clean(folder, {path.name for path in paths})
        done = next((number for number, path in enumerate(paths) if not path.exists()), len(paths))
        computed = _parts(images, encoder, config, device, dtype, first=done, progress=progress)
        for path, part in zip(paths[done:], computed, strict=True):
            with replacing(path) as file:
                rows = np.array([[each.source, each.reason] for each in part.left_out], np.str_).reshape(-1, 2)
                arrays = {name: getattr(part, name) for name in ("embeddings", "filenames", "labels", "classes")}
                np.savez(file, left_out=rows, **arrays)
        count = sum(len(each) for each in _columns(paths, "filenames"))
        left_out = images.left_out + [
            Rejected(*row) for rows in _columns(paths, "left_out") for row in rows.tolist()
        ]
        _check_any(source, count, left_out)
        with replacing(out) as file:
            write(file, paths, images.fields)
            record = {
                "init": config.init,
                "made": made,
                "images": count,
                "features": encoder.num_features,
                "fields": images.fields,
                "bytes": file.tell(),
                "left_out": [asdict(each) for each in left_out],
            }
            write_json(record_file, record)  # before the file: a file without it would be another's
        shutil.rmtree(folder)
    return Written(out, count, encoder.num_features, left_out, True, key, images.hidden)


def _check_any(source: str | Path, count: int, left_out: Sequence[Rejected]) -> None:
    if not count:
        example = f", such as {left_out[0].source}: {left_out[0].reason}" if left_out else ""
        raise InputError(f"no usable image in {source}: {len(left_out):,} were left out{example}")


def _clean(folder: Path, ours: set[str]) -> None:
    """Remove the parts of other settings, and those that were never finished."""
    for path in folder.iterdir():
        if path.name in ours or path.name == ".lock":
            continue
        if not re.fullmatch(rf"[0-9a-f]{{32}}-\d{{6}}\.npz{UNFINISHED}?", path.name):
            raise InputError(f"{path} is no part of an embedding: move it away, or choose another `out`")
        path.unlink()


def open_encoder(config: EmbedConfig) -> tuple[Encoder, int]:
    """The encoder that `config` names, in evaluation mode, and the image size: as set, or that of its run, or 224."""
    init = config.init
    if init is None:
        raise InputError("no encoder: name one with `init=RUN_FOLDER`")
    if init == "scratch":
        raise InputError("`init=scratch` has random weights, whose features say nothing: name a run or a file")
    if init == "imagenet":
        values: dict[str, Any] = {"channels": 3, "mean": IMAGENET_MEAN, "std": IMAGENET_STD}
        architecture = Architecture(stem="7x7", **(values if config.normalize else {}))
        encoder = imagenet_encoder(config.imagenet_weights, architecture, sum_filters=True)
        size = config.image_size or IMAGE_SIZE
    else:
        encoder = load_encoder(init, normalize=config.normalize)
        size = config.image_size or _recorded_size(init) or encoder.architecture.image_size or IMAGE_SIZE
    return encoder.resized(size).eval(), size


def _recorded_size(init: str) -> int | None:
    """The image size of the run that `init` is of, if it is one. Raises `InputError` if its config.json is odd."""
    name, file = named_file(init)
    if name or is_published(init):
        return None
    path = encoder_file(file).parent / "config.json"
    settings = read_json(path).get("settings") if os.path.isfile(path) else None
    if not (isinstance(settings, dict) and settings.get("image_size")):
        return None
    try:
        return changed(EmbedConfig(), {"image_size": settings["image_size"]}).image_size
    except InputError as error:
        raise InputError(f"{path}: {error}: name one with `image_size`") from None


def open_images(source: str | Path, config: EmbedConfig, size: int, progress: Progress = no_progress) -> Images:
    """The images of a source, to be read as squares of `size` pixels. Raises `InputError` if it cannot be used."""
    location = str(source)
    if not (is_url(location) or os.path.isfile(Path(location) / NAME)):
        return _images_of_files(Path(location), config, size, progress)
    for name in SOURCE_SETTINGS:
        if getattr(config, name) != getattr(EmbedConfig(), name):
            raise InputError(f"`{name}` is for folders and tables of images, not for a shard set: leave it out")
    shards = open_shards(location)
    fields = tuple(shards.manifest.fields)
    identity = {"form": "shards", "images": shards.manifest.samples, "digest": shards.fingerprint}
    return Images(shards.manifest.samples, fields, identity, partial(_items_of_shards, shards, size), [])


def _items_of_shards(shards: ShardSet, size: int, start: int) -> Generator[Item, None, None]:
    """The samples of a shard set in storage order, from number `start` on; the next shard is read meanwhile."""
    ends = np.cumsum(shards.counts)
    numbers = range(int(np.searchsorted(ends, start, side="right")), len(ends))
    stop, ahead = threading.Event(), deque[Future[bytes]]()
    with ThreadPoolExecutor(1, thread_name_prefix="shard") as reader:
        try:
            for number in numbers:
                for each in range(number + len(ahead), min(number + 2, numbers.stop)):
                    ahead.append(reader.submit(shards.read, each, stop))
                first = int(ends[number]) - shards.counts[number]
                yield from _samples(shards, number, first, ahead.popleft().result(), size, max(start - first, 0))
        finally:
            stop.set()
            reader.shutdown(cancel_futures=True)


def _samples(shards: ShardSet, shard: int, first: int, content: bytes, size: int, skipped: int) -> Iterator[Item]:
    """The samples in a shard's bytes, whose ids begin with `first`, without the first `skipped` ones."""
    manifest, at = shards.manifest, 0
    bits = [(name, value) for name, values in manifest.fields.items() for value in values]
    for number in range(first, first + shards.counts[shard]):
        try:
            image, at = member(content, at, f"{number:08}.{EXTENSIONS[manifest.codec]}")
            labels, at = member(content, at, f"{number:08}.labels")
            target, at = member(content, at, f"{number:08}.target")
            record, at = member(content, at, f"{number:08}.json")
            if len(labels) != len(bits) or len(record) > LARGEST_RECORD:
                raise ValueError("its labels or its record are of another size")
            name, category = json.loads(record)["source"], manifest.classes[int.from_bytes(target, "little")]
            if not isinstance(name, str):
                raise TypeError("its source is no text")
        except (LookupError, TypeError, ValueError, RecursionError) as error:
            raise InputError(
                f"{shards.shown(shard)}: sample {number:08} cannot be used ({error}): shard the source again"
            ) from None
        values = dict(bit for bit, value in zip(bits, labels, strict=True) if value)
        if number >= first + skipped:
            read = partial(_stored_pixels, image, shards, size)
            yield Item(name, tuple(values.get(each, "") for each in manifest.fields), category, read)


def _stored_pixels(image: bytes, shards: ShardSet, size: int) -> Pixels:
    manifest = shards.manifest
    return stretch(np.asarray(open_stored(image, manifest.codec, manifest.size)), size)


def _images_of_files(source: Path, config: EmbedConfig, size: int, progress: Progress) -> Images:
    scan = _scanned(source, config, progress)
    digest = hashlib.sha256()
    states = file_states(scan.root, scan.entries, progress)
    for entry, state in zip(scan.entries, states.tolist(), strict=True):
        labels = json.dumps([entry.fields, entry.category])
        digest.update(os.fsencode(entry.source) + f"\0{state}\0{labels}\0".encode())
    identity = {"form": scan.form, "images": len(scan.entries), "digest": digest.hexdigest()}
    hashed = any(entry.frame is not None for entry in scan.entries)
    fields = scan.fields if any(entry.fields for entry in scan.entries) else ()
    hidden = {**scan.hidden, **{each.source: each.file for each in scan.entries if each.frame is not None}}

    def items(start: int) -> Generator[Item, None, None]:
        for entry in islice(scan.entries, start, None):
            values = tuple(entry.fields.get(name, "") for name in fields)
            read = partial(_file_pixels, scan.root, entry, size)
            yield Item(as_text(entry.source), values, entry.category, read)

    return Images(len(scan.entries), fields, identity, items, scan.rejected, hashed, hidden)


def _file_pixels(root: Path, entry: Entry, size: int) -> Pixels:
    return stretch(grey(root, entry), size)


def _scanned(source: Path, config: EmbedConfig, progress: Progress) -> Scan:
    """What the builder's readers find in `source`; a folder of images may have any layout and needs no labels."""
    if source.is_dir() and not config.table:
        root = source / PREFIX if (source / PREFIX).is_dir() else source
        files = walk(root, progress)
        if _is_tree(root, files):
            return _scan_tree(root, files)
    names = ("table", "fields", "skip_missing", "frames", "allow_burned_in")
    options = BuildOptions(per_class=0, **{name: getattr(config, name) for name in names})
    out = Path(os.path.realpath(config.out)) if config.out else None
    if source.is_dir() and not config.table and out and out.is_relative_to(os.path.realpath(source)):
        raise InputError(
            f"{config.out} lies in {source}, each file of which is read as DICOM: choose another folder with `out`"
        )
    with TemporaryDirectory() as nowhere, workers_of(config.threads or usable_cores()) as workers:
        key = _key_file(config) or Path(nowhere) / "key"
        scan = scan_source(source, options, out or Path(nowhere), Path(os.path.realpath(key)), workers, progress)
        if not _key_file(config) and key.exists():
            raise InputError(
                f"{source} holds DICOM files, whose names are hashed: name the key's file with `key`; it is made if "
                "missing"
            )
    return scan


def _key_file(config: EmbedConfig) -> Path | None:
    """The file of the key that hashes names of DICOM files: beside the output, as `shard` has it beside the set."""
    return config.key or (key_beside(config.out) if config.out else None)


def _is_tree(root: Path, files: Files) -> bool:
    """Whether a folder holds more PNG and JPEG images than DICOM files. Raises `InputError` for a mixture."""
    others = [path for path in files.paths() if not is_image(path)]
    step = -(-len(others) // INSPECTED) or 1
    headers = step * sum(dicom.is_dicom(root / path) for path in others[::step])
    images = sum(map(is_image, files.paths()))
    if images > headers and 10 * headers >= images:
        raise InputError(
            f"{root} holds DICOM files among its PNG or JPEG images: embed each from a folder of its own, or name the "
            "images in a table with `table`"
        )
    return images > headers


def _scan_tree(root: Path, files: Files) -> Scan:
    """The images of a folder, with the labels that `shard` would read from their folders, or none."""
    entries, rejected = [], list(files.rejected)
    for path in files.paths():
        if is_image(path):
            labels, category = folder_labels(tuple(path.split("/")[:-1]), {}, {}) or ({}, "")
            entries.append(Entry(path, labels, category))
        elif path.lower().endswith(OTHER_SUFFIXES):
            rejected.append(Rejected(as_text(path), "not a PNG or JPEG image: convert it"))
    rejected += [Rejected(as_text(path), "not a file") for path in files.broken if is_image(path)]
    rejected.sort(key=lambda each: each.source)
    return Scan("tree", ("modality", "anatomy"), entries, rejected, root)


def _parts(
    images: Images,
    encoder: Encoder,
    config: EmbedConfig,
    device: torch.device,
    dtype: torch.dtype,
    *,
    first: int = 0,
    progress: Progress = no_progress,
) -> Iterator[Embeddings]:
    """The features of the images, `PART` at a time, from part `first` on; images are decoded ahead in threads.

    Batches do not reach over parts, so features do not depend on where the work was interrupted.
    """
    encoder.to(device).to(memory_format=torch.channels_last)
    start, total, rejected = min(first * PART, images.count), images.count, len(images.left_out)
    progress("embedding", start, total, "")
    with (
        ThreadPoolExecutor(config.threads or usable_cores(), thread_name_prefix="decode") as pool,
        closing(images.items(start)) as items,
        closing(_ahead(items, pool, 2 * config.batch_size)) as decoded,
    ):
        for begin in range(start, total, PART):
            end = min(begin + PART, total)
            kept: list[Item] = []
            left_out: list[Rejected] = []
            features = [np.empty((0, encoder.num_features), np.float32)]
            batch: list[Pixels] = []
            for done, (item, pixels) in enumerate(islice(decoded, PART), start=begin + 1):
                try:
                    batch.append(pixels.result())
                    kept.append(item)
                except ImageError as error:
                    left_out.append(Rejected(item.name, str(error)))
                if len(batch) == config.batch_size or done == end:
                    if batch:
                        features.append(_features(encoder, np.stack(batch), device, dtype))
                    batch.clear()
                    skipped = rejected + len(left_out)
                    progress("embedding", done, total, f"{skipped:,} left out" if skipped else "")
            rejected += len(left_out)
            values = [each.values for each in kept]
            labels = _texts([value for row in values for value in row]).reshape(len(kept), len(images.fields))
            names, classes = _texts([each.name for each in kept]), _texts([each.category for each in kept])
            yield Embeddings(np.concatenate(features), names, images.fields, labels, classes, left_out)


def _ahead(
    items: Iterable[Item], pool: ThreadPoolExecutor, depth: int
) -> Generator[tuple[Item, Future[Pixels]], None, None]:
    """The items with their pixels to come; the next `depth` of them are read in the pool meanwhile."""
    waiting = deque[tuple[Item, Future[Pixels]]]()
    try:
        for item in items:
            waiting.append((item, pool.submit(item.read)))
            if len(waiting) > depth:
                yield waiting.popleft()
        while waiting:
            yield waiting.popleft()
    finally:
        for _, pixels in waiting:
            pixels.cancel()


def _features(encoder: Encoder, pixels: Pixels, device: torch.device, dtype: torch.dtype) -> NDArray[np.float32]:
    # Without cuDNN's choice by time, which may be another one in a continued run, with other last bits.
    with (
        torch.inference_mode(),
        torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=True),
    ):
        found: NDArray[np.float32] = (
            apply(encoder, torch.from_numpy(pixels)[:, None].to(device), dtype).cpu().numpy()
        )
    if not np.isfinite(found).all():
        raise InputError(
            "the encoder's features are not finite: its pretraining diverged, its file is damaged, or it needs "
            "`precision=float32`"
        )
    return found


def _texts(texts: list[str]) -> Texts:
    """Texts as an array, made printable. Raises `InputError` for one that would blow up the array."""
    if any(len(text) > LONGEST_NAME for text in texts):
        raise InputError(f"a name or label in the source has over {LONGEST_NAME:,} characters: shorten it")
    return np.array([printable(text) for text in texts], np.str_)


Write = Callable[[BinaryIO, Sequence[Path], Sequence[str]], None]


def _writer_for(out: Path) -> Write:
    """What writes a file with this suffix. Raises `InputError` if nothing does, or if its library is missing."""
    writers: dict[str, Write] = {".npz": _write_npz, ".csv": _write_csv, ".parquet": _write_parquet}
    if out.suffix not in writers:
        raise InputError(f"`out={out}` must end in {', '.join(writers)}: the suffix chooses the format")
    if out.suffix == ".parquet" and not importlib.util.find_spec("pyarrow"):
        raise InputError(
            f"`out={out}` needs pyarrow: pip install 'modan-fast[parquet]', or name a .npz or .csv file"
        )
    return writers[out.suffix]


def _columns(paths: Iterable[Path], name: str) -> Iterator[NDArray[Any]]:
    """An array of each part."""
    for path in paths:
        try:
            with np.load(path, allow_pickle=False) as part:
                found: NDArray[Any] = part[name]
        except (OSError, ValueError, LookupError, EOFError, zipfile.BadZipFile) as error:
            raise InputError(f"{path} is damaged ({error}): remove it and start again") from error
        yield found


def _parts_of(paths: Iterable[Path], fields: Sequence[str]) -> Iterator[Embeddings]:
    for path in paths:
        arrays = {name: next(_columns([path], name)) for name in ("embeddings", "filenames", "labels", "classes")}
        yield Embeddings(fields=tuple(fields), left_out=[], **arrays)


def _write_npz(file: BinaryIO, paths: Sequence[Path], fields: Sequence[str]) -> None:
    """The arrays of all parts after each other; holds one part in memory."""
    with zipfile.ZipFile(file, "w") as archive:
        for name in ("embeddings", "filenames", "labels", "classes"):
            dtype = np.result_type(*{each.dtype for each in _columns(paths, name)})
            rows = sum(len(each) for each in _columns(paths, name))
            shape = (rows, *next(_columns(paths, name)).shape[1:])
            header = {"descr": dtype.str, "fortran_order": False, "shape": shape}
            info = zipfile.ZipInfo(f"{name}.npy")  # of the year 1980, so that equal arrays give equal bytes
            info.compress_type = zipfile.ZIP_STORED if name == "embeddings" else zipfile.ZIP_DEFLATED
            with archive.open(info, "w", force_zip64=True) as column:
                np.lib.format.write_array_header_1_0(column, header)
                for each in _columns(paths, name):
                    column.write(each.astype(dtype).tobytes())
        with archive.open(zipfile.ZipInfo("fields.npy"), "w") as column:
            np.lib.format.write_array(column, _texts(list(fields)), allow_pickle=False)


def _heads(out: str, features: int, fields: Sequence[str]) -> tuple[list[str], list[str]]:
    """The columns of numbers, and those of labels after them. Raises `InputError` if two have the same name."""
    numbers = [f"embedding_{number}" for number in range(features)]
    names = [printable(name) for name in fields]
    taken = {"filename", "class", *numbers}
    if twice := [name for number, name in enumerate(names) if name in taken | {*names[:number]}]:
        raise InputError(f"the label field {twice[0]} has the name of another column of a {out} file: write .npz")
    return numbers, [*names, "class"]


def _write_csv(file: BinaryIO, paths: Sequence[Path], fields: Sequence[str]) -> None:
    """A row for each image; as in reports, a name that a spreadsheet would run as a formula gets an apostrophe."""
    for number, part in enumerate(_parts_of(paths, fields)):
        numbers, labels = _heads(".csv", part.embeddings.shape[1], fields)
        table = Table("", "", ["filename"], [[name] for name in part.filenames.tolist()])
        names = to_csv(table).splitlines()
        values = np.concatenate([part.labels, part.classes[:, None]], axis=1).tolist()
        ends = to_csv(Table("", "", labels, values)).splitlines()
        # As float32 the shortest text that reads back as the same value.
        rows = [numbers, *part.embeddings.astype(np.str_).tolist()]
        lines = [f"{name},{','.join(row)},{end}\n" for name, row, end in zip(names, rows, ends, strict=True)]
        file.write("".join(lines[min(number, 1) :]).encode())


def _write_parquet(file: BinaryIO, paths: Sequence[Path], fields: Sequence[str]) -> None:
    """A row group for each part; a label that is not known is null."""
    import pyarrow
    from pyarrow import parquet

    first = next(_columns(paths, "embeddings"))
    numbers, labels = _heads(".parquet", first.shape[1], fields)
    schema = pyarrow.schema(
        [("filename", pyarrow.string())]
        + [(name, pyarrow.float32()) for name in numbers]
        + [(name, pyarrow.string()) for name in labels]
    )
    with parquet.ParquetWriter(file, schema, use_dictionary=labels, write_statistics=False) as writer:
        for part in _parts_of(paths, fields):
            texts = [*part.labels.T.tolist(), part.classes.tolist()]
            known = [[text or None for text in column] for column in texts]
            columns = [part.filenames.tolist(), *np.ascontiguousarray(part.embeddings.T), *known]
            arrays = [pyarrow.array(column, kind) for column, kind in zip(columns, schema.types, strict=True)]
            writer.write_table(pyarrow.Table.from_arrays(arrays, schema=schema))
