"""Second pass of a build: copy the kept images from the spools into shards, in storage order."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import groupby
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from shard_builder.atomic import UNFINISHED, replacing
from shard_builder.entries import Entry, as_text
from shard_builder.labels import multi_hot
from shard_builder.manifest import EXTENSIONS, Manifest, Shard
from shard_builder.pack import Packed
from shard_builder.settings import Progress
from shard_builder.workers import Job, Workers
from shard_builder.writer import Sample, write_shard


@dataclass(frozen=True, slots=True)
class Kept:
    """An image of the set, and where its encoded bytes are: the file `spool`, from `offset`, `size` bytes."""

    entry: Entry
    spool: str
    offset: int
    size: int


def assemble(
    workers: Workers,
    folder: Path,
    chosen: Sequence[Entry],
    packed: Packed,
    kept: NDArray[np.int64],
    manifest: Manifest,
    progress: Progress,
) -> tuple[Path, list[Shard]]:
    """Write the shards of `manifest`, which has none yet, from the images numbered `kept` of those chosen.

    Returns the folder of the shards, and the shards. The folder is in `folder`, named by a hash of what the set is made
    of. The record of a finished shard is saved beside it; shards of a killed build that have a record are not written
    again. Raises `OSError` if writing fails.
    """
    spools = [packed.spools[spool] for spool in dict.fromkeys(packed.spool[kept].tolist())]
    made = json.dumps([manifest.options, spools, sorted(packed.reasons.items())])
    key = hashlib.sha256(made.encode()).hexdigest()[:32]
    finished = folder / f"set-{key}"
    _clean(folder, finished, key)

    per_shard = manifest.options["samples_per_shard"]
    starts = range(0, len(kept), per_shard)
    tars = [finished / f"shard-{number:06}.tar" for number in range(len(starts))]
    records = [folder / f"done-{key}-{number:06}" for number in range(len(starts))]
    shards = {
        number: Shard(**json.loads(record.read_bytes()))
        for number, (tar, record) in enumerate(zip(tars, records, strict=True))
        if tar.exists() and record.exists()
    }
    slim = replace(manifest, rejected=[])  # it is sent with each job

    def job_of(number: int) -> Job[int]:
        first = starts[number]
        images = [
            Kept(chosen[n], packed.spools[packed.spool[n]], int(packed.offset[n]), int(packed.rows["bytes"][n]))
            for n in kept[first : first + per_shard]
        ]
        return Job(number, (folder, tars[number], records[number], first, images, slim))

    missing = [number for number in range(len(starts)) if number not in shards]
    failed = []
    if shards:
        progress("writing", len(shards), len(starts), "")
    for number, shard in workers.finish(assemble_shard, map(job_of, missing)):
        if shard is None:
            failed.append(number)
        else:
            shards[number] = shard
        progress("writing", len(shards), len(starts), "")
    if failed:
        raise OSError(
            f"the worker died three times while writing {tars[failed[0]].name} ({len(failed)} of {len(starts)} "
            "shards): run the same command again; it keeps what is done"
        )
    return finished, [shards[number] for number in range(len(starts))]


def _clean(folder: Path, finished: Path, key: str) -> None:
    """Make the folder `finished`, and remove what builds of other sets and unfinished writes have left."""
    for path in [*folder.glob("set-*"), *folder.glob("done-*")]:
        if key not in path.name:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    finished.mkdir(exist_ok=True)
    for path in finished.iterdir():
        if re.search(f"{UNFINISHED}$", path.name):
            path.unlink()


def assemble_shard(
    spools: Path, tar: Path, record: Path, first: int, images: Sequence[Kept], manifest: Manifest
) -> Shard:
    """Write the shard `tar`, whose ids begin with `first`, from files in the folder `spools`, then its record."""
    targets = {category: index for index, category in enumerate(manifest.classes)}

    def samples() -> Iterator[Sample]:
        for spool, group in groupby(images, key=lambda each: each.spool):
            with open(spools / spool, "rb") as file:
                for kept in group:
                    file.seek(kept.offset)
                    image = kept.entry
                    metadata = {
                        "fields": dict(image.fields),
                        "class": image.category,
                        "source": as_text(image.source),
                    }
                    labels = multi_hot(image.fields, manifest.fields)
                    yield Sample(file.read(kept.size), labels, targets[image.category], metadata)

    shard = write_shard(tar, samples(), first=first, extension=EXTENSIONS[manifest.codec])
    with replacing(record) as file:
        file.write(json.dumps(asdict(shard)).encode("ascii"))
    return shard
