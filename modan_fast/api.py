"""The commands as functions of keyword arguments: what a notebook gets from `import modan_fast`."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Executor
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

from modan_fast.config import EmbedConfig, ExportConfig, ReportConfig, changed
from modan_fast.metrics import Logger
from modan_fast.recipes import evaluate_config
from shard_builder.options import BuildOptions
from shard_builder.settings import Progress, no_progress

if TYPE_CHECKING:
    from modan_fast.downstream.statistics import Row
    from modan_fast.embeddings import Embeddings, Written
    from shard_builder.build import BuildResult


def build_shards(
    source: str | Path,
    out: str | Path = "shards",
    *,
    overwrite: bool = False,
    executor: Executor | None = None,
    progress: Progress = no_progress,
    **settings: Any,
) -> BuildResult:
    """Pack the images of `source`, a folder, a table or a DICOMDIR, into the shard set `out`.

    `settings` are the fields of `shard_builder.options.BuildOptions`, such as `per_class=0`. Work is done by the
    `executor`, by default by processes on all cores. Raises `InputError` for bad input and settings.
    """
    from shard_builder.build import build

    options = changed(BuildOptions(), settings)
    return build(Path(source), Path(out), options, overwrite=overwrite, progress=progress, executor=executor)


def pretrain(
    *,
    resume: bool = False,
    overwrite: bool = False,
    loggers: Sequence[Logger] = (),
    progress: Progress = no_progress,
    **settings: Any,
) -> Path:
    """Train an encoder; return the run folder.

    `settings` are the fields of `modan_fast.config.PretrainConfig`, such as `method="simclr"`, `epochs=100` or
    `augmentation={"scale": (0.1, 1.0)}`; the others come from the recipe. Each of `loggers` gets the metrics of every
    epoch. Raises `InputError` for bad input and settings, FloatingPointError if the loss is no longer finite.
    """
    from modan_fast import run, trainer

    config = run.settings_for(settings, resume=resume)
    return trainer.pretrain(config, resume=resume, overwrite=overwrite, loggers=loggers, progress=progress)


def evaluate(*, progress: Progress = no_progress, **settings: Any) -> list[Row]:
    """Judge encoders on a downstream task; return a row for each task, recipe, protocol and init in the results folder.

    `settings` are the fields of `modan_fast.config.EvaluateConfig`, such as `task="/data/breast"`,
    `init=["runs/mulsupcon", "scratch"]`, `protocol=["logistic"]` and `labels=[1, 5, 10]`. If it is stopped, the same
    call continues. Raises `InputError` for bad input and settings.
    """
    from modan_fast.downstream import evaluate as downstream
    from modan_fast.downstream.statistics import auc_table

    config = evaluate_config(settings)
    downstream.evaluate(config, progress)
    return auc_table(config.out)


def write_report(results: str | Path, *, progress: Progress = no_progress, **settings: Any) -> Path:
    """Write tables, figures and `report.html` from a results folder; return the page's path.

    `settings` are the fields of `modan_fast.config.ReportConfig`. Raises `InputError` for bad input and settings.
    """
    from modan_fast.report import page

    return page.write_report(Path(results), changed(ReportConfig(), settings), progress)


def export_encoder(
    run: str | Path, out: str | Path = "exported", *, overwrite: bool = False, **settings: Any
) -> Path:
    """Write an encoder as a folder that other programs load; return the folder.

    `run` is whatever `load_encoder` takes. `settings` are the fields of `modan_fast.config.ExportConfig`, such as
    `onnx=True`. Raises `InputError` for bad input and settings.
    """
    from modan_fast import export

    return export.export_encoder(run, Path(out), changed(ExportConfig(), settings), overwrite=overwrite)


@overload
def embed(
    source: str | Path,
    *,
    init: str | Path,
    out: None = None,
    overwrite: bool = False,
    progress: Progress = no_progress,
    **settings: Any,
) -> Embeddings: ...


@overload
def embed(
    source: str | Path,
    *,
    init: str | Path,
    out: str | Path,
    overwrite: bool = False,
    progress: Progress = no_progress,
    **settings: Any,
) -> Written: ...


def embed(
    source: str | Path,
    *,
    init: str | Path,
    out: str | Path | None = None,
    overwrite: bool = False,
    progress: Progress = no_progress,
    **settings: Any,
) -> Embeddings | Written:
    """Compute the features of the images in `source` by the encoder `init`; return them, or write them to `out`.

    `source` is a shard set, a folder of images or DICOM files, a table or a DICOMDIR; `out` is a .npz, .csv or .parquet
    file. `settings` are the other fields of `modan_fast.config.EmbedConfig`, such as `image_size=224`. If writing is
    stopped, the same call continues. Raises `InputError` for bad input and settings.
    """
    from modan_fast import embeddings

    config = changed(EmbedConfig(init=str(init)), {"out": out, **settings})
    if config.out is None:
        return embeddings.embed(source, config, progress)
    return embeddings.write_embeddings(source, config, overwrite=overwrite, progress=progress)
