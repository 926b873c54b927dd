"""Masks as annotation files have them: polygons in their nestings, plain and compressed RLE, all checked beforehand.

pycocotools trusts what it is given: a run too many makes it hang or crash, and two corners are a box to it.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from pycocotools import mask as rle_tools

MOST_PIXELS = 2**28  # of an image, 16,384 x 16,384; Pillow opens fewer
MOST_OUTLINE = 2_000_000  # pixels along a mask's polygons, for which pycocotools reserves memory
FAR = 10  # sides of the image that a corner may lie outside it


class BadMask(ValueError):
    """A mask that cannot be used; the message is the reason, as what is left out is counted."""


def checked_mask(value: Any, height: int, width: int) -> list | dict[str, Any]:
    """Polygons [[x1, y1, ...], ...] or RLE {size, counts list or str or bytes} that fit an image; BadMask otherwise.

    Polygons may also come as one flat list, or as lists of [x, y]; those of fewer than three corners cover nothing and
    are left out.
    """
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], dict):
        value = value[0]
    if isinstance(value, dict):
        return _checked_rle(value, height, width)
    if isinstance(value, list):
        return _checked_polygons(value, height, width)
    raise BadMask("no segmentation")


def to_rle(segmentation: list | dict, height: int, width: int) -> dict[str, Any]:
    """Checked polygons, plain or compressed RLE -> compressed RLE {size, counts bytes}."""
    if isinstance(segmentation, list):
        return rle_tools.merge(rle_tools.frPyObjects(segmentation, height, width))
    if isinstance(segmentation["counts"], list):
        return rle_tools.frPyObjects(segmentation, height, width)
    counts = segmentation["counts"]
    return {"size": list(segmentation["size"]), "counts": counts.encode() if isinstance(counts, str) else counts}


def encode_mask(mask: np.ndarray) -> dict[str, Any]:
    """bool [H, W] -> compressed RLE as json holds it: {size [h, w], counts str}."""
    rle = rle_tools.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {"size": [int(n) for n in rle["size"]], "counts": rle["counts"].decode()}


# --- polygons --------------------------------------------------------------------------------------------------------


def _checked_polygons(value: list, height: int, width: int) -> list[list[float]]:
    polygons, outline, side = [], 0.0, max(height, width)
    for polygon in _unnested(value):
        if isinstance(polygon, list) and len(polygon) < 6:
            continue
        try:
            corners = np.array(polygon, float)
        except (TypeError, ValueError, OverflowError):
            corners = np.array(np.nan)
        low, high = (corners.min(), corners.max()) if corners.ndim == 1 else (np.nan, np.nan)
        if not math.isfinite(low + high):
            raise BadMask("polygon with coordinates that are no numbers")
        if len(corners) % 2:
            raise BadMask("polygon of an odd number of coordinates")
        if low < -FAR * side or high > (FAR + 1) * side:
            raise BadMask("polygon far outside its image")
        longest = len(corners) * (high - low)
        outline += longest if longest < MOST_OUTLINE / 100 else _outline(corners)
        polygons.append(polygon)
    if not polygons:
        raise BadMask("no polygon of three corners")
    if outline > MOST_OUTLINE:
        raise BadMask(f"polygon of an outline of more than {MOST_OUTLINE:,} pixels")
    return polygons


def _outline(corners: np.ndarray) -> float:
    """Pixels along a closed polygon x1, y1, ..., as pycocotools steps from corner to corner."""
    steps = np.abs(np.diff(corners.reshape(-1, 2), axis=0, append=corners[None, :2]))
    return float(steps.max(1).sum())


def _unnested(value: list) -> list:
    """Polygons as lists of numbers, out of one flat list, one list of pairs, or lists of pairs."""
    if value and not any(isinstance(one, (list, dict)) for one in value):
        return [value]
    if len(value) >= 3 and all(_is_pair(one) for one in value):
        return [[number for pair in value for number in pair]]
    return [
        [number for pair in polygon for number in pair]
        if isinstance(polygon, list) and polygon and all(_is_pair(one) for one in polygon)
        else polygon
        for polygon in value
    ]


def _is_pair(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and not any(isinstance(one, (list, dict)) for one in value)


# --- RLE -------------------------------------------------------------------------------------------------------------


def _checked_rle(value: dict, height: int, width: int) -> dict[str, Any]:
    size, counts = value.get("size"), value.get("counts")
    if not isinstance(size, (list, tuple)) or len(size) != 2 or not isinstance(counts, (list, str, bytes)):
        raise BadMask("RLE without size or counts")
    if list(size) != [height, width]:
        raise BadMask("mask of another size than its image")
    if height * width > MOST_PIXELS:
        raise BadMask("mask of too many pixels")
    runs = _plain_runs(counts) if isinstance(counts, list) else compressed_runs(counts)
    if len(runs) == 0 or runs.min() < 0 or runs.max() > height * width or runs.sum() != height * width:
        raise BadMask("RLE that does not fill its size")
    clean = {"size": [height, width], "counts": runs.tolist() if isinstance(counts, list) else counts}
    if (runs[1:-1] == 0).any():  # at a run of nothing pycocotools may stop comparing
        clean = dict(rle_tools.encode(rle_tools.decode(to_rle(clean, height, width))))
    return clean


def _plain_runs(counts: list) -> np.ndarray:
    if not all(isinstance(n, (int, float)) and -1 <= n <= MOST_PIXELS and n == int(n) for n in counts):
        raise BadMask("RLE that cannot be read")
    return np.array(counts, np.int64)


def compressed_runs(counts: str | bytes) -> np.ndarray:
    """The runs of a compressed RLE, int64 [R]; BadMask if it is none.

    A run is written in characters of 5 bits and a flag that more follow, from the lowest bits on, signed; from the
    fourth on as the difference from the run two before.
    """
    if isinstance(counts, str) and not counts.isascii():
        raise BadMask("RLE that cannot be read")
    data = np.frombuffer(counts.encode() if isinstance(counts, str) else counts, np.uint8)
    digits = data.astype(np.int64) - 48
    if not len(digits) or digits.min() < 0 or digits.max() > 63 or digits[-1] & 32:
        raise BadMask("RLE that cannot be read")
    last = np.flatnonzero(digits & 32 == 0)  # of each run
    first = np.concatenate([[0], last[:-1] + 1])
    length = last - first + 1
    if length.max() > 7:  # more than 32 bits
        raise BadMask("RLE that cannot be read")
    place = np.arange(len(digits)) - np.repeat(first, length)
    runs = np.add.reduceat((digits & 31) << (5 * place), first)
    runs -= np.where(digits[last] & 16, np.int64(1) << (5 * length), 0)
    runs[1::2] = np.cumsum(runs[1::2])
    runs[2::2] = np.cumsum(runs[2::2])
    return runs
