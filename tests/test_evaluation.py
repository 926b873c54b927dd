"""Prompted IoU: by hand, and against pycocotools."""

import numpy as np
from pycocotools import mask as rle_tools

from blsam.evaluation.prompted import centre_point, filled_box, inscribed_ellipse, iou, random_point


def test_a_4x4_case_by_hand_and_by_pycocotools():
    a, b = np.zeros((4, 4), bool), np.zeros((4, 4), bool)
    a[:2, :3], b[1:3, 1:4] = True, True  # 6 and 6 pixels, 2 in common
    assert iou(a, b) == 2 / 10
    encoded = [rle_tools.encode(np.asfortranarray(m.astype(np.uint8))) for m in (a, b)]
    assert iou(a, b) == rle_tools.iou([encoded[0]], [encoded[1]], [0])[0, 0]
    assert iou(a & False, a & False) == 1.0


def test_baselines():
    assert filled_box((1, 0, 3, 2), (4, 4)).nonzero()[0].tolist() == [0, 0, 1, 1]
    ellipse = inscribed_ellipse((0, 0, 100, 60), (60, 100))
    assert abs(ellipse.sum() / (np.pi * 50 * 30) - 1) < 0.01


def test_points_lie_in_the_mask():
    mask = np.zeros((7, 9), bool)
    mask[1:6, 2:7] = True
    assert centre_point(mask) == (4.0, 3.0)
    assert centre_point(np.ones((3, 3), bool)) == (1.0, 1.0)  # the image's border counts
    for seed in range(20):
        x, y = random_point(mask, seed)
        assert mask[int(y), int(x)] and random_point(mask, seed) == (x, y)
