"""Prompts of any shape and value: taken, or a ValueError that says what was wanted."""

import numpy as np
import pytest
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from blsam.predictor import check_prompts, check_shapes, points_outside, senseless
from tests.fuzz.helpers import few, many, outcome

SHAPES = hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4)
VALUES = st.floats(width=32) | st.integers(-5, 50)
ARRAYS = hnp.arrays(np.float64, SHAPES, elements=VALUES) | hnp.arrays(np.int64, SHAPES, elements=st.integers(-3, 60))
ARRAYS |= hnp.arrays(np.bool_, SHAPES)
ANYTHING = st.recursive(
    st.none() | st.booleans() | VALUES | st.text(max_size=3), lambda inner: st.lists(inner, max_size=4)
)
ONE = st.none() | ARRAYS | ANYTHING
POINTS = st.none() | hnp.arrays(np.float64, st.tuples(st.integers(0, 3), st.just(2)), elements=VALUES) | ARRAYS
BOXES = st.none() | hnp.arrays(np.float64, st.sampled_from([(4,), (1, 4)]), elements=VALUES) | ARRAYS
CASES = st.tuples(POINTS, ONE | hnp.arrays(np.int64, st.integers(0, 3), elements=st.integers(-1, 1)), BOXES, ONE)


def check(case):
    outcome(lambda: check_prompts(*case, (40, 60)), ValueError)
    points, labels, box, _ = case
    try:
        check_shapes(*case)
    except ValueError:
        return
    senseless(points, labels, box, (40, 60))  # says something of whatever has the right shape
    points_outside(points, (40, 60))


def test_a_few():
    few(check, CASES, 200)


@pytest.mark.slow
def test_many(capsys):
    with capsys.disabled():
        many(check, CASES, "prompts")
