"""The command line: options made from the settings, progress on the screen, errors as one line.

Exit codes: 0 done; 1 it ran and found something wrong; 2 wrong use or bad input; 130 interrupted, state saved.
Everything heavy is imported inside the command that needs it, so that `--help` answers at once.
"""

from __future__ import annotations

import enum
import inspect
import logging
import sys
import time
import typing
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import Field, fields
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.logging import RichHandler
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress as Bars,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from modan_fast import __version__, config
from shard_builder.options import BuildOptions
from shard_builder.settings import InputError, Progress

app = typer.Typer(
    name="modan-fast",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,  # plain help: its panels leave no room for the text on a usual terminal
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
screen = Console(stderr=True)
CONTINUES = "the same command continues with what is done"


def main() -> None:
    """Run the command that `sys.argv` names and exit with its code."""
    debug = "--debug" in sys.argv  # anywhere, also behind the command
    try:
        sys.exit(app([each for each in sys.argv[1:] if each != "--debug"], standalone_mode=False))
    except (InputError, OSError, typer.TyperException, FloatingPointError) as error:
        if debug:
            raise
        if isinstance(error, typer.TyperException):
            message = error.format_message().replace("Value error, ", "") + " (--help tells more)"
        else:
            message = str(error)
        print(f"modan-fast: {' '.join(message.split())}", file=sys.stderr)
        sys.exit(1 if isinstance(error, FloatingPointError) else 2)


def options_of(settings: type) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Gives a command an option for each field of the dataclass `settings`, after those that it declares itself.

    An option's help, type and default are the field's. The command gets only what the user named, as `given`.
    """

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        kinds = typing.get_type_hints(settings)
        options = []
        for field in fields(settings):
            if field.metadata.get("hidden"):
                continue
            kind = kinds[field.name]
            if typing.get_origin(kind) is tuple:
                kind = list[_choice(typing.get_args(kind)[0])]  # type: ignore[misc]
            option = typer.Option(help=field.metadata["help"] + _default_note(field), show_default=False)
            options.append(
                inspect.Parameter(
                    field.name,
                    inspect.Parameter.KEYWORD_ONLY,
                    default=None,
                    annotation=Annotated[kind | None, option],
                )
            )
        names = {option.name for option in options}

        def called(**arguments: Any) -> Any:
            given = {name: arguments.pop(name) for name in names}
            given = {
                name: tuple(map(str, value)) if isinstance(value, list) else value
                for name, value in given.items()
                if value is not None and value != []
            }
            return command(given=given, **arguments)

        own = inspect.signature(command, eval_str=True).parameters.values()
        parameters = [parameter for parameter in own if parameter.name != "given"]
        wrapped: Any = called
        wrapped.__name__, wrapped.__doc__ = command.__name__, command.__doc__
        wrapped.__signature__ = inspect.Signature(
            [each.replace(kind=inspect.Parameter.KEYWORD_ONLY) for each in parameters] + options
        )
        wrapped.__annotations__ = {each.name: each.annotation for each in [*parameters, *options]}
        return called

    return decorate


def _default_note(field: Field[Any]) -> str:
    """What the help says of a default; the command itself is told only what the user named."""
    value = field.default
    if value is None or value == ():
        return ""
    if isinstance(value, bool):
        value = "on" if value else "off"
    if isinstance(value, tuple):
        value = ", ".join(value)
    return f"  [default: {value}{', by the recipe' if field.metadata.get('recipe') else ''}]"


def _choice(kind: Any) -> Any:
    """An enumeration in place of a Literal, which typer does not take inside a list."""
    if typing.get_origin(kind) is not typing.Literal:
        return kind
    return enum.StrEnum("Choice", {value: value for value in typing.get_args(kind)})


@contextmanager
def stopped(message: str) -> Iterator[None]:
    """Says on Ctrl-C what becomes of what was done."""
    try:
        yield
    except KeyboardInterrupt:
        print(f"modan-fast: stopped; {message}", file=sys.stderr)
        raise


@contextmanager
def show_progress() -> Iterator[Progress]:
    """A `Progress` that draws a bar for each stage on a terminal, and else prints a line now and then."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("eta"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    stages: dict[str, Any] = {}
    printed: dict[str, float] = {}

    def draw(stage: str, done: int, total: int, note: str = "") -> None:
        if stage not in stages:
            # What a resumed run had done before says nothing about its speed.
            stages[stage] = bars.add_task(stage, total=total, completed=done, note=note)
        bars.update(stages[stage], total=total, completed=done, note=note)

    def write(stage: str, done: int, total: int, note: str = "") -> None:
        now = time.monotonic()
        first_seen, first_done = stages.setdefault(stage, (now, done))
        wait = 30 if stage in printed else 2
        if now - printed.get(stage, first_seen) < wait and done < total:
            return
        printed[stage] = now
        left = (now - first_seen) / max(done - first_done, 1) * (total - done)
        ending = f"eta {left:.0f} s" if done < total else f"{now - first_seen:.1f} s"
        print(f"{stage} {done}/{total}, {ending}  {note}".rstrip(), file=sys.stderr, flush=True)

    if screen.is_terminal:
        with Bars(*columns, console=screen) as bars:
            yield draw
    else:
        yield write


def show_messages() -> None:
    """Show the package's own messages, and others' warnings, on the screen."""
    handler = RichHandler(console=screen, show_time=False, show_path=False, show_level=screen.is_terminal)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[handler])
    logging.getLogger("modan_fast").setLevel(logging.INFO)


Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what is there already.")]


