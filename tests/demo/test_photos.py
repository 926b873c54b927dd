"""What the page accepts and keeps."""

import numpy as np
import pytest
from PIL import Image, features
from skimage import data

from blsam.demo import photos
from blsam.demo.photos import BoundedCache, Refused, check_header, open_photo
from tests.demo.helpers import file_of, png_header


def test_the_header_alone_refuses_a_bomb(monkeypatch):
    monkeypatch.setattr(photos, "decode_image", lambda *_: pytest.fail("decoded"))
    with pytest.raises(Refused, match="megapixels"):
        open_photo(png_header(20_000, 20_000), 512)
    check_header(png_header(6_000, 6_000))


def test_what_is_no_photo_is_named():
    for contents, name in (
        (bytes(128) + b"DICM", "This is a DICOM file, which is not read here; convert it to PNG or JPEG."),
        (b"\0\0\0\x18ftypisom\0\0\0\0", "This is a video"),
        (b"<svg>", "This is an SVG drawing"),
        (b"a text", "This is no photo that can be read here (JPEG, PNG, "),
    ):
        with pytest.raises(Refused) as caught:
            check_header(contents)
        assert name in str(caught.value) and caught.value.status == 415
    with pytest.raises(Refused, match="^The photo is a RAW photo.*[.]$"):
        open_photo(file_of(data.coffee(), "TIFF", tiffinfo={50706: b"\1\4\0\0"}), 64)


@pytest.mark.skipif(not features.check("avif"), reason="Pillow without AVIF")
def test_avif_is_a_photo():
    assert open_photo(file_of(data.coffee(), "AVIF"), 64).size == (400, 600)


def test_what_was_done_to_a_photo_is_noted():
    assert open_photo(file_of(data.coffee()), 64).note == ""
    deep = open_photo(file_of(data.coffee()[..., 0].astype(np.uint16) * 16), 64)
    assert deep.note == "values from 0 to 4080 are shown as 0 to 255" and deep.resized.max() > 200
    frames = open_photo(file_of(data.coffee(), "GIF", save_all=True, append_images=[Image.new("RGB", (600, 400))]), 64)
    assert frames.note == "of several frames or pages the first is taken"


def test_the_cache_forgets_what_was_used_longest_ago():
    cache = BoundedCache(3)
    for key in "abc":
        cache.put(key, key, 1)
    assert cache.get("a") == "a"
    cache.put("d", "d", 1)
    assert cache.get("b") is None and cache.get("a") == "a" and cache.weight == 3
    cache.put("a", "A", 3)
    assert cache.get("a") == "A" and len(cache) == 1 and cache.weight == 3
    cache.put("e", "e", 9)
    assert cache.get("e") == "e" and len(cache) == 1
