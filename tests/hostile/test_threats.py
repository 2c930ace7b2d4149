"""The pages of threats and faults name tests as evidence: each of them exists."""

import ast
import functools
import re
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]


@functools.cache
def names_in(file):
    """The names of the tests in a file below `tests`; none if there is no such file."""
    content = (TESTS / file).read_text(encoding="utf-8") if (TESTS / file).is_file() else ""
    return {each.name for each in ast.parse(content).body if isinstance(each, ast.FunctionDef)}


@pytest.mark.parametrize("page", ["threats.md", "faults.md"])
def test_each_row_of_a_page_names_a_test_that_exists(page):
    missing, rows = [], 0
    for line in (TESTS.parent / "docs" / page).read_text(encoding="utf-8").splitlines():
        if not line.startswith("| ") or line.startswith(("| ---", "| code |")) or re.match(r"\| \d+ \|", line):
            continue
        *_, evidence = line.strip("| ").split(" | ")
        if evidence == "test":  # the head of a table
            continue
        rows += 1
        named = re.findall(r"`([\w/]+\.py)::(test_\w+)`", evidence)
        assert named, line
        missing += [f"{file}::{name}" for file, name in named if name not in names_in(file)]
    assert rows > 20
    assert not missing
