"""Masks before pycocotools sees them."""

import numpy as np
import pytest
from pycocotools import mask as rle_tools

from blsam.data.masks import BadMask, checked_mask, compressed_runs, to_rle

NAN = float("nan")
BAD = [  # on an image of 4 x 4
    ({"size": [4, 4], "counts": "\ud800"}, "RLE that cannot be read"),
    ([], "no polygon of three corners"),
    ([[]], "no polygon of three corners"),
    ([[1, 1, 3, 3]], "no polygon of three corners"),  # pycocotools takes it for a box
    ([1, 1, 3, 3], "no polygon of three corners"),
    ([[1, 1], [2, 2]], "no polygon of three corners"),
    ([[1, 1, 3, 1, 3, 3, 1]], "polygon of an odd number of coordinates"),
    ([[1, 1, 3, 1, 3, None]], "polygon with coordinates that are no numbers"),
    ([[1, 1, 3, 1, 3, NAN]], "polygon with coordinates that are no numbers"),
    ([[1, 1, 3, 1, 3, float("inf")]], "polygon with coordinates that are no numbers"),
    ([[1, 1, 3, 1, 3, "x"]], "polygon with coordinates that are no numbers"),
    ([[1, 1, 3, 1, 3, [3]]], "polygon with coordinates that are no numbers"),
    ([[1, 1, 3, 1, 3, 10**400]], "polygon with coordinates that are no numbers"),
    ([[1, 1, 3, 1, 3, 3], None], "polygon with coordinates that are no numbers"),
    ([None], "no polygon of three corners"),
    ([[1, 1, 3, 1, 3, 1e9]], "polygon far outside its image"),
    ([[1, 1, 3, 1, 3, -1e300]], "polygon far outside its image"),
    ([[-40, 0, 40, 0, 40, 40] * 10**5], "polygon of an outline of more than 2,000,000 pixels"),
    ({}, "RLE without size or counts"),
    ({"size": [4, 4]}, "RLE without size or counts"),
    ({"size": 4, "counts": [16]}, "RLE without size or counts"),
    ({"size": [4, 4], "counts": None}, "RLE without size or counts"),
    ({"size": [4, 5], "counts": [20]}, "mask of another size than its image"),
    ({"size": ["4", "4"], "counts": [16]}, "mask of another size than its image"),
    ({"size": [10**5, 10**5], "counts": [10**10]}, "mask of another size than its image"),
    ({"size": [4, 4], "counts": []}, "RLE that does not fill its size"),
    ({"size": [4, 4], "counts": [5, 2, 2]}, "RLE that does not fill its size"),
    ({"size": [4, 4], "counts": [5, 20]}, "RLE that does not fill its size"),
    ({"size": [4, 4], "counts": [17, -1]}, "RLE that does not fill its size"),
    ({"size": [4, 4], "counts": [5, "11"]}, "RLE that cannot be read"),
    ({"size": [4, 4], "counts": [5, None]}, "RLE that cannot be read"),
    ({"size": [4, 4], "counts": [5, NAN]}, "RLE that cannot be read"),
    ({"size": [4, 4], "counts": [5.5, 10.5]}, "RLE that cannot be read"),
    ({"size": [4, 4], "counts": [2**40, 16]}, "RLE that cannot be read"),
    ({"size": [4, 4], "counts": ""}, "RLE that cannot be read"),
    ({"size": [4, 4], "counts": "5"}, "RLE that does not fill its size"),
    ({"size": [4, 4], "counts": "5222"}, "RLE that does not fill its size"),
    ({"size": [4, 4], "counts": "52P"}, "RLE that cannot be read"),  # more follow, yet nothing does
    ({"size": [4, 4], "counts": "PPPPPPPPP0"}, "RLE that cannot be read"),
    ({"size": [4, 4], "counts": "\u20ac"}, "RLE that cannot be read"),
    ({"size": [4, 4], "counts": "[16]"}, "RLE that cannot be read"),
]


@pytest.mark.parametrize(("mask", "reason"), BAD, ids=lambda value: str(value)[:50])
def test_masks_that_pycocotools_would_stumble_over(mask, reason):
    with pytest.raises(BadMask) as caught:
        checked_mask(mask, 4, 4)
    assert str(caught.value) == reason


def test_masks_of_too_many_pixels():
    with pytest.raises(BadMask, match="too many pixels"):
        checked_mask({"size": [10**5, 10**5], "counts": [10**10]}, 10**5, 10**5)


def random_masks(count):
    rng = np.random.default_rng(0)
    for i in range(count):
        h, w = rng.integers(1, 300, 2)
        coarse = 1 if i % 2 else 16
        small = rng.random((h // coarse + 1, w // coarse + 1)) < rng.random()
        yield np.kron(small, np.ones((coarse, coarse), bool))[:h, :w]


def test_compressed_runs_are_pycocotools_own():
    for mask in random_masks(200):
        rle = rle_tools.encode(np.asfortranarray(mask.astype(np.uint8)))
        flat = mask.flatten("F")
        runs = np.diff(np.concatenate([[0], np.flatnonzero(np.diff(flat)) + 1, [len(flat)]]))
        runs = np.concatenate([[0], runs]) if flat[0] else runs
        assert np.array_equal(compressed_runs(rle["counts"]), runs)
        for counts in (rle["counts"], rle["counts"].decode(), runs.tolist()):
            checked = checked_mask({"size": list(mask.shape), "counts": counts}, *mask.shape)
            assert np.array_equal(rle_tools.decode(to_rle(checked, *mask.shape)).astype(bool), mask)


def test_runs_of_nothing_are_merged():
    counts = [3, 1, 0, 1, 2, 0, 9]
    clean = checked_mask({"size": [4, 4], "counts": counts}, 4, 4)
    assert compressed_runs(clean["counts"]).tolist() == [3, 2, 11]
    assert float(rle_tools.iou([clean], [clean], [0])[0, 0]) == 1


def test_polygons_beyond_the_image_are_those_of_pycocotools():
    """Amodal datasets have them."""
    polygon = [[-6.5, 1, 3, -20, 30, 3.5, 2, 9]]
    assert checked_mask(polygon, 4, 4) is not None
    assert rle_tools.decode(to_rle(checked_mask(polygon, 4, 4), 4, 4)).any()
