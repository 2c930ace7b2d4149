"""A shard's blocks, against those of the standard library. `test_build.py` reads whole shards."""

import tarfile

from hypothesis import given
from hypothesis import strategies as st

from shard_builder.writer import member_header

names = st.text(
    st.characters(min_codepoint=33, max_codepoint=126, exclude_characters="/"), min_size=1, max_size=100
)


@given(names, st.integers(0, 8**11 - 1))
def test_a_header_is_that_of_the_standard_library(name, size):
    member = tarfile.TarInfo(name)
    member.size = size
    assert member_header(name, size) == member.tobuf(tarfile.USTAR_FORMAT, "ascii", "strict")
