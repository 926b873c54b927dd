"""What the page accepts and keeps."""

import pytest

from blsam.demo import photos
from blsam.demo.photos import BoundedCache, Refused, check_header, open_photo
from tests.demo.helpers import png_header


def test_the_header_alone_refuses_a_bomb(monkeypatch):
    monkeypatch.setattr(photos, "read_image", lambda *_: pytest.fail("decoded"))
    with pytest.raises(Refused, match="megapixels"):
        open_photo(png_header(20_000, 20_000), 512)
    check_header(png_header(6_000, 6_000))


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
