"""`BuildOptions`: the settings of a build, with their help and checks."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from shard_builder.duplicates import Duplicates
from shard_builder.manifest import Codec
from shard_builder.settings import InputError, check_settings, option


@dataclass(frozen=True)
class BuildOptions:
    """How a shard set is made. Raises `InputError` for settings that make no sense."""

    per_class: int = option(100, "Images to choose from each class at random; 0 takes all.", least=0)
    size: int = option(224, "Side of the stored images in pixels.", least=1, most=8192)
    codec: Codec = option(
        "png", "How pixels are stored: png (lossless), jpeg (quality 95) or raw (fastest to read)."
    )
    seed: int = option(0, "Seed of the choice and of the storage order.")
    workers: int | None = option(None, "Processes that read images; all cores by default.", least=1)
    anatomy: tuple[str, ...] = option(
        (), "Anatomy of a folder whose path names none, as PATH=VALUE: US/spleen2=abd."
    )
    skip_unknown: bool = option(False, "Leave out folders of unknown anatomy.")
    table: tuple[str, ...] = option(
        (), "CSV file of images in SOURCE: a column path, and columns of labels. Repeat it for several files."
    )
    fields: str | None = option(
        None,
        "Label fields, as a,b,c: columns of the table, or of DICOM modality, anatomy, laterality, view. "
        "By default modality,anatomy.",
    )
    require: str | None = option(None, "Leave out images that lack a value of any of these fields, as a,b.")
    map: Path | None = option(
        None, "CSV file with the columns field,from,to that renames label values; an empty new name removes them."
    )
    skip_missing: bool = option(False, "Leave out rows of a table whose image does not exist.")
    frames: int = option(
        1, "Frames to take from a DICOM file with several, evenly spaced; 1 takes the middle one.", least=1
    )
    allow_burned_in: bool = option(
        False, "Take DICOM files whose headers say that text is burned into the pixels."
    )
    key: Path | None = option(
        None, "File of the key that hashes the paths of DICOM files, made if missing. By default beside the set."
    )
    samples_per_shard: int = option(1000, "Images in one tar.", least=1)
    duplicates: Duplicates = option(
        "first", "Images with the same pixels: keep all, only the first by path, or drop all."
    )
    dask: str | None = option(
        None, "Address of the scheduler of a Dask cluster that does the work, such as tcp://host:8786."
    )

    def __post_init__(self) -> None:
        check_settings(self)
        for each in self.anatomy:
            path, equals, anatomy = each.partition("=")
            if not (equals and path.strip("/") and anatomy) or "/" in anatomy:
                raise InputError(f"`anatomy` must be PATH=VALUE, such as US/spleen2=abd, got {each!r}")
        for name, given in (("fields", self.fields), ("require", self.require)):
            names = _split(given)
            if not all(names) or len(set(names)) < len(names):
                raise InputError(f"`{name}` must be different names with commas between, got {given!r}")

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