def print_version(wanted: bool) -> None:
    """The option --version."""
    if wanted:
        print(f"modan-fast {__version__}")
        raise typer.Exit


@app.callback()
def modan_fast(
    version: Annotated[
        bool, typer.Option("--version", callback=print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show where an error arose.")] = False,
) -> None:
    """Pretrain medical-image encoders from modality and anatomy, and judge them as the paper does.

    The way: modan-fast shard ARCHIVE, then modan-fast pretrain, modan-fast evaluate, modan-fast report RESULTS.
    """
    show_messages()


@app.command()
@options_of(BuildOptions)
def shard(
    source: Annotated[Path, typer.Argument(help="Folder of images or DICOM files, CSV file, or DICOMDIR.")],
    given: dict[str, Any],
    out: Annotated[Path, typer.Option(help="Folder to write the shard set to.")] = Path("shards"),
    overwrite: Overwrite = False,
) -> None:
    """Pack an archive of images and labels into shards.

    Shards are tar files as the WebDataset library reads them.

    SOURCE may be a folder of MODALITY/anatomy/class/*.png or .jpg, or RadImageNet as shipped: labels come from the
    folders' names.

    Or a CSV file with a column path (or filename) and columns with labels, such as modality and anatomy: paths count
    from the file's own folder. To name another one: shard FOLDER --table FILE.csv. A column class names the class,
    else it is the joined labels; a column patient is not read. RadImageNet's RadiologyAI_train.csv needs no columns
    with labels: without them, the paths tell, as folders do.

    Or a folder of DICOM files, or a DICOMDIR: labels come from Modality and BodyPartExamined. Nothing else of a
    header is written, nor the files' names; burned-in text is not removed.

    Takes at most 100 images a class unless --per-class says otherwise (0 for all).
    """
    from shard_builder.build import build
    from shard_builder.inspect import kinds
    from shard_builder.pseudonym import key_beside

    with stopped(CONTINUES), show_progress() as progress:
        result = build(source, out, BuildOptions(**given), overwrite=overwrite, progress=progress)
    manifest = result.manifest
    vocabulary = ", ".join(f"{len(values)} of {name}" for name, values in manifest.fields.items())
    what = f"{manifest.samples:,} images of {len(manifest.classes)} classes in {len(manifest.shards)} shards"
    kept = (
        "" if result.built else " (was there already, of files with these names and sizes, and is left as it is)"
    )
    print(f"{out}: {what}; labels: {vocabulary}{kept}")
    found = manifest.options["source"]
    for name, count in found.get("missing", {}).items():
        print(f"no value of {name}: {count:,} of {found['images']:,} images")
    for name, count in found.get("unknown", {}).items():
        print(f"unknown value of {name}: {count:,} DICOM files; --map names it")
    if found.get("names") == "hashed":
        key = given.get("key") or key_beside(out)
        print(f"names are hashed with {key}: keep it apart from the set")
    for rejected in manifest.rejected[:10]:
        print(f"left out: {rejected.source}: {rejected.reason}")
    if left := len(manifest.rejected):
        reasons = ", ".join(f"{count:,} {kind}" for kind, count in kinds(manifest.rejected).items())
        print(f"left out in all: {left:,} ({reasons}), see {out / 'report.html'}")
    if result.lost:
        print(f"{result.lost:,} of them because the workers died: --overwrite tries again")
        raise typer.Exit(1)


@app.command()
def verify(
    shards: Annotated[Path, typer.Argument(help="Folder of the shard set.")],
    workers: Annotated[int | None, typer.Option(min=1, help="Processes; all cores by default.")] = None,
) -> None:
    """Check a shard set byte by byte.

    Its checksums, indices and labels, and that every image decodes.
    """
    from shard_builder.verify import verify as check

    with show_progress() as progress:
        found = check(shards, workers=workers, progress=progress)
    if found.damage:
        bad = f" ({len(found.damage)} bad of {found.shards} shards)" if len(found.damage) > 1 else ""
        print(f"{shards}: damaged: {found.damage[0]}{bad}")
        raise typer.Exit(1)
    print(f"{shards}: whole: {found.samples:,} images in {found.shards} shards, {found.bytes / 2**20:,.1f} MiB")


@app.command("inspect")
def inspect_shards(
    shards: Annotated[Path, typer.Argument(help="Folder of the shard set.")],
    sheet: Annotated[Path | None, typer.Option(help="PNG file to write a contact sheet to.")] = None,
) -> None:
    """Tell what a shard set holds.

    Its images, labels and classes, and what was left out and why.
    """
    from shard_builder.inspect import describe, read_contents
    from shard_builder.sheet import strips, write_sheet

    with show_progress() as progress:
        contents = read_contents(shards, progress)
    print(describe(contents))
    if sheet:
        write_sheet(sheet, list(strips(contents)))
        print(f"\n{sheet}: images of each modality and anatomy")


@app.command()
@options_of(config.PretrainConfig)
def pretrain(
    given: dict[str, Any],
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run, with its own settings.")] = False,
    overwrite: Overwrite = False,
    profile: Annotated[
        bool, typer.Option("--profile", help="Only time some steps, stage by stage; nothing is written.")
    ] = False,
) -> None:
    """Train an encoder on a shard set.

    Writes a run folder: encoder.safetensors (a torchvision ResNet-18 without fc), checkpoint.pt, config.json
    and log.jsonl. Ctrl-C saves the state; --resume continues from it.
    """
    from modan_fast import checkpoint
    from modan_fast.pretrain import pretrain as train

    if profile:
        print_profile(config.pretrain_config(given))
        return
    settings = config.pretrain_config({} if resume else given)
    if resume:
        settings = checkpoint.resumed_config(config.pretrain_config(given).run, given)
    try:
        with show_progress() as progress:
            run = train(settings, resume=resume, overwrite=overwrite, progress=progress)
    except KeyboardInterrupt:
        saved = (settings.run / "checkpoint.pt").exists()
        state = f"{settings.run} is saved, --resume continues it" if saved else "nothing was trained yet"
        print(f"modan-fast: stopped; {state}", file=sys.stderr)
        raise
    print(f"{run / 'encoder.safetensors'}: epoch {checkpoint.finished_epochs(run)}")


def print_profile(settings: config.PretrainConfig) -> None:
    """Time a run's steps, and print where their time goes."""
    from modan_fast.profile import COMPUTE, profile

    with show_progress() as progress:
        found = profile(settings, progress)
    table = Table("stage", "ms, alone", "of a step", "runs", title=f"a step of {settings.batch_size} images")
    for stage, seconds in found.stages.items():
        where = "in the step" if stage in COMPUTE else "in the background"
        table.add_row(stage, f"{1000 * seconds:.1f}", f"{seconds / found.step:.0%}", where)
    table.add_row(
        "wait", f"{1000 * found.waits * found.step:.1f}", f"{found.waits:.0%}", "in the step", end_section=True
    )
    table.add_row("a step in training", f"{1000 * found.step:.1f}", "100%")
    show(table)
    print(found.verdict)


@app.command()
@options_of(config.EvaluateConfig)
def evaluate(given: dict[str, Any]) -> None:
    """Judge encoders on a downstream task.

    Fine-tunes and probes them, and prints their AUCs. The task is a folder with images and the fold files that
    RadImageNet publishes, or of two class folders. Stopped, the same command continues where it was.
    """
    from modan_fast.downstream.evaluate import evaluate as judge
    from modan_fast.downstream.statistics import auc_table

    settings = config.EvaluateConfig(**given)
    with stopped(CONTINUES), show_progress() as progress:
        judge(settings, progress)
    print_aucs(settings.out, auc_table(settings.out))


@app.command()
@options_of(config.ReportConfig)
def report(
    results: Annotated[Path, typer.Argument(help="Results folder, as `modan-fast evaluate` writes it.")],
    given: dict[str, Any],
) -> None:
    """Write the paper's tables and figures.

    From a results folder, as files and as one HTML page. Tables 4 and 5 come with the paper's own figures beside
    them, as Markdown, CSV and LaTeX. report.html holds everything and needs no other file.
    """
    from modan_fast.report.page import write_report

    with stopped("the same command starts again"), show_progress() as progress:
        page = write_report(results, config.ReportConfig(**given), progress)
    print(f"{page}: tables and figures lie beside it in {page.parent / 'tables'} and {page.parent / 'figures'}")


def show(table: Table) -> None:
    """Print a table: as wide as the terminal, and wide enough in a file."""
    console = Console()
    Console(width=None if console.is_terminal else 120).print(table)


def print_aucs(results: Path, rows: Iterable[Any]) -> None:
    """Print the AUC table of a results folder; what cannot be computed is a dash."""
    table = Table("task", "recipe", "protocol", "init", "repeats", "AUC", "95 % CI", title=escape(str(results)))
    for row in rows:
        interval = "–" if row.interval is None else f"{row.interval[0]:.3f} to {row.interval[1]:.3f}"
        numbers = ("–" if row.mean is None else f"{row.mean:.3f}", interval)
        table.add_row(escape(row.task), row.recipe, row.protocol, escape(row.init), str(row.repeats), *numbers)
    show(table)


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder to write everything to.")] = Path("demo"),
    overwrite: Overwrite = False,
) -> None:
    """Go the whole way in miniature, in three minutes.

    Makes an archive of synthetic CT, MR and ultrasound images, shards it, pretrains on it, and judges the encoder
    beside an untrained one on a synthetic lesion task.
    """
    from modan_fast.demo import demo as run
    from modan_fast.downstream.statistics import auc_table

    with stopped(CONTINUES), show_progress() as progress:
        made = run(out, overwrite=overwrite, progress=progress)
    print_aucs(made.results, auc_table(made.results))
    print(f"""
These figures say nothing about medicine: the images are drawn, and so short a training hardly moves them.
What was made:
  {made.archive}: images in folders MODALITY/anatomy/class    {made.task}: a lesion task with its folds
  {made.shards}: the images as WebDataset shards    {made.run}: log, checkpoint and encoder
  {made.results}: predictions and times
  {made.contact_sheet}: images beside their two views    {made.embedding}: the encoder before and after

The same with your own images:
  modan-fast shard /data/RadImageNet
  modan-fast pretrain --method mulsupcon
  modan-fast evaluate --task /data/breast --init runs/mulsupcon --init scratch""")


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

    It has the shape of RadImageNet: its folders, modalities and regions, with drawn images.
    """
    from modan_fast.phantom import phantom_archive

    with stopped("the same command starts again"), show_progress() as progress:
        images = phantom_archive(
            out, per_class=per_class, size=size, seed=seed, workers=workers, progress=progress
        )
    print(f"{out}: {images:,} synthetic images; modan-fast shard {out} packs them")


@app.command()
def doctor() -> None:
    """Tell what this machine offers.

    And what modan-fast will therefore do.
    """
    from modan_fast.machine import examine, unusable_gpu

    found, follows = examine()
    for name, finding in found:
        print(f"{name:14} {finding}")
    print()
    print("\n".join(follows))
    if problem := unusable_gpu():
        print(f"\nproblem: {problem}")
        raise typer.Exit(1)
