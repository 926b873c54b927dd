"""Where evaluators click, by hand."""

import numpy as np

from blsam.data.prompts import centre_point, error_click, random_points, ritm_click


def grid(*rows):
    return np.array([[c == "#" for c in row] for row in rows])


def test_centre_is_the_first_of_the_deepest_pixels():
    mask = np.zeros((7, 9), bool)
    mask[1:6, 2:7] = True
    assert centre_point(mask) == (4.0, 3.0, 1)
    assert centre_point(np.ones((3, 3), bool)) == (1.0, 1.0, 1)  # the image's border counts
    assert centre_point(grid("....", ".##.", ".##.", "....")) == (1.0, 1.0, 1)  # ties: row-major order


def test_random_points_lie_in_the_mask_and_depend_on_seed_and_annotation_alone():
    mask = grid("....", ".##.", ".#..", "....")
    points = random_points(mask, 200, seed=0, annotation_id=7)
    assert {(x, y) for x, y, _ in points} == {(1.0, 1.0), (2.0, 1.0), (1.0, 2.0)} and {p[2] for p in points} == {1}
    share = sum((x, y) == (1.0, 1.0) for x, y, _ in points) / 200
    assert abs(share - 1 / 3) < 0.12
    assert random_points(mask, 200, 0, 7) == points and random_points(mask, 200, 0, 8) != points
    assert random_points(mask, 200, 1, 7) != points
    assert random_points(mask, 3, 0, 7) == points[:3]  # more points begin with the same ones


def test_error_click_goes_to_the_deepest_error_and_says_which_kind():
    mask, prediction = np.zeros((9, 9), bool), np.zeros((9, 9), bool)
    mask[0:5, 0:5] = True
    assert error_click(mask, prediction) == (2.0, 2.0, 1)
    prediction[0:5, 0:5] = True
    prediction[6:9, 6:9] = True
    assert error_click(mask, prediction) == (7.0, 7.0, 0)
    assert error_click(mask, mask.copy()) is None


def test_ritm_click():
    mask, prediction = np.zeros((9, 9), bool), np.zeros((9, 9), bool)
    mask[0:5, 0:5] = True
    assert ritm_click(mask, prediction, []) == (2.0, 2.0, 1)
    prediction[0:5, 0:5] = True
    prediction[6:9, 6:9] = True
    assert ritm_click(mask, prediction, [(2.0, 2.0, 1)]) == (7.0, 7.0, 0)
    # pixels clicked before are out, the next deepest gets it
    assert ritm_click(mask, prediction, [(7.0, 7.0, 0)])[:2] == (6.0, 6.0)
    # missed and added equally deep: the click is negative
    prediction[:] = False
    mask[:], mask[0:3, 0:3] = False, True
    prediction[6:9, 6:9] = True
    assert ritm_click(mask, prediction, [])[2] == 0
    # nothing wrong: RITM's corner case
    assert ritm_click(mask, mask.copy(), [(1.0, 1.0, 1)]) == (0.0, 0.0, 0)


def test_the_two_click_rules_differ_where_errors_touch():
    """`error_click` sees missed and added pixels as one region, RITM's clicker as two."""
    mask, prediction = grid(*["#####...."] * 5), grid(*[".....####"] * 5)
    assert error_click(mask, prediction) == (2.0, 2.0, 1)  # depth 3 everywhere along the middle: the first wins
    mask, prediction = grid(*["###......"] * 9), grid(*["...######"] * 9)
    assert error_click(mask, prediction) == (4.0, 4.0, 0)  # one region of 9 x 9
    assert ritm_click(mask, prediction, [])[0] in (5.0, 6.0)  # two regions, the wider one's middle
