"""DALI's index, by its text. `test_build.py` lets DALI itself read it."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shard_builder.index import Member, check_index, format_index, parse_index

words = st.text(st.characters(categories=["L", "N"], codec="ascii"), min_size=1, max_size=9)
members = st.builds(Member, words, st.integers(0, 2**40), st.integers(0, 2**40), words)
indices = st.lists(st.lists(members, min_size=1, max_size=4), min_size=1, max_size=6)


@given(indices)
def test_an_index_reads_back_as_it_was_written(samples):
    text = format_index(samples)
    assert list(parse_index(text)) == samples
    last = samples[-1][-1]
    check_index(text, len(samples), last.offset + last.size)


@given(indices)
def test_an_index_that_points_beyond_its_tar_or_counts_otherwise_is_noticed(samples):
    text, last = format_index(samples), samples[-1][-1]
    with pytest.raises(ValueError, match="beyond the tar's"):
        check_index(text, len(samples), last.offset + last.size - 1)
    with pytest.raises(ValueError, match="not 9 samples"):
        check_index(text, 9, last.offset + last.size)


@pytest.mark.parametrize("text", ["", "v1.1 0\n", "v1.2 2\npng 512 1 a.png\n", "v1.2 1\npng 512 1\n"])
def test_other_texts_are_no_index(text):
    with pytest.raises(ValueError, match=r"lines|words"):
        list(parse_index(text))
    with pytest.raises(ValueError, match=r"lines|words"):
        check_index(text, 1, 10**6)


@pytest.mark.parametrize("number", ["-512", "+512", "5_12", "٥", "", "1" * 19, "0x200", "1e3", "nan", " 512"])
@pytest.mark.parametrize("line", ["png {} 1 a.png", "png 512 {} a.png"])
def test_an_offset_or_size_is_digits_alone(number, line):
    text = f"v1.2 1\n{line.format(number)}\n"
    for read in (lambda text: list(parse_index(text)), lambda text: check_index(text, 1, 10**6)):
        with pytest.raises(ValueError, match=r"an offset or size is|words"):
            read(text)


def test_a_line_without_end_is_refused():
    with pytest.raises(ValueError, match="a line has 4,000,000 characters"):
        list(parse_index("v1.2 1\n" + " " * 4_000_000 + "\n"))


def test_the_text_is_what_dali_documents():
    sample = [Member("png", 512, 9, "00000000.png"), Member("json", 1536, 2, "00000000.json")]
    assert format_index([sample]) == "v1.2 1\npng 512 9 00000000.png json 1536 2 00000000.json\n"
