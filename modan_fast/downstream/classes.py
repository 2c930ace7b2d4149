"""From the words of labels to classes: binary, multi-class or multi-label, and which class is positive."""

from __future__ import annotations

import re
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from shard_builder.settings import InputError

Kind = Literal["binary", "multiclass", "multilabel"]

LABELS = {"benign": 0, "normal": 0, "no": 0, "0": 0, "malignant": 1, "yes": 1, "1": 1}
# Words that decide only in pairs: three of them may as well be three classes.
NEGATIVE = ("n", "negative", "cp", "non-covid", "noncovid", "false", "0.0")
POSITIVE = ("p", "positive", "ncp", "covid", "true", "1.0")
PAIRED = {**LABELS, **dict.fromkeys(NEGATIVE, 0), **dict.fromkeys(POSITIVE, 1)}
BITS = {"0": 0, "1": 1, "0.0": 0, "1.0": 1}
MOST_CLASSES, LONGEST_NAME = 1000, 100
NUMBER = re.compile(r"[+-]?\d{1,18}(\.\d{1,18})?")


@dataclass(frozen=True)
class Classes:
    """What a task's labels are: `kind`, the `names` of the classes, and the label of each word.

    A binary task has two names, that of the negative words and that of the positive ones.
    """

    kind: Kind
    names: tuple[str, ...]
    labels: Mapping[str, int]


def decide(
    found: Mapping[str, str], task: str, *, positive: str | None, words: str | None, folders: bool
) -> Classes:
    """The classes of the words `found`, each with the place where it was found first.

    They are class folders of the task, or lower-case words in its tables. `words` says what they mean; else `positive`
    makes them binary; else they decide themselves. Raises `InputError` if they do not.
    """
    for word, where in found.items():
        if len(word) > LONGEST_NAME or not word.isprintable():
            raise InputError(f"{where}: label {reprlib.repr(word)} is no name of a class: correct it")
    if words is not None:
        return _named(found, words)
    if positive is not None:
        key = positive if folders else positive.lower()
        if key not in found:
            what = f"class folder of {task}" if folders else f"label in {task}"
            raise InputError(f"`positive={positive}` is no {what}: name {listed(sorted(found), ' or ')}")
        return _binary(found, {key})
    if len(found) < 2:
        raise InputError(f"{task} has one class only ({''.join(found)}): both classes are needed")
    if len(found) == 2:
        return _binary(found, {_positive_folder(found) if folders else _positive_word(found, task)})
    numbers = all(map(NUMBER.fullmatch, found))
    known = {} if numbers else {word: LABELS.get(word.lower()) for word in found}
    if set(known.values()) == {0, 1}:
        return _binary(found, {word for word, label in known.items() if label == 1})
    if {0, 1} < set(known.values()) and not folders:
        odd = next(word for word, label in known.items() if label is None)
        raise InputError(
            f"{found[odd]}: label {odd!r} is none of {', '.join(LABELS)}: correct it, or name the classes with "
            f"`words={listed(sorted(found), ',')}`"
        )
    if len(found) > MOST_CLASSES:
        raise InputError(
            f"{task} has {len(found):,} different labels: name another column with `columns`, or their classes with "
            "`words`"
        )
    names = sorted(found, key=lambda word: (float(word) if numbers else 0, word))
    return Classes("multiclass", tuple(names), {name: label for label, name in enumerate(names)})


def parsed(words: str) -> dict[str, list[str]]:
    """The words of each class that `words` names, as `positive=p|ncp,negative=n`; a name alone is its own word."""
    classes: dict[str, list[str]] = {}
    for part in words.split(","):
        name, _, given = (each.strip() for each in part.partition("="))
        each = [word.strip().lower() for word in given.split("|")] if given else [name.lower()]
        if not name or name in classes or not all(each) or not name.isprintable() or len(name) > LONGEST_NAME:
            raise InputError(
                f"`words={words}` must name each class once, as positive=p|NCP,negative=n or as a,b,c"
            )
        classes[name] = each
    every = [word for each in classes.values() for word in each]
    if len(classes) < 2 or len(set(every)) < len(every):
        raise InputError(f"`words={words}` must name two classes or more, and no word twice")
    return classes


def _named(found: Mapping[str, str], words: str) -> Classes:
    """The classes that the user named. Of two, the one named `positive` is positive, else the second."""
    classes = parsed(words)
    names = list(classes)
    if len(names) == 2 and names[0].lower() == "positive":
        names.reverse()
    labels = {word: label for label, name in enumerate(names) for word in classes[name]}
    for word, where in found.items():
        if word.lower() not in labels:
            raise InputError(f"{where}: label {word!r} is in no class of `words={words}`: add it there")
    kind: Kind = "binary" if len(names) == 2 else "multiclass"
    return Classes(kind, tuple(names), {word: labels[word.lower()] for word in found})


def _binary(found: Mapping[str, str], positives: set[str]) -> Classes:
    negatives = set(found) - positives
    if not negatives:
        raise InputError(
            f"{next(iter(found.values()))}: all images are {' or '.join(found)}: both classes are needed"
        )
    names = (" or ".join(sorted(negatives)), " or ".join(sorted(positives)))
    return Classes("binary", names, {word: int(word in positives) for word in found})


def _positive_folder(found: Mapping[str, str]) -> str:
    """Of two class folders the one whose name says so, or beside one that says it is negative; else the second."""
    first, second = sorted(found)
    labels = [LABELS.get(name.lower()) for name in (first, second)]
    return first if labels in ([1, None], [1, 0], [None, 0]) else second


def _positive_word(found: Mapping[str, str], task: str) -> str:
    """Of two words in a table the positive one. Raises `InputError` if none says so: nothing orders words."""
    first, second = sorted(found)
    labels = [PAIRED.get(first), PAIRED.get(second)]
    # Of the numbers only 0 and 1 say what they mean.
    if None in labels and NUMBER.fullmatch(first) and NUMBER.fullmatch(second):
        labels = [None, None]
    if labels in ([0, 1], [0, None], [None, 1]):
        return second
    if labels in ([1, 0], [1, None], [None, 0]):
        return first
    raise InputError(
        f"{task} has the labels {first} and {second}: say which is positive with "
        f"`words=positive={second},negative={first}`"
    )


def listed(names: Sequence[str], between: str = ", ") -> str:
    """Some of the names, for a message."""
    shown = between.join(name[:40] for name in names[:10])
    return f"{shown}{', …' if len(names) > 10 else ''}" if names else "none"
