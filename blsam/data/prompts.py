"""Where an evaluator clicks: points drawn in a mask, its centre, and clicks that answer what a prediction gets wrong.

Every draw is seeded by (seed, annotation), so neither the order of the images nor the number of processes matters.
"""

from __future__ import annotations

import cv2
import numpy as np

Click = tuple[float, float, int]  # x, y in pixels of the original image; 1 object, 0 background


def random_points(mask: np.ndarray, count: int, seed: int, annotation_id: int) -> list[Click]:
    """`count` pixels of the mask, bool [H, W], each drawn uniformly and apart from the others; all positive."""
    ys, xs = np.nonzero(mask)
    chosen = np.random.default_rng([seed, annotation_id]).integers(len(xs), size=count)
    return [(float(xs[i]), float(ys[i]), 1) for i in chosen]


def centre_point(mask: np.ndarray) -> Click:
    """The first pixel in row-major order that is farthest from the mask's border (SAM, appendix D.1)."""
    y, x = _farthest(_depth(mask))
    return float(x), float(y), 1


def error_click(mask: np.ndarray, prediction: np.ndarray) -> Click | None:
    """The pixel farthest from the border of the error region, the pixels where the two masks differ.

    Positive where the object was missed. None where they are equal. (SAM, appendix D.1)
    """
    error = mask ^ prediction
    if not error.any():
        return None
    y, x = _farthest(_depth(error))
    return float(x), float(y), int(mask[y, x])


def ritm_click(mask: np.ndarray, prediction: np.ndarray, earlier: list[Click]) -> Click:
    """The next click of RITM's clicker, as EfficientViT-SAM's evaluator uses it.

    The deeper of the missed and the added region gets the click, pixels clicked before excluded; where neither is
    left, the image's first pixel gets a negative one.
    """
    missed, added = _depth(mask & ~prediction), _depth(prediction & ~mask)
    for x, y, _ in earlier:
        missed[int(y), int(x)] = added[int(y), int(x)] = 0
    positive = missed.max() > added.max()
    y, x = _farthest(missed if positive else added)
    return float(x), float(y), int(positive)


def _depth(region: np.ndarray) -> np.ndarray:
    """Distance of every pixel to the nearest one outside the region; the image's border is outside."""
    padded = np.pad(region.astype(np.uint8), 1)
    return cv2.distanceTransform(padded, cv2.DIST_L2, 0)[1:-1, 1:-1]


def _farthest(depth: np.ndarray) -> tuple[int, int]:
    y, x = np.unravel_index(depth.argmax(), depth.shape)
    return int(y), int(x)
