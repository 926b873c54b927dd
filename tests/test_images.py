"""Photos as they come from files."""

import numpy as np
from PIL import Image

from blsam.images import read_image


def test_images_are_read_as_a_person_sees_them(tmp_path):
    grey = np.tile(np.arange(256, dtype=np.uint8), (4, 1))
    rgb = np.repeat(grey[..., None], 3, 2)
    Image.fromarray(grey).save(tmp_path / "grey.png")
    Image.fromarray(grey.astype(np.uint16) * 257).save(tmp_path / "16.png")
    Image.fromarray(rgb).quantize(256).save(tmp_path / "palette.png")
    for name, tolerance in (("grey.png", 0), ("16.png", 0), ("palette.png", 3)):
        gap = np.abs(read_image(tmp_path / name).astype(int) - rgb).max()
        assert gap <= tolerance, f"{name}: off by {gap}"

    clear = np.zeros((2, 2, 4), np.uint8)
    clear[0, 0] = (10, 20, 30, 255)
    Image.fromarray(clear).save(tmp_path / "rgba.png")
    seen = read_image(tmp_path / "rgba.png")
    assert seen[0, 0].tolist() == [10, 20, 30] and seen[1, 1].tolist() == [255, 255, 255]

    upright = Image.fromarray(np.zeros((10, 20, 3), np.uint8))
    exif = upright.getexif()
    exif[0x0112] = 6  # turned a quarter
    upright.save(tmp_path / "turned.jpg", exif=exif)
    assert read_image(tmp_path / "turned.jpg").shape == (20, 10, 3)
