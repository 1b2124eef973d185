"""The selection of cases for Triton's interpreter: nothing that two values of the product do together is lost."""

from itertools import combinations

import pytest
from ops.kernel_cases import CASES, PRODUCT
from ops.pairwise import cover, pairs_of

FACTORS = ("pair", "gate", "carry", "dtype", "tokens", "segment")


def met(cases, a, b):
    """Which values of two factors meet in some case, counted without ``ops.pairwise``."""
    rows = [dict(zip(FACTORS, case.values, strict=True)) for case in cases]
    return {(row[a], row[b]) for row in rows}


@pytest.mark.parametrize("a, b", combinations(FACTORS, 2))
def test_every_pair_of_values_of_the_product_is_covered(a, b):
    assert met(CASES, a, b) >= met(PRODUCT, a, b)


def test_no_case_can_be_removed():
    """Which is also to say that the test above fails for every case that is removed."""
    for case in CASES:
        rest = [other for other in CASES if other != case]
        assert any(not met(rest, a, b) >= met(PRODUCT, a, b) for a, b in combinations(FACTORS, 2)), case.name


def test_the_selection_is_smaller_than_the_product():
    assert len(CASES) < len(PRODUCT)


def test_a_pair_that_no_candidate_has_is_an_error():
    with pytest.raises(ValueError, match="no candidate"):
        cover([(1, 2)], pairs_of([(1, 3)]), lambda row: 1)
