"""Resizing without Pillow, against Pillow."""

import numpy as np
import pytest
from PIL import Image

from blsam.resizing import resize


@pytest.mark.parametrize("size", [(512, 512), (341, 512), (700, 1000), (16, 1), (5, 700), (37, 61)])
@pytest.mark.parametrize("shape", [(37, 61), (400, 600), (1501, 100), (1, 1)])
def test_photos_are_resized_as_pillow_does(shape, size):
    image = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    expected = np.asarray(Image.fromarray(image).resize(size[::-1], Image.Resampling.BILINEAR))
    assert np.array_equal(resize(image, *size), expected)
