"""`build`: all steps from a source to a finished shard set, in order."""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shard_builder import pack
from shard_builder.assemble import assemble
from shard_builder.atomic import sync_folder
from shard_builder.duplicates import duplicate_reasons, find_duplicates
from shard_builder.entries import Entry, Scan, as_text, choose
from shard_builder.inspect import read_contents
from shard_builder.labels import vocabularies
from shard_builder.manifest import Manifest, Rejected
from shard_builder.options import BuildOptions
from shard_builder.output import building, check_output, clear, existing_set, recover, replace_set
from shard_builder.pseudonym import key_beside
from shard_builder.report import write_report
from shard_builder.settings import InputError, Progress, no_progress, usable_cores
from shard_builder.source import scan_source
from shard_builder.workers import DIED, workers_of


@dataclass(frozen=True)
class BuildResult:
    """The manifest of the shard set, and whether the set was built now or existed already.

    `hidden` has the paths, within the source, of rejected DICOM files, by the hashes that name them in the manifest. A
    path may name a patient: show it to the person at the screen who owns the files, and write it nowhere.
    """

    manifest: Manifest
    built: bool
    hidden: Mapping[str, str] = field(default_factory=dict, repr=False)

    @property
    def lost(self) -> int:
        """The number of images left out because workers died while packing them."""
        return sum(each.reason == DIED for each in self.manifest.rejected)


def build(
    source: Path,
    out: Path,
    options: BuildOptions,
    *,
    overwrite: bool = False,
    progress: Progress = no_progress,
    executor: Executor | None = None,
) -> BuildResult:
    """Pack the images of `source`, a folder, a CSV table or a DICOMDIR, into a shard set in the folder `out`.

    The same source and options give the same bytes, whether the work is done by `options.workers` processes, a Dask
    cluster, or the given `executor`, whose workers must see both folders at the same paths. `out` appears when it is
    complete; the set that it replaces is readable until then. A finished set of the same source and options is left
    alone. What a stopped or killed build had finished is not done again.

    Raises `InputError` if the source cannot be used or has no usable image, or if `out` holds anything else and
    `overwrite` is not set, or if nothing can be written there; `OSError` if writing fails. Images that cannot be packed
    are listed in the manifest.
    """
    path = Path(os.path.realpath(out))
    count = options.workers or usable_cores()
    key = Path(os.path.realpath(options.key)) if options.key else key_beside(out)
    if key.is_relative_to(path):
        raise InputError(f"`key={options.key}` lies in {out}, which is replaced as a whole: keep it elsewhere")
    with building(path, out) as folder, workers_of(count, options.dask, executor) as workers:
        recover(path)
        check_output(path, out, overwrite)
        scan = scan_source(source, options, path, key, workers, progress)
        chosen = choose(scan.entries, per_class=options.per_class, seed=options.seed)
        states = pack.file_states(scan.root, chosen, progress)
        recorded = _recorded_options(scan, chosen, states, options)
        if not overwrite and (existing := existing_set(path, out, recorded)):
            return BuildResult(existing, built=False, hidden=_hidden(existing, scan, chosen))

        packer = pack.Packer(scan.root, chosen, states, folder, options.size, options.codec)
        packed = pack.pack(workers, packer, progress)
        groups = find_duplicates(packed.rows, chosen)
        packed.reasons |= duplicate_reasons(groups, chosen, options.duplicates)
        rejected = scan.rejected + [
            Rejected(as_text(chosen[n].source), reason) for n, reason in packed.reasons.items()
        ]
        rejected.sort(key=lambda each: (each.source, each.reason))
        kept = np.setdiff1d(np.arange(len(chosen)), list(packed.reasons))
        if not len(kept):
            clear(folder)
            example = f", such as {rejected[0].source}: {rejected[0].reason}" if rejected else ""
            raise InputError(f"no usable image in {source}: {len(rejected):,} were rejected{example}")

        manifest = Manifest(
            samples=len(kept),
            size=options.size,
            codec=options.codec,
            fields=vocabularies(scan.fields, (chosen[number].fields for number in kept)),
            classes=sorted({chosen[number].category for number in kept}),
            shards=[],
            rejected=rejected,
            options=recorded,
        )
        finished, shards = assemble(workers, folder, chosen, packed, kept, manifest, progress)
        manifest = replace(manifest, shards=shards)
        manifest.save(finished)
        sizes = np.stack([packed.rows[name][kept] for name in ("width", "height")], axis=1)
        copies = [[chosen[number] for number in group] for group in groups]
        write_report(finished, read_contents(finished, progress), Counter(map(tuple, sizes.tolist())), copies)
        sync_folder(finished)
        replace_set(finished, path)
    return BuildResult(manifest, built=True, hidden=_hidden(manifest, scan, chosen))


def _hidden(manifest: Manifest, scan: Scan, chosen: Sequence[Entry]) -> dict[str, str]:
    """The paths of the rejected DICOM files, by the hashes that name them."""
    rejected = {each.source for each in manifest.rejected}
    files = {entry.source: entry.file for entry in chosen if entry.frame is not None and entry.source in rejected}
    return {**scan.hidden, **files}


def _recorded_options(
    scan: Scan, chosen: Sequence[Entry], states: NDArray[np.int64], options: BuildOptions
) -> dict[str, Any]:
    """What shapes the content, as the manifest records it: equal for equal sets, and without paths of this machine."""
    digest = hashlib.sha256()
    for number in sorted(range(len(chosen)), key=lambda number: chosen[number].source):
        entry = chosen[number]
        labels = json.dumps([entry.fields, entry.category])
        digest.update(os.fsencode(entry.source) + f"\0{states[number, 0]}\0{labels}\0".encode())
    missing = {name: sum(name not in entry.fields for entry in chosen) for name in scan.fields}
    recorded: dict[str, Any] = {
        "source": {"form": scan.form, "images": len(chosen), "digest": digest.hexdigest()},
        "fields": list(scan.fields),
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
        recorded["source"]["missing"] = {name: count for name, count in missing.items() if count}
    if scan.unknown:
        recorded["source"]["unknown"] = dict(sorted(scan.unknown.items()))
    if any(entry.frame is not None for entry in chosen):
        recorded["source"]["names"] = "hashed"
        recorded |= {"frames": options.frames, "allow_burned_in": options.allow_burned_in}
    return recorded
