"""What is kept for visitors, and who has to wait."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
from skimage import data

from blsam import build_sam, distributed, sam_model_registry
from blsam.config import CONFIGS, THRESHOLDS
from blsam.demo.photos import Refused
from blsam.demo.segmenter import EVERYTHING, MAX_WAITING, Prompt, Segmenter, _SharedGenerator
from blsam.options import shipped_checkpoint
from tests.demo.helpers import JPEG, file_of


def test_what_is_kept_is_bounded(shared):
    one = shared.add(JPEG)
    shared.photos.limit = 3 * one.nbytes
    kept = [shared.add(file_of(np.roll(data.coffee(), i, 1), "JPEG")) for i in range(1, 9)]
    assert len(shared.photos) <= 3 and shared.photos.weight <= shared.photos.limit
    with pytest.raises(Refused, match="open it again"):
        shared.photo(one.id)
    shared.encodings.limit = 2 * shared.encode(kept[-1], 0.1).encoded.nbytes
    for ratio in (0.1, 0.2, 0.3, 0.4):
        shared.encode(kept[-1], ratio)
    assert len(shared.encodings) == 2 and shared.encodings.get((kept[-1].id, 0.4)) is not None


def test_the_model_is_made_on_the_thread_that_runs_it(sam, monkeypatch):
    threads = []

    def build():
        threads.append(threading.current_thread())
        return sam

    segmenter, encode = Segmenter(build), sam.encode_images
    monkeypatch.setattr(
        sam, "encode_images", lambda *a, **k: threads.append(threading.current_thread()) or encode(*a, **k)
    )
    segmenter.encode(segmenter.add(JPEG), 0.25)
    assert len(threads) == 2 and threads[0] is threads[1] is not threading.main_thread(), threads


@pytest.mark.parametrize("name", ["blsam_vit_t_fine", "another"])
def test_everything_keeps_what_the_model_is_sure_of(name, monkeypatch):
    kept = []

    class Watched(_SharedGenerator):
        def __init__(self, *args):
            super().__init__(*args)
            kept.append((self.pred_iou_thresh, self.stability_score_thresh))

    monkeypatch.setattr("blsam.demo.segmenter._SharedGenerator", Watched)
    monkeypatch.setitem(EVERYTHING, "points_per_side", 2)
    segmenter = Segmenter(lambda: build_sam(replace(CONFIGS["blsam_vit_t_fine"], name=name), image_size=64))
    segmenter.everything(segmenter.add(JPEG), 0.25)
    assert kept == [tuple(THRESHOLDS[name].values()) if name in THRESHOLDS else (0.88, 0.95)]


def test_more_than_can_wait_are_told_so(shared, monkeypatch):
    photo, gate = shared.add(JPEG), threading.Event()
    shared._model.submit(gate.wait)
    prompt = Prompt(((270.0, 60.0, 1),))
    with ThreadPoolExecutor(MAX_WAITING + 5) as pool:
        waiting = [pool.submit(shared.masks, photo, 0.25, prompt) for _ in range(MAX_WAITING + 5)]
        refused = []
        while len(refused) < 5:
            refused = [job for job in waiting if job.done()]
        gate.set()
    errors = [job.exception() for job in waiting if job.exception()]
    assert len(errors) == 5 and all(error.status == 503 and "try again" in str(error) for error in errors)


def test_seconds_wait_for_the_device(monkeypatch):
    """A device that returns from the encoder at once, and works half a second more until somebody waits for it."""
    sam = sam_model_registry["blsam_vit_t"](shipped_checkpoint("blsam_vit_t"), image_size=64)
    pending, encode = [], sam.encode_images

    def begun(*args, **kwargs):
        pending.append(0.5)
        return encode(*args, **kwargs)

    monkeypatch.setattr(sam, "encode_images", begun)
    monkeypatch.setattr(distributed, "synchronize", lambda device: time.sleep(pending.pop() if pending else 0))
    segmenter = Segmenter(lambda: sam)
    photo, prompt = segmenter.add(JPEG), Prompt(((270.0, 60.0, 1),))
    first, again = (segmenter.masks(photo, 0.25, prompt) for _ in range(2))
    assert first.encoder >= 0.5 > again.encoder, (first.encoder, again.encoder)
    assert segmenter.encode(photo, 0.25).seconds >= 0.5
    assert segmenter.encode(photo, 0.5).seconds >= 0.5 and not pending
