"""Pillow's bilinear resizing in numpy, pixel for pixel, for what should need neither Pillow nor torch."""

from __future__ import annotations

import numpy as np

BITS = 22  # of Pillow's weights


def resize(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """uint8 [H, W, C] -> [height, width, C], the same pixels as Pillow's bilinear filter: whole weights, rounded twice."""
    for axis, length in ((1, width), (0, height)):  # columns first, as Pillow
        if image.shape[axis] != length:
            image = _resize_along(image, axis, length)
    return image


def _resize_along(image: np.ndarray, axis: int, length: int) -> np.ndarray:
    old = image.shape[axis]
    scale = old / length
    reach = max(scale, 1.0)  # half the width of the triangle
    centre = (np.arange(length) + 0.5) * scale
    first = np.maximum((centre - reach + 0.5).astype(int), 0)
    last = np.minimum((centre + reach + 0.5).astype(int), old)  # not inside
    places = first[:, None] + np.arange((last - first).max())  # [length, taps]
    weights = np.maximum(0, 1 - np.abs((places - centre[:, None] + 0.5) / reach)) * (places < last[:, None])
    whole = np.floor(weights / weights.sum(1, keepdims=True) * 2**BITS + 0.5).astype(np.int32)
    lines = np.moveaxis(image, axis, 0)
    total = np.full((length, *lines.shape[1:]), 1 << (BITS - 1), np.int32)
    for tap in range(places.shape[1]):
        total += lines[np.minimum(places[:, tap], old - 1)] * whole[:, tap].reshape(-1, *[1] * (lines.ndim - 1))
    return np.moveaxis(np.clip(total >> BITS, 0, 255).astype(np.uint8), 0, axis)
