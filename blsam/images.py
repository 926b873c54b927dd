"""Photos as a person sees them: rotation by EXIF, greyscale, 16 bits, palettes and transparency."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError


def read_image(path: str | Path, *, upright: bool = True) -> np.ndarray:
    """uint8 [H, W, 3] RGB; transparent parts on white. FileNotFoundError or ValueError in one line.

    upright: rotate as EXIF says; False for annotated photos, whose masks lie on the pixels as stored.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no image at {path}")
    try:
        with Image.open(path) as image:
            image.load()
            image = ImageOps.exif_transpose(image) if upright else image
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path} is damaged or not an image ({str(error).splitlines()[0]})") from None
    if image.mode.startswith("I"):  # 16-bit grey, which Pillow would clip at 255
        values = np.asarray(image).astype(np.int64).clip(0, 65535)
        return np.repeat((values // 257).astype(np.uint8)[..., None], 3, axis=2)
    if image.mode == "F":
        raise ValueError(f"{path} holds floating-point pixels; convert it to 8 or 16 bits")
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return np.asarray(image.convert("RGB"))
