"""One item in the background: the next one is in work while the caller uses the one before."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def one_ahead(
    items: Iterable[Item], submit: Callable[[Item], None], collect: Callable[[Item], Result]
) -> Generator[Result, None, None]:
    """`collect(item)` for each item, in order; the next item is submitted before a result is handed over.

    At most one item is in work at a time. If the generator is closed early, the item in work is collected and thrown
    away, so that nothing of it is left for the next one.
    """
    in_work: list[Item] = []
    try:
        for item in items:
            results = [collect(in_work.pop())] if in_work else []
            submit(item)
            in_work.append(item)
            yield from results
        if in_work:
            yield collect(in_work.pop())
    finally:
        if in_work:
            collect(in_work.pop())
