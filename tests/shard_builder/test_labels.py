"""Fields to vocabularies to bits."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shard_builder.labels import bit_names, multi_hot, vocabularies

NAMES = ("modality", "anatomy", "view")
rows_of_fields = st.lists(
    st.dictionaries(st.sampled_from(NAMES), st.text(min_size=1, max_size=3), max_size=3), min_size=1, max_size=8
)


@given(rows_of_fields)
def test_the_names_of_the_set_bits_are_the_fields_of_an_image(rows):
    fields = vocabularies(NAMES, rows)
    names = bit_names(fields)
    for row in rows:
        bits = multi_hot(row, fields)
        assert bits.dtype == np.uint8
        assert bits.shape == (len(names),)
        assert set(bits.tolist()) <= {0, 1}
        assert {name for name, bit in zip(names, bits, strict=True) if bit} == {
            f"{k}={v}" for k, v in row.items()
        }


@given(rows_of_fields, st.randoms())
def test_the_bits_do_not_depend_on_the_order_of_the_images(rows, random):
    mixed = list(rows)
    random.shuffle(mixed)
    assert vocabularies(NAMES, mixed) == vocabularies(NAMES, rows)


def test_bits_are_in_the_order_of_fields_then_of_sorted_values():
    fields = vocabularies(("modality", "anatomy"), [{"modality": "US", "anatomy": "abd"}, {"modality": "CT"}])
    assert bit_names(fields) == ["modality=CT", "modality=US", "anatomy=abd"]
    assert multi_hot({"modality": "US", "anatomy": "abd"}, fields).tolist() == [0, 1, 1]


def test_a_missing_value_sets_no_bit_and_an_unknown_one_is_an_error():
    fields = {"modality": ["CT", "US"], "anatomy": ["abd"]}
    assert multi_hot({}, fields).tolist() == [0, 0, 0]
    with pytest.raises(ValueError, match="is not in list"):
        multi_hot({"modality": "MR"}, fields)
