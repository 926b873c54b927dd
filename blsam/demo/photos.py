"""What visitors drop on the page: refused by size and header before anything is decoded, then kept within a bound."""

from __future__ import annotations

import hashlib
import io
import threading
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
from PIL import Image

from ..formats import HEAD, name_format
from ..images import decode_image, encode_image, read_heic
from ..predictor import ResizeLongestSide

MAX_BYTES = 30 * 2**20
MAX_PIXELS = 40_000_000
MIN_SIDE, MAX_ASPECT = 8, 16  # pixels, long side over short side; less makes no token grid worth a mask
Image.init()
read_heic()
FORMATS = tuple(  # a phone's MPO opens as JPEG
    name for name in ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "AVIF", "HEIF") if name in Image.OPEN
)
PREVIEW_SIDE = 1280  # longer side in pixels of what the page shows; exports are at the photo's own size


class Refused(ValueError):
    """What a visitor asked for cannot be done; one line for people, and HTTP's status for it."""

    def __init__(self, message: str, status: int = 400) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True)
class Photo:
    """A photo that was accepted.

    id: SHA-256 of the file, so that the same file is the same photo whoever drops it, and nobody can name another's.
    data: the file. size (H, W): upright, in pixels. resized: uint8 [h, w, 3] RGB, what the encoder takes.
    preview: JPEG of `preview_size` (h, w), what the page shows. note: what was done to it, for the visitor, if anything.
    """

    id: str
    data: bytes
    size: tuple[int, int]
    resized: np.ndarray
    preview: bytes
    preview_size: tuple[int, int]
    note: str = ""

    @property
    def nbytes(self) -> int:
        return len(self.data) + self.resized.nbytes + len(self.preview)


def check_header(data: bytes) -> None:
    """Refused for what is too large, not a photo, or of a shape that makes no sense; decodes no pixel."""
    if len(data) > MAX_BYTES:
        raise Refused(f"The file is larger than {MAX_BYTES >> 20} MB.", 413)
    if not data:
        raise Refused("The file is empty.")
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            width, height = image.size
    except Image.DecompressionBombError:
        raise Refused(f"The photo has more than {MAX_PIXELS // 10**6} megapixels.", 413) from None
    except (OSError, SyntaxError, ValueError):  # Pillow's UnidentifiedImageError is an OSError
        name, cure = name_format(data[:HEAD]) or ("no photo that can be read here", "")
        if cure:
            raise Refused(f"This is {name}, which is not read here; {cure}.", 415) from None
        raise Refused(f"This is {name} ({', '.join(FORMATS)}).", 415) from None
    if width * height > MAX_PIXELS:
        raise Refused(f"The photo has {width} x {height} pixels; {MAX_PIXELS // 10**6} megapixels are the most.", 413)
    if min(width, height) < MIN_SIDE or max(width, height) > MAX_ASPECT * min(width, height):
        raise Refused(
            f"A photo of {width} x {height} pixels is too small or too narrow: {MIN_SIDE} pixels a side at least, "
            f"at most {MAX_ASPECT} times as long as wide."
        )


def open_photo(data: bytes, image_size: int) -> Photo:
    """Check and decode a file for an encoder of side `image_size`; Refused says what is wrong with it."""
    check_header(data)
    pixels, notes = _decode(data)
    size = pixels.shape[0], pixels.shape[1]
    side = min(PREVIEW_SIDE, max(size))
    preview_size = ResizeLongestSide.get_preprocess_shape(*size, side)
    preview = cv2.resize(pixels, preview_size[::-1], interpolation=cv2.INTER_AREA)
    shown = encode_image(preview, "JPEG", quality=90)
    resized = ResizeLongestSide(image_size).apply_image(pixels)
    return Photo(hashlib.sha256(data).hexdigest(), data, size, resized, shown, preview_size, "; ".join(notes))


def decode_pixels(data: bytes) -> np.ndarray:
    """The photo's pixels, upright, uint8 [H, W, 3] RGB."""
    return _decode(data)[0]


def _decode(data: bytes) -> tuple[np.ndarray, list[str]]:
    try:
        return decode_image(data)
    except ValueError as error:
        text = str(error)
        raise Refused(text[0].upper() + text[1:] + ".") from None


class BoundedCache:
    """The values used last, as many as weigh at most `limit` together; safe from several threads."""

    def __init__(self, limit: int) -> None:
        self.limit, self.weight = limit, 0
        self._items: OrderedDict[Any, tuple[Any, int]] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._items)

    def get(self, key: Any) -> Any | None:
        """The value, which thereby is the one used last, or None."""
        with self._lock:
            if key not in self._items:
                return None
            self._items.move_to_end(key)
            return self._items[key][0]

    def put(self, key: Any, value: Any, weight: int) -> None:
        """Keep a value; those not used for longest go. One heavier than the limit is kept alone."""
        with self._lock:
            self.weight += weight - self._items.pop(key, (None, 0))[1]
            self._items[key] = value, weight
            while self.weight > self.limit and len(self._items) > 1:
                _, (_, gone) = self._items.popitem(last=False)
                self.weight -= gone

    def clear(self) -> None:
        with self._lock:
            self._items.clear()
            self.weight = 0
