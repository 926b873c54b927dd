"""Photos as a person sees them: rotation by EXIF, greyscale, 16 bits, palettes and transparency."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError


def read_image(source: str | Path | bytes, *, upright: bool = True) -> np.ndarray:
    """A file, or the bytes of one -> uint8 [H, W, 3] RGB; transparent parts on white.

    upright: rotate as EXIF says; False for annotated photos, whose masks lie on the pixels as stored.
    FileNotFoundError or ValueError in one line.
    """
    name = "the photo" if isinstance(source, bytes) else str(source)
    if not isinstance(source, bytes) and not Path(source).is_file():
        raise FileNotFoundError(f"no image at {source}")
    try:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as file:
            file.load()
            image: Image.Image = ImageOps.exif_transpose(file) if upright else file
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        unknown = isinstance(error, UnidentifiedImageError)
        reason = "no format that is known here" if unknown else str(error).splitlines()[0]
        raise ValueError(f"{name} is damaged or not an image ({reason})") from None
    if image.mode.startswith("I"):  # 16-bit grey, which Pillow would clip at 255
        values = np.asarray(image).astype(np.int64).clip(0, 65535)
        return np.repeat((values // 257).astype(np.uint8)[..., None], 3, axis=2)
    if image.mode == "F":
        raise ValueError(f"{name} holds floating-point pixels; convert it to 8 or 16 bits")
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return np.asarray(image.convert("RGB"))


def encode_image(pixels: np.ndarray, kind: str, **options: Any) -> bytes:
    """uint8 [H, W], [H, W, 3] RGB or [H, W, 4] RGBA as a file of Pillow's format `kind` ("PNG", "JPEG"), as bytes."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind, **options)
    return buffer.getvalue()
