"""Whether a shard set is whole, byte by byte and image by image."""

from __future__ import annotations

import hashlib
import io
import json
import struct
import tarfile
from dataclasses import dataclass, replace
from pathlib import Path

from PIL import Image

from shard_builder.image import ImageError, check_png
from shard_builder.index import parse_index
from shard_builder.labels import multi_hot
from shard_builder.manifest import EXTENSIONS, NAME, Manifest, OtherFormatError, Shard
from shard_builder.settings import InputError, Progress, no_progress, usable_cores
from shard_builder.workers import Job, workers_of
from shard_builder.writer import member_header, tar_end


class DamageError(ValueError):
    """What is wrong, in one line that begins with the member's name if it is in a member."""


@dataclass(frozen=True)
class Verified:
    """What a shard set holds, and what is wrong with it: a line for each bad file, naming its first bad member."""

    samples: int
    shards: int
    bytes: int
    damage: list[str]


def verify(folder: Path, *, workers: int | None = None, progress: Progress = no_progress) -> Verified:
    """Check everything that FORMATS promises of the shard set in `folder`, on all cores or `workers` of them.

    Of each shard: its size and SHA-256, each entry of its index, each member's place, header and padding, each
    image's checksums and, decoded, its size, and that labels and target are those of the `.json`. Raises
    `InputError` where there is no shard set, or one of another format version.
    """
    try:
        manifest = Manifest.load(folder)
    except OtherFormatError:
        raise
    except InputError as error:
        if not (folder / NAME).is_file():
            raise
        return Verified(0, 0, 0, [str(error)])
    listed = {shard.name for shard in manifest.shards}
    damage: dict[int, str] = {}
    slim = replace(manifest, shards=[], rejected=[])  # what each job is sent
    jobs, first = [], 0
    for number, shard in enumerate(manifest.shards):
        jobs.append(Job(number, (folder, shard, first, slim)))
        first += shard.samples
    done = 0
    with workers_of(min(workers or usable_cores(), len(jobs))) as pool:
        for number, found in pool.finish(check_shard, jobs):
            shard = manifest.shards[number]
            if found != "":
                damage[number] = f"{shard.name}: {found or 'the worker died three times while checking it'}"
            done += shard.samples
            progress("verifying", done, manifest.samples, f"{len(damage)} damaged" if damage else "")
    lines = [damage[number] for number in sorted(damage)]
    # Whoever reads all tars, or indices, of the folder would read these, too.
    lines += [
        f"{path.name}: is not in {NAME}"
        for path in sorted([*folder.glob("*.tar"), *folder.glob("*.idx")])
        if path.with_suffix(".tar").name not in listed
    ]
    return Verified(manifest.samples, len(manifest.shards), sum(shard.bytes for shard in manifest.shards), lines)


def check_shard(folder: Path, shard: Shard, first: int, manifest: Manifest) -> str:
    """What is wrong with the shard whose samples begin with id `first`, or the empty text."""
    try:
        _check(folder / shard.name, shard, first, manifest)
    except DamageError as damage:
        return str(damage)
    except OSError as error:
        which = "its index " if str(error.filename).endswith(".idx") else ""
        return f"{which}cannot be read: {error.strerror}"
    return ""


def _check(tar: Path, shard: Shard, first: int, manifest: Manifest) -> None:
    index = tar.with_suffix(".idx")
    try:
        lines = parse_index(index.read_text("ascii"))
    except ValueError as error:
        raise DamageError(f"its index {index.name} is damaged: {error}") from None
    if len(lines) != shard.samples:
        raise DamageError(f"its index {index.name} has {len(lines)} samples, {NAME} {shard.samples}")
    digest, offset = hashlib.sha256(), 0
    with open(tar, "rb") as file:
        extensions = (EXTENSIONS[manifest.codec], "labels", "target", "json")
        for sample, line in enumerate(lines, first):
            members = {}
            for number, extension in enumerate(extensions):
                name = f"{sample:08}.{extension}"
                size = line[number].size if number < len(line) else 0
                if line[number : number + 1] != [(extension, offset + tarfile.BLOCKSIZE, size, name)]:
                    raise DamageError(f"{name}: its index {index.name} has another entry in its place")
                length = tarfile.BLOCKSIZE + size + -size % tarfile.BLOCKSIZE
                block = file.read(min(length, shard.bytes))
                if len(block) < length:
                    raise DamageError(f"{name}: the tar ends within it")
                if block[: tarfile.BLOCKSIZE] != member_header(name, size):
                    raise DamageError(f"{name}: its tar header is damaged")
                if any(block[tarfile.BLOCKSIZE + size :]):
                    raise DamageError(f"{name}: the padding after it is not empty")
                digest.update(block)
                members[extension] = block[tarfile.BLOCKSIZE : tarfile.BLOCKSIZE + size]
                offset += length
            if len(line) > len(extensions):
                raise DamageError(f"{sample:08}.json: its index {index.name} has more entries after it")
            _check_sample(f"{sample:08}", members, manifest)
        if (end := file.read(2 * tarfile.RECORDSIZE)) != tar_end(offset):
            raise DamageError(f"it does not end after {sample:08}.json")
    digest.update(end)
    if digest.hexdigest() != shard.sha256 or offset + len(end) != shard.bytes:
        raise DamageError(
            f"it has another size or SHA-256 than {NAME} says, though each of its members is well-formed"
        )


def _check_sample(key: str, members: dict[str, bytes], manifest: Manifest) -> None:
    image = EXTENSIONS[manifest.codec]
    try:
        check_image(members[image], manifest)
    except DamageError as damage:
        raise DamageError(f"{key}.{image}: {damage}") from None
    try:
        metadata = json.loads(members["json"])
        fields, category, source = (metadata[name] for name in ("fields", "class", "source"))
        whole = isinstance(source, str) and set(fields) <= set(manifest.fields)
    except (ValueError, KeyError, TypeError):
        whole = False
    if not whole:
        raise DamageError(f"{key}.json: is no object with fields, class and source")
    try:
        labels = multi_hot(fields, manifest.fields).tobytes()
    except ValueError:
        raise DamageError(f"{key}.json: a value of its fields is not in {NAME}") from None
    if members["labels"] != labels:
        raise DamageError(f"{key}.labels: are not the bits of the fields in {key}.json")
    if category not in manifest.classes:
        raise DamageError(f"{key}.json: its class is not in {NAME}")
    if members["target"] != struct.pack("<i", manifest.classes.index(category)):
        raise DamageError(f"{key}.target: is not the class in {key}.json")


def check_image(data: bytes, manifest: Manifest) -> None:
    """Raise `DamageError` unless `data` is a whole grey image of the set's codec and canvas."""
    canvas = (manifest.size, manifest.size)
    if manifest.codec == "raw":
        if len(data) != manifest.size**2:
            raise DamageError(f"has {len(data):,} bytes, not {manifest.size}²")
        return
    try:
        opened = Image.open(io.BytesIO(data), formats=(manifest.codec.upper(),))
        if manifest.codec == "png":
            check_png(data)
        if opened.mode != "L" or opened.size != canvas:
            raise DamageError(
                f"is {opened.width} x {opened.height} {opened.mode}, not {canvas[0]} x {canvas[1]} grey"
            )
        opened.load()
    except DamageError:
        raise
    except ImageError as error:
        raise DamageError(str(error)) from None
    except Exception as error:  # damaged files raise whatever the decoder stumbles over
        raise DamageError(f"cannot be decoded as {manifest.codec}: {type(error).__name__}") from None
