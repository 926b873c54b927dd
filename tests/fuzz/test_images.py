"""Damaged photos of many formats: uint8 [H, W, 3], or a ValueError."""

import io

import numpy as np
import pytest
from PIL import Image

from blsam.images import read_image
from tests.fuzz.helpers import damaged_files, few, many, outcome

MODES = {
    "PNG": ("RGB", "RGBA", "L", "LA", "P", "1", "I;16"),
    "JPEG": ("RGB", "L", "CMYK"),
    "GIF": ("P", "L"),
    "TIFF": ("RGB", "RGBA", "L", "I;16", "F", "CMYK", "LAB"),
    "WEBP": ("RGB", "RGBA"),
    "BMP": ("RGB", "P"),
}


def written(kind, mode, **options):
    grey = Image.fromarray((np.add.outer(np.arange(24), 3 * np.arange(20)) * 2).astype(np.uint8))
    image = grey.convert("RGB").convert(mode) if mode not in ("I;16", "LAB") else Image.new(mode, (20, 24), 5)
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


FILES = {f"{kind} {mode}": written(kind, mode) for kind, modes in MODES.items() for mode in modes}
EXIF = Image.Exif()
EXIF[0x0112] = 6
FILES |= {f"{kind} turned": written(kind, "RGB", exif=EXIF) for kind in ("PNG", "JPEG", "WEBP", "TIFF")}
FILES |= {"TIFF packed": written("TIFF", "RGB", compression="tiff_lzw")}


def check(case):
    for upright in (True, False):
        image = outcome(lambda: read_image(case[1], upright=upright), ValueError)  # noqa: B023
        if image is not None:
            assert image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3 and image.size


@pytest.mark.parametrize("name", FILES)
def test_what_is_damaged_is_read_whole(name):
    assert read_image(FILES[name]).shape == ((20, 24, 3) if "turned" in name else (24, 20, 3))


def test_a_few():
    few(check, damaged_files(FILES), 150)


@pytest.mark.slow
def test_many(capsys):
    with capsys.disabled():
        many(check, damaged_files(FILES), "images")
