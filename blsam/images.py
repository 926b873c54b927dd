"""Photos as people have them -> uint8 [H, W, 3] RGB: files, their bytes, arrays, tensors, pictures of Pillow.

Everything that reads a photo reads it here: the API, the command line, the page, training, calibration, evaluation.
"""

from __future__ import annotations

import functools
import io
import math
import os
import threading
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from PIL import ExifTags, Image, ImageCms, UnidentifiedImageError, features

from .files import is_file, printable
from .formats import AVIF, HEAD, HEIC, name_format
from .options import one_line
from .pixels import Notes, as_array, on_white, to_rgb

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".avif", ".heic", ".heif")  # in a folder
File = str | os.PathLike[str] | bytes  # a path, or what is in the file
WANTED = "an image must be uint8 [H, W, 3], or what can be read as one"


def photos_in(folder: Path) -> list[Path]:
    """The photos that lie in a folder, by their names; hidden files are none, macOS puts a `._NAME` beside every NAME."""
    return sorted(p for p in folder.iterdir() if p.suffix.lower() in SUFFIXES and not p.name.startswith("."))


# --- in memory -------------------------------------------------------------------------------------------------------


def as_photo(image: Any, image_format: str = "RGB") -> np.ndarray:
    """A photo in any form -> uint8 [H, W, 3] RGB; one that is so already is given back as it is, not copied.

    Arrays, tensors on any device, lists: grey, RGB or RGBA, channels last or first, with the values that
    `pixels.to_uint8` takes; image_format "BGR" is their order of colours. Pillow's pictures as they lie, whatever EXIF
    says. Paths, and the bytes of a file: `read_image`, upright. ValueError (FileNotFoundError for a path) in one line.
    """
    if image_format not in ("RGB", "BGR"):
        raise ValueError(f"image_format must be RGB or BGR, is {image_format!r}")
    bgr = image_format == "BGR"
    if isinstance(image, np.ndarray) and image.dtype == np.uint8 and image.shape[2:] == (3,) and image.size:
        return image[..., ::-1] if bgr else image
    if bgr and isinstance(image, str | os.PathLike | bytes | bytearray | Image.Image):
        raise ValueError("image_format is for arrays; files and pictures of Pillow know their colours: leave it out")
    if callable(getattr(image, "read", None)):  # a file that is open
        image = image.read()
    if isinstance(image, str | os.PathLike | bytes | bytearray):
        return read_image(bytes(image) if isinstance(image, bytearray) else image)
    try:
        pixels, notes = _picture(image) if isinstance(image, Image.Image) else to_rgb(as_array(image), bgr)
    except ValueError as error:
        raise ValueError(f"{WANTED}: {error}") from None
    _warn("the photo", notes)
    return pixels


def as_photos(images: Any) -> list[np.ndarray]:
    """Several photos, each as `as_photo` takes it; ValueError says which one is none."""
    single = isinstance(images, str | bytes | os.PathLike | Image.Image) or getattr(images, "ndim", 4) < 4
    if single or not hasattr(images, "__iter__"):
        raise ValueError("several images come as a list, one image as a list of one")
    photos = []
    for number, image in enumerate(images):
        try:
            photos.append(as_photo(image))
        except ValueError as error:
            raise ValueError(f"image {number}: {error}") from None
    return photos


# --- files -----------------------------------------------------------------------------------------------------------


def read_image(source: File, *, upright: bool = True, max_megapixels: float | None = None) -> np.ndarray:
    """A file, or the bytes of one -> uint8 [H, W, 3] RGB; `decode_image`, with a warning for each of its notes."""
    pixels, notes = decode_image(source, upright=upright, max_megapixels=max_megapixels)
    _warn(_name(source), notes)
    return pixels


def read_annotated(source: File, size: Sequence[int]) -> np.ndarray:
    """A photo as its annotations see it, the pixels as stored: uint8 [H, W, 3] RGB.

    size (H, W): of the annotations; ValueError if the photo has another.
    """
    pixels = read_image(source, upright=False)
    height, width = pixels.shape[:2]
    if (height, width) != tuple(size):
        across, down = (printable(repr(side)) for side in (size[1], size[0]))  # a file may hold anything
        text = f"{_name(source)} has {width} x {height} pixels, its annotations {across} x {down}"
        if (width, height) == tuple(size) and read_image(source).shape[:2] == tuple(size):
            text += ": EXIF turns it, and they were made on the turned photo; store its pixels upright, without EXIF"
        raise ValueError(text)
    return pixels


