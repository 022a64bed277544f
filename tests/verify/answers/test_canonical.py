"""Equal answers have the same canonical form, and different answers have different ones."""

import pytest

from aft_ray.verify.answers.canonical import normalise


@pytest.mark.parametrize(
    ("one", "other"),
    [("4", "4.0"), ("1,234", "1234"), (" $7. ", "7"), ("-0", "0"), ("Yes", "yes"), ("0.50", ".5"), ("a  b", "a b")],
)
def test_normalise_joins(one, other):
    assert normalise(one) == normalise(other)


@pytest.mark.parametrize(
    ("one", "other"),
    [("4", "40"), ("1,2", "12"), ("4", "-4"), ("nan", "4"), ("1e999999999", "1"), ("0e-999999999", "1")],
)
def test_normalise_separates(one, other):
    assert normalise(one) != normalise(other)
