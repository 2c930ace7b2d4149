"""The command line: one function per command; only this package knows typer and rich.

Exit codes: 0 done; 1 it ran and found something wrong; 2 wrong use, bad input, or a full disk or memory; 130 stopped by
Ctrl-C, SIGTERM or SIGHUP: what was finished is kept.
Everything heavy is imported inside the command that needs it, so that `--help` answers at once.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from modan_fast import __version__
from modan_fast.cli.options import in_options, options_of
from modan_fast.cli.screen import (
    STOPPED,
    Stopped,
    complain,
    escape_unencodable,
    print_aucs,
    print_table,
    rank,
    say,
    show_messages,
    show_progress,
    signals_like_ctrl_c,
    stopped,
)
from modan_fast.config import EmbedConfig, EvaluateConfig, ExportConfig, PretrainConfig, ReportConfig, changed
from modan_fast.recipes import evaluate_config, pretrain_config
from shard_builder.options import BuildOptions
from shard_builder.settings import InputError

app = typer.Typer(
    name="modan-fast",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,  # plain help: its panels leave no room for the text on a usual terminal
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
CONTINUES = "the same command continues where it was"


def main() -> None:
    """Run the command in `sys.argv` and exit with its code."""
    debug = "--debug" in sys.argv  # anywhere, also after the command
    escape_unencodable()
    try:
        with signals_like_ctrl_c():
            code = app([each for each in sys.argv[1:] if each != "--debug"], standalone_mode=False)
        if code == STOPPED:  # typer's answer to an interruption
            raise Stopped("stopped")
    except (Stopped, KeyboardInterrupt) as error:
        if not rank():
            complain(str(error) or "stopped")
        code = STOPPED
    except Exception as error:  # whatever a library raises: a traceback would show the names in files as they are
        if debug:
            raise
        message, code = explained(error)
        if not said_elsewhere(error):
            complain(message)
    sys.exit(code)


def said_elsewhere(error: Exception) -> bool:
    """Whether another rank says what ended this one."""
    if not rank():
        return False
    from modan_fast.ranks import EndedElsewhere, LostRankError

    # If rank 0 is the one that was lost, rank 1 says so.
    return isinstance(error, EndedElsewhere) or (isinstance(error, LostRankError) and rank() > 1)


def explained(error: BaseException) -> tuple[str, int]:
    """What an error means to the user, and the exit code."""
    if rank():
        from modan_fast.ranks import EndedElsewhere

        if isinstance(error, EndedElsewhere):
            return str(error), error.code
    if isinstance(error, typer.Abort) and error.__cause__:  # how typer hands on an EOFError
        error = error.__cause__
    if isinstance(error, typer.TyperException):
        return error.format_message().replace("Value error, ", "") + " (see --help)", 2
    if isinstance(error, (InputError, OSError)):
        return in_options(str(error), app), 2
    if isinstance(error, FloatingPointError):
        return in_options(str(error), app), 1
    # torch: "CUDA out of memory. Tried to …" and "DefaultCPUAllocator: can't allocate memory: …"
    if isinstance(error, MemoryError) or re.search(r"CUDA out of memory|can't allocate memory", str(error)):
        advice = "close other programs, or choose smaller settings, such as --batch-size"
        return f"there is too little memory: {advice} ({str(error) or 'MemoryError'})", 2
    if isinstance(error, RuntimeError) and isinstance(error.__context__, OSError):
        return explained(error.__context__)  # torch hides a full disk behind an error of its own
    name = type(error).__name__
    return f"this should not happen: {name}: {error}; please report it with what --debug shows", 1


Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what is there already.")]


def print_version(wanted: bool) -> None:
    """The option --version."""
    if wanted:
        say(f"modan-fast {__version__}")
        raise typer.Exit


@app.callback()
def modan_fast(
    version: Annotated[
        bool, typer.Option("--version", callback=print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show where an error arose.")] = False,
) -> None:
    """Pretrain medical-image encoders from modality and anatomy, and judge them as the paper does.

    In this order: modan-fast shard ARCHIVE, modan-fast pretrain, modan-fast evaluate, modan-fast report RESULTS.

    Exit codes: 0 done; 1 it ran and found something wrong; 2 wrong use or bad input; 130 stopped, what was finished
    is kept.
    """
    show_messages(lambda message: in_options(message, app))


@app.command()
@options_of(BuildOptions)
def shard(
    source: Annotated[Path, typer.Argument(help="Folder of images or DICOM files, CSV file, or DICOMDIR.")],
    given: dict[str, Any],
    out: Annotated[Path, typer.Option(help="Folder to write the shard set to.")] = Path("shards"),
    overwrite: Overwrite = False,
) -> None:
    """Pack an archive of images and labels into shards.

    Shards are tar files for the WebDataset library. SOURCE is one of:

    A folder of MODALITY/anatomy/class/*.png or .jpg, or RadImageNet as shipped. The folders' names are the labels.

    A CSV file with a column path (or filename), relative to the file's folder, and columns of labels such as modality
    and anatomy. For images in another folder: shard FOLDER --table FILE.csv. A column class names the class, by default
    the joined labels; a column patient is not read. Without columns of labels, as in RadImageNet's
    RadiologyAI_train.csv, the paths are the labels.

    A folder of DICOM files, or a DICOMDIR. The labels are Modality and BodyPartExamined. No other value of a header is
    written, and no file name; text burned into the pixels is not removed.

    By default at most 100 images of each class are packed (--per-class, 0 for all).
    """
    from shard_builder.build import build
    from shard_builder.inspect import kinds
    from shard_builder.pseudonym import key_beside

    with stopped(CONTINUES), show_progress() as progress:
        result = build(source, out, changed(BuildOptions(), given), overwrite=overwrite, progress=progress)
    manifest = result.manifest
    vocabulary = ", ".join(f"{len(values)} of {name}" for name, values in manifest.fields.items())
    what = f"{manifest.samples:,} images of {len(manifest.classes)} classes in {len(manifest.shards)} shards"
    kept = "" if result.built else " (exists, made from files of the same names and sizes: left as it is)"
    say(f"{out}: {what}; labels: {vocabulary}{kept}")
    found = manifest.options["source"]
    for name, count in found.get("missing", {}).items():
        say(f"no value of {name}: {count:,} of {found['images']:,} images")
    for name, count in found.get("unknown", {}).items():
        say(f"unknown value of {name}: {count:,} DICOM files; name it with --map")
    if found.get("names") == "hashed":
        key = given.get("key") or key_beside(out)
        say(f"names are hashed with {key}: keep it apart from the set")
    for rejected in manifest.rejected[:10]:
        # Names of DICOM files are hashed in all that is kept, so also in a log; the user's own screen may show them.
        own_screen = sys.stdout.isatty()
        name = result.hidden.get(rejected.source, rejected.source) if own_screen else rejected.source
        say(f"left out: {name}: {rejected.reason}")
    if left := len(manifest.rejected):
        reasons = ", ".join(f"{count:,} {kind}" for kind, count in kinds(manifest.rejected).items())
        say(f"left out in all: {left:,} ({reasons}), see {out / 'report.html'}")
    if result.lost:
        say(f"{result.lost:,} of them because the workers died: try again with --overwrite")
        raise typer.Exit(1)


@app.command()
def verify(
    shards: Annotated[Path, typer.Argument(help="Folder of the shard set.")],
    workers: Annotated[int | None, typer.Option(min=1, help="Processes; all cores by default.")] = None,
) -> None:
    """Check a shard set byte by byte.

    Compares checksums, indices and labels, and decodes every image.
    """
    from shard_builder.verify import verify as check

    with show_progress() as progress:
        found = check(shards, workers=workers, progress=progress)
    if found.damage:
        bad = f" ({len(found.damage)} bad of {found.shards} shards)" if len(found.damage) > 1 else ""
        say(f"{shards}: damaged: {found.damage[0]}{bad}")
        raise typer.Exit(1)
    say(f"{shards}: whole: {found.samples:,} images in {found.shards} shards, {found.bytes / 2**20:,.1f} MiB")


@app.command("inspect")
def inspect_shards(
    shards: Annotated[Path, typer.Argument(help="Folder of the shard set.")],
    sheet: Annotated[Path | None, typer.Option(help="PNG file to write a contact sheet to.")] = None,
) -> None:
    """List what a shard set holds.

    Counts its images, labels and classes, and what was left out and why.
    """
    from shard_builder.inspect import describe, read_contents
    from shard_builder.sheet import strips, write_sheet

    with show_progress() as progress:
        contents = read_contents(shards, progress)
    say(*describe(contents).split("\n"))
    if sheet:
        write_sheet(sheet, list(strips(contents)))
        say("", f"{sheet}: images of each modality and anatomy")


@app.command()
@options_of(PretrainConfig)
def pretrain(
    given: dict[str, Any],
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run, with its own settings.")] = False,
    overwrite: Overwrite = False,
    profile: Annotated[
        bool, typer.Option("--profile", help="Only time the stages of some steps; nothing is written.")
    ] = False,
) -> None:
    """Train an encoder on a shard set.

    Writes a run folder: encoder.safetensors (a torchvision ResNet-18 without fc), checkpoint.pt, config.json
    and log.jsonl. Ctrl-C saves the state, and so does a scheduler's SIGTERM; --resume continues from it.
    --config RUN/config.json repeats the settings of another run.
    """
    from modan_fast.run import CHECKPOINT, finished_epochs, settings_for
    from modan_fast.trainer import pretrain as train

    if profile:
        print_profile(pretrain_config(given))
        return
    settings = settings_for(given, resume=resume)
    try:
        with show_progress() as progress:
            run = train(settings, resume=resume, overwrite=overwrite, progress=progress)
    except KeyboardInterrupt:
        saved = (settings.run / CHECKPOINT).exists()
        state = f"{settings.run} is saved, --resume continues it" if saved else "nothing was trained yet"
        raise Stopped(f"stopped; {state}") from None
    say(f"{run / 'encoder.safetensors'}: epoch {finished_epochs(run)}")


def print_profile(settings: PretrainConfig) -> None:
    """Time some steps of a run and print how long each stage takes."""
    from modan_fast.profile import COMPUTE, profile

    with show_progress() as progress:
        found = profile(settings, progress)
    rows = []
    for stage, seconds in found.stages.items():
        where = "in the step" if stage in COMPUTE else "in the background"
        rows.append([stage, f"{1000 * seconds:.1f}", f"{seconds / found.step:.0%}", where])
    rows.append(["wait", f"{1000 * found.waits * found.step:.1f}", f"{found.waits:.0%}", "in the step"])
    print_table(
        f"a step of {settings.batch_size} images",
        ["stage", "ms, alone", "of a step", "runs"],
        rows,
        total=["a step in training", f"{1000 * found.step:.1f}", "100%"],
    )
    say(in_options(found.verdict, app))


@app.command()
@options_of(EvaluateConfig)
def evaluate(given: dict[str, Any]) -> None:
    """Judge encoders on a downstream task.

    Fine-tunes them, probes them as the paper does, and judges their features by logistic regression and nearest
    neighbours; prints AUCs. The task has two or more classes, or several labels, in one of many layouts: fold files or
    one split as RadImageNet publishes them, class folders, a CSV file, a file of MedMNIST. If it is stopped, the same
    command continues where it was.
    """
    from modan_fast.downstream.evaluate import evaluate as judge
    from modan_fast.downstream.statistics import auc_table

    settings = evaluate_config(given)
    with stopped(CONTINUES), show_progress() as progress:
        judge(settings, progress)
    print_aucs(settings.out, auc_table(settings.out))


@app.command()
@options_of(EmbedConfig)
def embed(
    source: Annotated[
        str,
        typer.Argument(help="Shard set (folder or URL), folder of images or DICOM files, CSV file, or DICOMDIR."),
    ],
    given: dict[str, Any],
    overwrite: Overwrite = False,
) -> None:
    """Write the features of images by an encoder.

    --out FILE.npz has the arrays embeddings, filenames, labels, fields and classes; .csv and .parquet have a row for
    each image. FILE.json beside it says what made it and what was left out. SOURCE is a shard set, or what `modan-fast
    shard` reads; a folder of images may have any layout. If it is stopped, the same command continues where it was.
    """
    from modan_fast.embeddings import write_embeddings
    from shard_builder.inspect import kinds

    settings = changed(EmbedConfig(), given)
    if settings.out is None:
        raise InputError("no file to write: name one with `out=FILE.npz`, .csv or .parquet")
    with stopped(CONTINUES), show_progress() as progress:
        found = write_embeddings(source, settings, overwrite=overwrite, progress=progress)
    kept = "" if found.made else " (exists, made from the same source, encoder and settings: left as it is)"
    say(f"{found.path}: {found.images:,} images, {found.features:,} features each{kept}")
    if found.key:
        say(f"names are hashed with {found.key}: keep it apart from the file")
    own_screen = sys.stdout.isatty()  # see `shard`
    for rejected in found.left_out[:10]:
        name = found.hidden.get(rejected.source, rejected.source) if own_screen else rejected.source
        say(f"left out: {name}: {rejected.reason}")
    if left := len(found.left_out):
        reasons = ", ".join(f"{count:,} {kind}" for kind, count in kinds(found.left_out).items())
        say(f"left out in all: {left:,} ({reasons}), see {found.path}.json")


@app.command()
@options_of(ReportConfig)
def report(
    results: Annotated[Path, typer.Argument(help="Results folder, as `modan-fast evaluate` writes it.")],
    given: dict[str, Any],
) -> None:
    """Write the paper's tables and figures.

    Makes files and one HTML page from a results folder. Tables 4 and 5 have the paper's own figures beside yours, as
    Markdown, CSV and LaTeX. report.html holds everything and needs no other file.
    """
    from modan_fast.report.page import write_report

    with stopped("the same command starts again"), show_progress() as progress:
        page = write_report(results, changed(ReportConfig(), given), progress)
    say(f"{page}: its tables and figures are in {page.parent / 'tables'} and {page.parent / 'figures'}")


@app.command()
@options_of(ExportConfig)
def export(
    run: Annotated[
        str,
        typer.Argument(help="Run folder, encoder file, or ENCODER=FILE for another program's (timm/NAME=FILE)."),
    ],
    given: dict[str, Any],
    out: Annotated[Path, typer.Option(help="Folder to write.")] = Path("exported"),
    overwrite: Overwrite = False,
) -> None:
    """Write an encoder as a folder that other programs load.

    Makes model.safetensors, a model card (README.md), and config.json for timm.create_model("local-dir:FOLDER",
    pretrained=True, num_classes=0) where timm has such a network: all but a resnet18 with the 3x3 stem. The card says
    how each program loads it.
    """
    from modan_fast.export import export_encoder

    with stopped("nothing was written"):
        folder = export_encoder(run, out, changed(ExportConfig(), given), overwrite=overwrite)
    say(f"{folder}: {', '.join(sorted(path.name for path in folder.iterdir()))}")


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder to write everything to.")] = Path("demo"),
    overwrite: Overwrite = False,
) -> None:
    """Run every command in miniature, in three minutes.

    Makes an archive of synthetic CT, MR and ultrasound images, shards it, pretrains on it, and judges the encoder
    beside an untrained one on a synthetic lesion task.
    """
    from modan_fast.demo import demo as run
    from modan_fast.downstream.statistics import auc_table

    with stopped(CONTINUES), show_progress() as progress:
        made = run(out, overwrite=overwrite, progress=progress)
    print_aucs(made.results, auc_table(made.results))
    say(
        "",
        "These figures say nothing about medicine: the images are synthetic, and the training is too short to move "
        "them much.",
        "What was made:",
        f"  {made.archive}: images in folders MODALITY/anatomy/class    {made.task}: a lesion task with its folds",
        f"  {made.shards}: the images as WebDataset shards    {made.run}: log, checkpoint and encoder",
        f"  {made.results}: predictions and times",
        f"  {made.contact_sheet}: images beside their two views    {made.embedding}: the encoder before and after",
        "",
        "The same with your own images:",
        "  modan-fast shard /data/RadImageNet",
        "  modan-fast pretrain --method mulsupcon",
        "  modan-fast evaluate --task /data/breast --init runs/mulsupcon --init scratch",
    )


@app.command()
def phantom(
    out: Annotated[Path, typer.Argument(help="Folder to write; new or empty.")],
    per_class: Annotated[
        int, typer.Option(help="Images a class; with 100 as many as miniRIN has, 16,222.")
    ] = 100,
    size: Annotated[int, typer.Option(help="Side of an image in pixels.")] = 224,
    seed: Annotated[int, typer.Option(help="Seed of the images.")] = 0,
    workers: Annotated[int | None, typer.Option(help="Processes; all cores by default.")] = None,
) -> None:
    """Make a synthetic archive, for trials.

    It has RadImageNet's folders, modalities and regions, with synthetic images.
    """
    from modan_fast.phantom import phantom_archive

    with stopped("the same command starts again"), show_progress() as progress:
        images = phantom_archive(
            out, per_class=per_class, size=size, seed=seed, workers=workers, progress=progress
        )
    say(f"{out}: {images:,} synthetic images; modan-fast shard {out} packs them")


@app.command()
def doctor() -> None:
    """Show what this machine offers.

    Lists the hardware and the installed versions, and what modan-fast does with them by default.
    """
    from modan_fast.devices import unusable_gpu
    from modan_fast.doctor import examine

    found, follows = examine()
    for name, finding in found:
        say(f"{name:14} {finding}")
    say("", *follows)
    if problem := unusable_gpu():
        say("", f"problem: {in_options(problem, app)}")
        raise typer.Exit(1)
