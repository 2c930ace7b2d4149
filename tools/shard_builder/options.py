"""The settings of a build."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from shard_builder.duplicates import Duplicates
from shard_builder.manifest import Codec
from shard_builder.settings import InputError, check_settings, option


@dataclass(frozen=True)
class BuildOptions:
    """How a shard set is made. Raises `InputError` for settings that make no sense."""

    per_class: int = option(100, "Images to take from each class, at random; 0 takes all.", least=0)
    size: int = option(224, "Side of the stored images in pixels.", least=1, most=8192)
    codec: Codec = option(
        "png", "How pixels are stored: png (lossless), jpeg (quality 95) or raw (fastest to read)."
    )
    seed: int = option(0, "Seed of the choice and of the storage order.")
    workers: int | None = option(None, "Processes that read images; all cores by default.", least=1)
    anatomy: tuple[str, ...] = option((), "Anatomy of a folder that has none, as PATH=VALUE: US/spleen2=abd.")
    skip_unknown: bool = option(False, "Leave out folders whose anatomy is not known.")
    table: tuple[str, ...] = option(
        (), "CSV file of images in SOURCE: a column path, and columns with labels; may be given again."
    )
    fields: str | None = option(
        None,
        "Label fields, as a,b,c: columns of the table, or of DICOM modality, anatomy, laterality, view. "
        "By default modality,anatomy.",
    )
    require: str | None = option(None, "Leave out images without a value of these fields, as a,b.")
    map: Path | None = option(None, "CSV file field,from,to of values to name anew; an empty name is no value.")
    skip_missing: bool = option(False, "Leave out rows of a table whose image is not there.")
    frames: int = option(
        1, "Frames to take of a DICOM file with many, evenly spaced; 1 takes the middle one.", least=1
    )
    allow_burned_in: bool = option(False, "Take DICOM files that say they have text burned into their pixels.")
    key: Path | None = option(
        None, "File with the key that hides the names of DICOM files, made if missing. By default beside the set."
    )
    samples_per_shard: int = option(1000, "Images in one tar.", least=1)
    duplicates: Duplicates = option(
        "first", "Images with the same pixels: keep all, the first by path, or drop them all."
    )
    dask: str | None = option(None, "Scheduler of a Dask cluster that does the work, such as tcp://host:8786.")

    def __post_init__(self) -> None:
        check_settings(self)
        for each in self.anatomy:
            path, equals, anatomy = each.partition("=")
            if not (equals and path.strip("/") and anatomy) or "/" in anatomy:
                raise InputError(f"`anatomy` must be PATH=VALUE, such as US/spleen2=abd, got {each}")

        for name, given in (("fields", self.fields), ("require", self.require)):
            names = _split(given)
            if not all(names) or len(set(names)) < len(names):
                raise InputError(
                    f"`{name}` must be different names with commas between, got {given or 'nothing'}"
                )

    @property
    def chosen_fields(self) -> tuple[str, ...]:
        """`fields` as names; none by default."""
        return _split(self.fields)

    @property
    def required(self) -> tuple[str, ...]:
        """`require` as names."""
        return _split(self.require)

    @property
    def anatomies(self) -> dict[str, str]:
        """`anatomy` as a mapping from folder path to value."""
        pairs = (each.partition("=") for each in self.anatomy)
        return {path.strip("/"): value for path, _, value in pairs}


def _split(names: str | None) -> tuple[str, ...]:
    return tuple(each.strip().lower() for each in names.split(",")) if names is not None else ()
