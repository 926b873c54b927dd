"""Pixel values of any type and layout -> uint8 [H, W, 3] RGB. What is not uint8 is taken where it can mean one thing."""

from __future__ import annotations

from typing import Any

import numpy as np
from PIL import Image

from .options import one_line

Notes = list[str]  # what was done to the values, for people: empty for values taken as they are


def to_rgb(values: np.ndarray, bgr: bool = False, stretch: bool = False) -> tuple[np.ndarray, Notes]:
    """Grey, RGB or RGBA (bgr: BGR, BGRA), channels last or first -> uint8 [H, W, 3] RGB; transparent parts on white.

    values, stretch: as in `to_uint8`. ValueError says what is wrong with them.
    """
    if not values.size:
        raise ValueError(f"it is empty, {list(values.shape)}")
    values = channels_last(values)
    if bgr and values.shape[2] > 1:
        values = values[..., [2, 1, 0, 3][: values.shape[2]]]
    pixels, notes = to_uint8(values, stretch)
    if pixels.shape[2] == 1:
        pixels = np.repeat(pixels, 3, axis=2)
    if pixels.shape[2] == 4:
        pixels = np.asarray(on_white(Image.fromarray(np.ascontiguousarray(pixels))))
    return pixels, notes


def channels_last(values: np.ndarray) -> np.ndarray:
    """[H, W], [H, W, C] or [C, H, W], with any number of leading ones -> [H, W, C], C 1, 3 or 4.

    Where both ends could be channels, three colours at the end are taken for such, as in SAM, then three colours in
    front: [3, 9, 3] is [H, W, C], [3, 9, 1] a photo one pixel wide.
    """
    shape = list(values.shape)
    while values.ndim > 3 and values.shape[0] == 1:
        values = values[0]
    if values.ndim == 2:
        return values[..., None]
    if values.ndim == 3:
        for counts in ((3,), (4, 1)):
            if values.shape[2] in counts:
                return values
            if values.shape[0] in counts:
                return values.transpose(1, 2, 0)
    raise ValueError(f"its shape is {shape}")


def to_uint8(values: np.ndarray, stretch: bool = False) -> tuple[np.ndarray, Notes]:
    """Pixel values of any shape and type -> uint8, rounded.

    bool: 0 and 255. Integers from 0 to 255: as they are. Floats from 0 to 1 (a nearly black photo of 0 to 255 looks the
    same, and is taken for one of these): times 255; from 0 to 255: as they are. 16 bits, where the upper half of the
    range is used: one step for 257, and where it is not (12 bits, say): linearly from the smallest value to the largest.
    stretch: all others likewise, with what is not finite as the smallest; without it they are a ValueError.
    """
    kind, name = values.dtype.kind, values.dtype.name
    if values.dtype == np.uint8:
        return values, []
    if kind == "b":
        return values * np.uint8(255), []
    if kind not in "iuf":
        raise ValueError(f"its values are of type {name}")
    notes: Notes = []
    if kind == "f":
        values = values.astype(np.float32 if values.itemsize <= 4 else np.float64)
        if missing := int(values.size - np.isfinite(values).sum()):
            if not stretch or missing == values.size:
                raise ValueError(f"{missing} of its values are not finite")
            values = np.where(np.isfinite(values), values, values[np.isfinite(values)].min())
            notes.append(f"{missing} values that are not finite are shown as the smallest")
    low, high = values.min().item(), values.max().item()
    half = 0.5 if kind == "f" else 0  # what rounds to 0 or 255 is within
    if kind == "f" and -half / 255 <= low and high <= 1 + half / 255:
        return _rounded(values * 255), notes
    if -half <= low and high <= 255 + half and (kind != "f" or high >= 2):
        return _rounded(values), notes
    sixteen = name == "uint16" or (stretch and kind != "f")
    if sixteen and 0 <= low and (1 << 15 <= high < 1 << 16 or low == high < 1 << 16):
        return (values // 257).astype(np.uint8), notes
    if not (stretch or sixteen):
        wanted = "from 0 to 1, or from 0 to 255 with one of 2 at least" if kind == "f" else "from 0 to 255"
        raise ValueError(f"its {name} values run from {low:.6g} to {high:.6g}, not {wanted}: convert it to uint8")
    notes.append(f"values from {low:.6g} to {high:.6g} are shown as 0 to 255")
    return _rounded((values.astype(np.float64) - low) * (255 / (high - low) if high > low else 0)), notes


def _rounded(values: np.ndarray) -> np.ndarray:
    return np.rint(values).clip(0, 255).astype(np.uint8)


def on_white(image: Image.Image) -> Image.Image:
    """A picture with transparency -> RGB."""
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


def as_array(image: Any) -> np.ndarray:
    """Arrays, tensors on any device, lists, whatever NumPy takes -> an array; ValueError if it takes it not."""
    if image is None:
        raise ValueError("it is None, which is what cv2.imread gives for a file that it cannot read")
    try:
        if hasattr(image, "is_floating_point"):  # a tensor, without importing torch
            image = image.detach()
            image = (image.float() if image.is_floating_point() else image).cpu().numpy()
        return np.asarray(image)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"a {type(image).__name__} that makes no array ({one_line(error)})") from None