def decode_image(
    source: File, *, upright: bool = True, max_megapixels: float | None = None
) -> tuple[np.ndarray, Notes]:
    """A file, or the bytes of one -> uint8 [H, W, 3] RGB, and what was done to it: range of values, frames left out.

    upright: turn as EXIF says; False for annotated photos, whose masks lie on the pixels as stored. Transparent parts on
    white. Grey of 16 or 32 bits and floats: `pixels.to_uint8` with `stretch`. max_megapixels: larger photos are refused
    by their header; default Pillow's limit. FileNotFoundError or ValueError in one line.
    """
    name = _name(source)
    if not isinstance(source, bytes) and not is_file(source):
        raise FileNotFoundError(f"no image at {printable(source, 300)}")
    if max_megapixels is not None and not max_megapixels > 0:
        raise ValueError(f"max_megapixels must be above 0, is {max_megapixels}")
    file: Any = io.BytesIO(source) if isinstance(source, bytes) else source
    try:
        with _open(file) as image:
            _check(image, max_megapixels)
            return _loaded(image, upright, file)
    except MemoryError:
        raise
    except PermissionError:
        raise ValueError(f"{name} cannot be read: permission denied") from None
    except Exception as error:  # a decoder may raise anything on a damaged file
        raise ValueError(f"{name} {_what_is_wrong(file, error)}") from None


class Refused(ValueError):
    """A file that is read well enough to know why it is not taken: what is wrong with it."""


@functools.cache
def read_heic() -> bool:
    """Let Pillow read HEIC, if the package pillow-heif is there; whether it is."""
    try:
        import pillow_heif
    except ImportError:
        return False
    pillow_heif.register_heif_opener()
    return True


_header = threading.Lock()


def _open(file: Any) -> Image.Image:
    """The header, however large the photo."""
    with _header:
        pillow = Image.MAX_IMAGE_PIXELS
        Image.MAX_IMAGE_PIXELS = None  # for all of the process: it would warn and raise
        try:
            return _identified(file)
        finally:
            Image.MAX_IMAGE_PIXELS = pillow


def _check(image: Image.Image, max_megapixels: float | None) -> None:
    """Refused for what the header tells."""
    with _header:
        pillow = Image.MAX_IMAGE_PIXELS
    limit = max_megapixels or (2 * pillow / 1e6 if pillow else math.inf)  # where Pillow would raise
    width, height = image.size
    if width * height > limit * 1e6:
        raise Refused(
            f"is too large, {width} x {height} pixels: {limit:.6g} megapixels are the most, unless max_megapixels "
            "of read_image, or blsam segment --max-megapixels, allows more"
        )
    tags = getattr(image, "tag_v2", {})
    if 50706 in tags or (tags.get(254) == 1 and 330 in tags):  # DNGVersion; a preview first, the picture in a SubIFD
        raise Refused("is a RAW photo, of which a preview alone is read here; convert it to PNG or JPEG")


def _identified(file: Any) -> Image.Image:
    try:
        return Image.open(file)
    except UnidentifiedImageError:
        if not (name_format(_head(file)) == HEIC and read_heic()):
            raise
        return Image.open(file)


