"""Source to shard set: choose, pack in parallel, number what is left, write the shards, put them in place."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shard_builder import pack
from shard_builder.atomic import replacing, sync_folder
from shard_builder.duplicates import same_pixels, set_aside
from shard_builder.inspect import read_contents
from shard_builder.labels import multi_hot, vocabularies
from shard_builder.manifest import EXTENSIONS, Codec, Manifest, Rejected, Shard
from shard_builder.options import BuildOptions
from shard_builder.output import building, check_place, existing_set, put_in_place, recover
from shard_builder.pseudonym import key_beside
from shard_builder.report import write_report
from shard_builder.scan import Entry, Scan, as_text, choose
from shard_builder.settings import InputError, Progress, no_progress, usable_cores
from shard_builder.source import scan_source
from shard_builder.workers import DIED, Job, Workers, workers_of
from shard_builder.writer import Sample, write_shard


@dataclass(frozen=True)
class BuildResult:
    """The manifest of the shard set, and whether it was built now or was there already."""

    manifest: Manifest
    built: bool

    @property
    def lost(self) -> int:
        """Images that are not in the set because they, or something beside them, killed the workers."""
        return sum(each.reason == DIED for each in self.manifest.rejected)


@dataclass(frozen=True, slots=True)
class Kept:
    """An image that goes into the set, and where its encoded bytes lie until its shard is written."""

    entry: Entry
    spool: str
    offset: int
    size: int


def build(
    source: Path,
    out: Path,
    options: BuildOptions,
    *,
    overwrite: bool = False,
    progress: Progress = no_progress,
    executor: Executor | None = None,
) -> BuildResult:
    """Pack the images of `source`, a folder, a table or a DICOMDIR, into a shard set, the folder `out`.

    The same source and options give the same bytes, whatever the workers: `options.workers` processes, a Dask
    cluster, or the given `executor`, whose workers must see both folders by the same paths. `out` appears when it is
    complete; what it held is readable until then. A finished set of the same source and options is left alone, and
    what a stopped or killed build had finished is not done again.

    Raises `InputError` where the source is none, has no usable image, or `out` holds anything else and not
    `overwrite`; `OSError` where writing fails. Images that cannot be packed are listed in the manifest.
    """
    place = Path(os.path.realpath(out))
    count = options.workers or usable_cores()
    key = Path(os.path.realpath(options.key)) if options.key else key_beside(out)
    if key.is_relative_to(place):
        raise InputError(f"`key={options.key}` lies in {out}, which is replaced as a whole: keep it elsewhere")
    with building(place, out) as folder, workers_of(count, options.dask, executor) as workers:
        recover(place)
        check_place(place, out, overwrite)
        found = scan_source(source, options, place, key, workers, progress)
        chosen = choose(found.entries, per_class=options.per_class, seed=options.seed)
        states = pack.file_states(found.root, chosen, progress)
        recorded = _recorded(found, chosen, states, options)
        if not overwrite and (existing := existing_set(place, out, recorded)):
            return BuildResult(existing, built=False)
        packed = pack.pack(
            workers, found.root, chosen, states, folder, size=options.size, codec=options.codec, progress=progress
        )
        groups = same_pixels(packed.rows, chosen)
        packed.reasons |= set_aside(groups, chosen, options.duplicates)
        rejected = found.rejected + [
            Rejected(as_text(chosen[n].source), why) for n, why in packed.reasons.items()
        ]
        rejected.sort(key=lambda each: (each.source, each.reason))
        kept = np.setdiff1d(np.arange(len(chosen)), list(packed.reasons))
        if not len(kept):
            shutil.rmtree(folder)
            why = f", such as {rejected[0].source}: {rejected[0].reason}" if rejected else ""
            raise InputError(f"no usable image in {source}: {len(rejected):,} were rejected{why}")
        fields = vocabularies(found.fields, (chosen[number].fields for number in kept))
        classes = sorted({chosen[number].category for number in kept})
        finished, shards = _assemble(
            workers, chosen, packed, kept, fields, classes, folder, options, recorded, progress
        )
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
        result.save(finished)
        widths_heights = np.stack([packed.rows[name][kept] for name in ("width", "height")], axis=1)
        originals = Counter(map(tuple, widths_heights.tolist()))
        copies = [[chosen[number] for number in group] for group in groups]
        write_report(finished, read_contents(finished, progress), originals, copies)
        sync_folder(finished)
        put_in_place(finished, place)
    return BuildResult(result, built=True)


def _recorded(
    found: Scan, chosen: Sequence[Entry], states: NDArray[np.int64], options: BuildOptions
) -> dict[str, Any]:
    """What shapes the content, for the manifest: equal for equal sets, without paths of this machine."""
    digest = hashlib.sha256()
    for number in sorted(range(len(chosen)), key=lambda number: chosen[number].source):
        entry = chosen[number]
        labels = json.dumps([entry.fields, entry.category])
        digest.update(os.fsencode(entry.source) + f"\0{states[number, 0]}\0{labels}\0".encode())
    missing = {name: sum(name not in entry.fields for entry in chosen) for name in found.fields}
    shaping: dict[str, Any] = {
        "source": {"form": found.form, "images": len(chosen), "digest": digest.hexdigest()},
        "fields": list(found.fields),
        "per_class": options.per_class,
        "size": options.size,
        "codec": options.codec,
        "seed": options.seed,
        "anatomy": dict(sorted(options.anatomies.items())),
        "skip_unknown": options.skip_unknown,
        "samples_per_shard": options.samples_per_shard,
        "duplicates": options.duplicates,
    }
    if any(missing.values()):
        shaping["source"]["missing"] = {name: count for name, count in missing.items() if count}
    if found.unknown:
        shaping["source"]["unknown"] = dict(sorted(found.unknown.items()))
    if any(entry.frame is not None for entry in chosen):
        shaping["source"]["names"] = "hashed"
        shaping |= {"frames": options.frames, "allow_burned_in": options.allow_burned_in}
    return shaping


def _assemble(
    workers: Workers,
    chosen: Sequence[Entry],
    packed: pack.Packed,
    kept: NDArray[np.int64],
    fields: Mapping[str, list[str]],
    classes: list[str],
    folder: Path,
    options: BuildOptions,
    recorded: Mapping[str, Any],
    progress: Progress,
) -> tuple[Path, list[Shard]]:
    """Write all shards, copying the images `kept` from the spools; the folder they are in, and their lines.

    That folder's name tells what they are made of. A shard's line is written to a file beside it when the shard is
    finished; a killed build's shards with a line are used as they are.
    """
    spools = [packed.spools[spool] for spool in dict.fromkeys(packed.spool[kept].tolist())]
    made = json.dumps([recorded, spools, sorted(packed.reasons.items())])
    key = hashlib.sha256(made.encode()).hexdigest()[:32]
    for path in [*folder.glob("set-*"), *folder.glob("done-*")]:
        if key not in path.name:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    finished = folder / f"set-{key}"
    finished.mkdir(exist_ok=True)
    for part in finished.glob("*.part"):
        part.unlink()
    starts = range(0, len(kept), options.samples_per_shard)
    tars = [finished / f"shard-{number:06}.tar" for number in range(len(starts))]
    lines = [folder / f"done-{key}-{number:06}" for number in range(len(starts))]
    shards = {
        number: Shard(**json.loads(lines[number].read_bytes()))
        for number, tar in enumerate(tars)
        if tar.exists() and lines[number].exists()
    }

    def job_of(number: int) -> Job[int]:
        start = starts[number]
        images = [
            Kept(chosen[n], packed.spools[packed.spool[n]], int(packed.offset[n]), int(packed.rows["bytes"][n]))
            for n in kept[start : start + options.samples_per_shard]
        ]
        return Job(number, (folder, tars[number], lines[number], start, images, fields, classes, options.codec))

    missing = [number for number in range(len(starts)) if number not in shards]
    failed = []
    if shards:
        progress("writing", len(shards), len(starts), "")
    for number, shard in workers.finish(_assemble_shard, map(job_of, missing)):
        if shard is None:
            failed.append(number)
        else:
            shards[number] = shard
        progress("writing", len(shards), len(starts), "")
    if failed:
        raise OSError(
            f"the worker died three times while writing {tars[failed[0]].name} ({len(failed)} of {len(starts)} "
            "shards): the same command tries again, and keeps what is done"
        )
    return finished, [shards[number] for number in range(len(starts))]


def _assemble_shard(
    spools: Path,
    path: Path,
    line: Path,
    first: int,
    kept: Sequence[Kept],
    fields: Mapping[str, list[str]],
    classes: list[str],
    codec: Codec,
) -> Shard:
    indices = {category: index for index, category in enumerate(classes)}

    def samples() -> Iterator[Sample]:
        for spool, group in groupby(kept, key=lambda each: each.spool):
            with open(spools / spool, "rb") as file:
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

    shard = write_shard(path, samples(), first=first, extension=EXTENSIONS[codec])
    with replacing(line) as file:
        file.write(json.dumps(asdict(shard)).encode("ascii"))
    return shard
