"""Command-line options made from the settings dataclasses, settings files, and messages that speak of options."""

from __future__ import annotations

import enum
import inspect
import re
import sys
import typing
from collections.abc import Callable, Iterator, Mapping
from dataclasses import Field, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from modan_fast.config import read_settings
from shard_builder.settings import InputError, literal_words

Command = Callable[..., Any]


@dataclass(frozen=True)
class Setting:
    """A field of a settings dataclass, or of one nested in it, as an option."""

    name: str  # as in settings files: augmentation.scale
    kind: Any
    field: Field[Any]

    @property
    def parameter(self) -> str:
        """The name of the Python parameter that typer passes."""
        return self.name.replace(".", "__")

    @property
    def item(self) -> Any:
        """The type of a tuple's items; None for other settings."""
        return typing.get_args(self.kind)[0] if typing.get_origin(self.kind) is tuple else None

    def as_parameter(self) -> inspect.Parameter:
        """The parameter from which typer makes the option."""
        kind: Any = self.kind
        extra: dict[str, Any] = {}
        if self.item in (int, float):
            kind, extra["metavar"] = str, "N,N,..."
        elif self.item is not None:
            kind = list[_choice(self.item)]  # type: ignore[misc]
        names = (f"--{self.name}",) if "." in self.name else ()
        option = typer.Option(
            *names, help=self.field.metadata["help"] + self._default(), show_default=False, **extra
        )
        return inspect.Parameter(
            self.parameter,
            inspect.Parameter.KEYWORD_ONLY,
            default=None,
            annotation=Annotated[kind | None, option],
        )

    def _default(self) -> str:
        """The default, for the help; the command itself gets only what the user named."""
        value = self.field.default
        if value is None or value == ():
            return ""
        if isinstance(value, bool):
            value = "on" if value else "off"
        if isinstance(value, tuple):
            value = (", " if self.item is str or literal_words(self.item) else ",").join(
                _short(each) for each in value
            )
        return f"  [default: {value}{', by the recipe' if self.field.metadata.get('recipe') else ''}]"

    def parsed(self, value: Any) -> Any:
        """The value that typer passed, with a list of numbers taken apart."""
        if self.item not in (int, float):
            return tuple(map(str, value)) if isinstance(value, list) else value
        try:
            return tuple(self.item(each) for each in value.split(",") if each.strip())
        except ValueError:
            raise InputError(f"`{self.name}` must be numbers with commas between, got {value!r}") from None


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _choice(kind: Any) -> Any:
    """An enumeration in place of a Literal, which typer does not accept inside a list."""
    words = literal_words(kind)
    return enum.StrEnum("Choice", {word: word for word in words}) if words else kind


def settings_of(dataclass_type: type, prefix: str = "") -> Iterator[Setting]:
    """The settings of a dataclass; those of a nested one follow it, as `outer.inner`."""
    kinds = typing.get_type_hints(dataclass_type)
    for each in fields(dataclass_type):
        if is_dataclass(kinds[each.name]):
            yield from settings_of(kinds[each.name], f"{each.name}.")
        else:
            yield Setting(prefix + each.name, kinds[each.name], each)


def options_of(dataclass_type: type) -> Callable[[Command], Command]:
    """Give a command an option for each setting of a dataclass, and `--config` for a file of them.

    The options come after those that the command declares itself. It gets what the user named as `given`, by name:
    the values in the file, and those of options, which win.
    """
    settings = list(settings_of(dataclass_type))
    config = inspect.Parameter(
        "config",
        inspect.Parameter.KEYWORD_ONLY,
        default=None,
        annotation=Annotated[
            Path | None,
            typer.Option(help="YAML or JSON file of settings; options win over it."),
        ],
    )

    def decorate(command: Command) -> Command:
        def called(config: Path | None = None, **arguments: Any) -> Any:
            named = {}
            for setting in settings:
                value = arguments.pop(setting.parameter)
                if value is not None and value != []:
                    named[setting.name] = setting.parsed(value)
            recorded = read_settings(config, dataclass_type, named) if config else {}
            return command(given={**recorded, **named}, **arguments)

        own = inspect.signature(command, eval_str=True).parameters.values()
        parameters = [
            *(each.replace(kind=inspect.Parameter.KEYWORD_ONLY) for each in own if each.name != "given"),
            config,
            *(setting.as_parameter() for setting in settings),
        ]
        wrapped: Any = called
        wrapped.__name__, wrapped.__doc__ = command.__name__, command.__doc__
        wrapped.__signature__ = inspect.Signature(parameters)
        wrapped.__annotations__ = {each.name: each.annotation for each in parameters}
        return called

    return decorate


def in_options(message: str, app: typer.Typer) -> str:
    """A library's message with its settings as options: `` `batch_size` `` becomes `--batch-size`.

    `` `resume=True` `` becomes `--resume`, and `` `store=host` `` becomes `--store host`. The names are those of the
    command in `sys.argv`, or else of any other command.
    """
    if "`" not in message:  # most log lines: the commands need not be built for them
        return message
    names = _shown_names(app)

    def shown(match: re.Match[str]) -> str:
        name, value = match["name"], match["value"]
        if name not in names:
            return match[0]
        option = names[name]
        if value is None or value == "True":
            return option
        return option.replace("--", "--no-", 1) if value == "False" else f"{option} {value}"

    return re.sub(r"`(?P<name>[a-z_]+(\.[a-z_]+)?)(=(?P<value>[^`]*))?`", shown, message)


def _shown_names(app: typer.Typer) -> Mapping[str, str]:
    """How the command line shows a setting: an option with its dashes, an argument in capitals."""
    commands: Any = typer.main.get_command(app)
    used = next((word for word in sys.argv[1:] if word in commands.commands), None)
    names: dict[str, str] = {}
    for name, command in sorted(commands.commands.items(), key=lambda item: item[0] == used):
        for parameter in command.params:
            option = next((each for each in parameter.opts if each.startswith("--")), None)
            # The command in use comes last and wins; of the others, options win over arguments.
            if option or name == used or parameter.name not in names:
                names[parameter.name.replace("__", ".")] = option or parameter.name.upper()
    # A nested dataclass names its own fields only: `scale` for `augmentation.scale`.
    nested = {name.partition(".")[2]: option for name, option in names.items() if "." in name}
    return nested | names