def _what_is_wrong(file: Any, error: Exception) -> str:
    if isinstance(error, Refused):
        return str(error)
    head, reason = _head(file), one_line(error)
    if not head:
        return "is empty"
    known = name_format(head)
    if known and not (known == HEIC and read_heic()) and not (known == AVIF and features.check("avif")):
        return f"is {known[0]}, which is not read here; {known[1]}"
    if isinstance(error, UnidentifiedImageError):
        tiff = head[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
        reason = (
            "a TIFF of a kind that is not read here; 8 and 16 bits are" if tiff else "no format that is known here"
        )
    return f"is damaged or not an image ({reason})"


def _head(file: Any) -> bytes:
    if isinstance(file, io.BytesIO):
        return file.getvalue()[:HEAD]
    with open(file, "rb") as opened:
        return opened.read(HEAD)


# --- pictures of Pillow ----------------------------------------------------------------------------------------------


def _picture(image: Image.Image) -> tuple[np.ndarray, Notes]:
    """A picture of Pillow as it lies; it may read its file only now, and find it damaged or closed."""
    try:
        return _loaded(image)
    except (MemoryError, ValueError):
        raise
    except Exception as error:
        raise ValueError(f"the picture cannot be loaded ({one_line(error)})") from None


def _loaded(image: Image.Image, upright: bool | None = None, file: Any = None) -> tuple[np.ndarray, Notes]:
    """The frame of a picture that is set as uint8 [H, W, 3] RGB, and notes.

    upright: turned as EXIF says, or as stored; None: as it lies. file: where it came from.
    """
    if 0 in image.size:
        raise ValueError(f"it is empty, {image.width} x {image.height} pixels")
    notes: Notes = []
    if file is not None and image.format != "MPO" and getattr(image, "is_animated", False):
        notes.append("of several frames or pages the first is taken")  # a phone's MPO holds the same photo again
    deep = image.mode[0] not in "IF" and any("16" in str(tile[3]) for tile in getattr(image, "tile", ()))
    turn = _orientation(image)
    image.load()
    turned = turn != _orientation(image)  # Pillow turns TIFF while it reads
    if deep and (full := _deep_colours(image, file)):
        image, notes = full[0], notes + full[1]
    if upright is not None and upright != turned and turn in TURNS:
        image = image.transpose(TURNS[turn] if upright else TURNED_BACK[turn])
    if image.mode[0] in "IF":
        pixels, done = to_rgb(np.asarray(image), stretch=True)
        return pixels, notes + done
    if image.mode == "LAB":
        profiles = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        image = ImageCms.profileToProfile(image, *profiles, outputMode="RGB") or image
    if image.mode == "La":  # grey by its opacity
        image = image.convert("LA")
    if image.has_transparency_data:
        image = on_white(image)
    return np.asarray(image.convert("RGB")), notes


def _deep_colours(image: Image.Image, file: Any) -> tuple[Image.Image, Notes] | None:
    """Colours of 16 bits that leave the upper half of the range unused: of them Pillow keeps the upper 8 bits, black.

    None where Pillow's 8 bits are right, or nobody reads more.
    """
    if file is None or np.asarray(image.convert("RGB")).max() >= 128:
        return None
    data = file.getvalue() if isinstance(file, io.BytesIO) else Path(file).read_bytes()
    flags = cv2.IMREAD_COLOR | cv2.IMREAD_ANYDEPTH | cv2.IMREAD_IGNORE_ORIENTATION  # it turns TIFF all the same
    values = cv2.imdecode(np.frombuffer(data, np.uint8), flags)
    if values is None or values.dtype != np.uint16 or values.shape[:2] != image.size[::-1]:
        return None
    pixels, notes = to_rgb(values, bgr=True, stretch=True)
    colours = Image.fromarray(pixels)
    if image.has_transparency_data:
        colours.putalpha(image.convert("RGBA").getchannel("A"))
    return colours, notes


TURNS = {  # EXIF's orientations
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
TURNED_BACK = TURNS | {6: TURNS[8], 8: TURNS[6]}


def _orientation(image: Image.Image) -> Any:
    """What EXIF says; 1, upright, if it cannot be read."""
    try:
        return image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # of a photo that is otherwise sound
        return 1


def _name(source: File) -> str:
    return "the photo" if isinstance(source, bytes) else str(source)


def _warn(name: str, notes: Notes) -> None:
    for note in notes:
        warnings.warn(f"{name}: {note}", stacklevel=3)


# --- writing ---------------------------------------------------------------------------------------------------------


def encode_image(pixels: np.ndarray, kind: str, **options: Any) -> bytes:
    """uint8 [H, W], [H, W, 3] RGB or [H, W, 4] RGBA as a file of Pillow's format `kind` ("PNG", "JPEG"), as bytes."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind, **options)
    return buffer.getvalue()
