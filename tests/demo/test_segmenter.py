"""The seconds that the page shows."""

import io
import time

import pytest
from PIL import Image
from skimage import data

pytest.importorskip("gradio", reason="the demo needs gradio: pip install -e '.[demo]'")

from blsam import distributed, sam_model_registry  # noqa: E402
from blsam.demo.segmenter import Prompt, Segmenter  # noqa: E402
from blsam.options import shipped_checkpoint  # noqa: E402


def test_seconds_wait_for_the_device(monkeypatch):
    """A device that returns from the encoder at once, and works half a second more until somebody waits for it."""
    sam = sam_model_registry["blsam_vit_t"](shipped_checkpoint("blsam_vit_t"), image_size=64)
    pending, encode = [], sam.encode_images

    def begun(*args, **kwargs):
        pending.append(0.5)
        return encode(*args, **kwargs)

    monkeypatch.setattr(sam, "encode_images", begun)
    monkeypatch.setattr(distributed, "synchronize", lambda device: time.sleep(pending.pop() if pending else 0))
    segmenter, file = Segmenter(sam), io.BytesIO()
    Image.fromarray(data.coffee()).save(file, "JPEG")
    photo, prompt = segmenter.add(file.getvalue()), Prompt(((270.0, 60.0, 1),))
    first, again = (segmenter.masks(photo, 0.25, prompt) for _ in range(2))
    assert first.encoder >= 0.5 > again.encoder, (first.encoder, again.encoder)
    assert segmenter.encode(photo, 0.25).seconds >= 0.5
    assert segmenter.encode(photo, 0.5).seconds >= 0.5 and not pending
