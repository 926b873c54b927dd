"""Photos and prompts in, masks out, for several visitors of one model.

Every request carries its photo's id, its keep ratio and all its prompts, so no setting of one visitor can reach
another. What is shared is bounded: photos and encodings in caches, waiting requests by number.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import cv2
import numpy as np
import torch
from pycocotools import mask as rle_tools

from ..automatic_mask_generator import SamAutomaticMaskGenerator
from ..config import THRESHOLDS
from ..decoding import decode
from ..distributed import Stopwatch
from ..encoded import Encoded
from ..modeling.sam import Sam
from ..predictor import SamPredictor, check_prompts, points_outside
from .photos import BoundedCache, Photo, Refused, open_photo

PHOTO_BYTES, ENCODING_BYTES = 512 * 2**20, 256 * 2**20
MAX_POINTS = 1000
MAX_WAITING, MAX_EVERYTHING = 24, 8  # requests that wait for the model; more are told to come back
EVERYTHING: dict[str, Any] = {
    "points_per_side": 16,
    "points_per_batch": 16,  # clicks of others get their turn between two batches
}


@dataclass(frozen=True)
class Prompt:
    """points: (x, y, label) in pixels of the photo, label 1 object, 0 background; box: x1, y1, x2, y2 or None."""

    points: tuple[tuple[float, float, int], ...] = ()
    box: tuple[float, float, float, float] | None = None

    @classmethod
    def parse(cls, points: Any, box: Any, size: tuple[int, int]) -> Prompt:
        """What came over the wire, checked against a photo of `size` (H, W)."""
        if not isinstance(points, list) or len(points) > MAX_POINTS:
            raise Refused(f"points must be a list of at most {MAX_POINTS}")
        try:
            rows = np.array(points, float).reshape(-1, 3) if points else None
            corners = None if box is None else np.array(box, float)
            coords, labels = (None, None) if rows is None else (rows[:, :2], rows[:, 2])
            check_prompts(coords, labels, corners, None, size)
        except (TypeError, ValueError, OverflowError) as error:
            raise Refused(f"points are [x, y, label], a box is [x1, y1, x2, y2]: {error}") from None
        if rows is None and corners is None:
            raise Refused("a mask needs at least one point or a box")
        if rows is not None and (points_outside(rows[:, :2], size) or (rows[:, 2] < 0).any()):
            raise Refused("points lie on the photo and have label 0 or 1")
        found = () if rows is None else tuple((float(x), float(y), int(label)) for x, y, label in rows)
        return cls(found, None if corners is None else tuple(corners.reshape(4).tolist()))


@dataclass
class Encoding:
    """A photo encoded at one keep ratio, the seconds that it took, and what computed it ("torch", "openvino" ...)."""

    encoded: Encoded
    seconds: float
    runtime: str
    everything: list[dict[str, Any]] | None = None  # found once, on demand


@dataclass(frozen=True)
class Found:
    """Three candidates: masks bool [3, h, w] at the preview's size, scores [3] (predicted IoU), and the times.

    encoder: seconds of the encoder now, 0 if the encoding was there. decoder: decoder and upscaling, seconds.
    """

    masks: np.ndarray
    scores: np.ndarray
    encoder: float
    decoder: float


class Segmenter:
    """One model, one job at a time in the order they come.

    build: makes the model, on the thread that will run it. torch gives every thread that it is called from threads of its
    own, and all of them sleep between operators once they are more than the cores: a click then takes half as long again.
    """

    def __init__(self, build: Callable[[], Sam]) -> None:
        self._model = ThreadPoolExecutor(1, thread_name_prefix="model")
        self.sam = self._model.submit(build).result()
        self.photos, self.encodings = BoundedCache(PHOTO_BYTES), BoundedCache(ENCODING_BYTES)
        # photos too, on one thread: 40 megapixels take several hundred MB, which the next photo then uses again
        self._opening = ThreadPoolExecutor(1, thread_name_prefix="opening")
        self._waiting = threading.BoundedSemaphore(MAX_WAITING)
        self._everything = threading.BoundedSemaphore(MAX_EVERYTHING)
        self._one_everything = threading.Lock()

    def warm_up(self, keep_ratio: float = 0.25) -> None:
        """Run everything once, at the page's ratio and with all tokens, so that the first visitor does not pay for what
        torch sets up."""
        side = self.sam.image_encoder.img_size
        blank = Photo("", b"", (side, side), np.zeros((side, side, 3), np.uint8), b"", (side, side))
        for ratio in (1.0, keep_ratio):
            self.masks(blank, ratio, Prompt(box=(0, 0, side, side)))
        self.encodings.clear()

    # --- what the page asks for --------------------------------------------------------------------------------------

    def add(self, data: bytes) -> Photo:
        """Accept a file, or Refused."""
        photo = self._opening.submit(open_photo, data, self.sam.image_encoder.img_size).result()
        self.photos.put(photo.id, photo, photo.nbytes)
        return photo

    def photo(self, id: str) -> Photo:
        """The photo of an id; Refused with status 404 when others have taken its place."""
        photo = self.photos.get(id)
        if photo is None:
            raise Refused("This photo is no longer kept here; open it again.", 404)
        return photo

    def encode(self, photo: Photo, keep_ratio: float) -> Encoding:
        """The photo's encoding, from the cache or computed now."""
        return self._run(lambda: self._encode(photo, keep_ratio))

    def masks(self, photo: Photo, keep_ratio: float, prompt: Prompt) -> Found:
        """Three candidates for a prompt, at the preview's size."""

        def job() -> Found:
            watch = Stopwatch(self.sam.device)
            with watch("encoder"):
                encoding = self._encode(photo, keep_ratio)
            with watch("decoder"):
                masks, scores = self._decode(encoding, prompt, photo.preview_size)
            return Found(masks, scores, **watch.seconds)

        return self._run(job)

    def full_mask(self, photo: Photo, keep_ratio: float, prompt: Prompt, candidate: int) -> tuple[np.ndarray, float]:
        """Candidate 0, 1 or 2 of a prompt at the photo's own size, bool [H, W], and its score."""
        if candidate not in (0, 1, 2):
            raise Refused("candidate must be 0, 1 or 2")

        def job() -> tuple[np.ndarray, float]:
            masks, scores = self._decode(self._encode(photo, keep_ratio), prompt, photo.size, candidate)
            return masks[0], float(scores[0])

        return self._run(job)

    def everything(self, photo: Photo, keep_ratio: float) -> list[dict[str, Any]]:
        """Masks of a grid of points as records of `segment_anything`'s generator, run-lengths at the preview's size,
        large ones first."""
        if not self._everything.acquire(blocking=False):
            raise Refused(f"{MAX_EVERYTHING} visitors wait for everything already; try again in a minute.", 503)
        try:
            with self._one_everything:
                encoding = self.encode(photo, keep_ratio)
                if encoding.everything is None:
                    generator = _SharedGenerator(self, photo, encoding)
                    found = generator.generate(np.zeros((*photo.preview_size, 3), np.uint8))
                    encoding.everything = sorted(found, key=lambda record: -record["area"])
                return encoding.everything
        finally:
            self._everything.release()

    def full_everything(self, photo: Photo, keep_ratio: float) -> Iterator[tuple[np.ndarray, float]]:
        """`everything` at the photo's own size: bool [H, W] and score, one at a time."""
        for record in self.everything(photo, keep_ratio):
            mask = rle_tools.decode(record["segmentation"])
            full = cv2.resize(mask * np.uint8(255), photo.size[::-1], interpolation=cv2.INTER_LINEAR) > 127
            yield full, float(record["predicted_iou"])

    # --- on the model's thread ---------------------------------------------------------------------------------------

    def _run(self, job: Callable[[], Any]) -> Any:
        if not self._waiting.acquire(blocking=False):
            raise Refused(f"{MAX_WAITING} others wait for the model already; try again.", 503)
        try:
            return self._model.submit(job).result()
        finally:
            self._waiting.release()

    @torch.no_grad()
    def _encode(self, photo: Photo, keep_ratio: float) -> Encoding:
        key = photo.id, keep_ratio
        encoding = self.encodings.get(key)
        if encoding is None:
            pixels = torch.as_tensor(photo.resized, device=self.sam.device).permute(2, 0, 1)
            watch = Stopwatch(self.sam.device)
            with watch("encoder"):
                features, routing = self.sam.encode_images([pixels], keep_ratio=keep_ratio)
            encoded = Encoded(features, routing.of_image(0), photo.resized.shape[:2], photo.size)
            engine = self.sam.image_encoder.engine
            runtime = engine.name if engine is not None and engine.serves(keep_ratio) else "torch"
            encoding = Encoding(encoded, watch.seconds["encoder"], runtime)
            self.encodings.put(key, encoding, encoded.nbytes)
        return encoding

    @torch.no_grad()
    def _decode(
        self, encoding: Encoding, prompt: Prompt, size: tuple[int, int], candidate: int | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """All candidates, or one of them, at `size` (h, w): bool [M, h, w] and scores [M]."""
        predictor = predictor_on(self.sam, encoding.encoded)
        boxes = None if prompt.box is None else [prompt.box]
        found = decode(predictor, points=[prompt.points] if prompt.points else None, boxes=boxes)
        chosen = slice(None) if candidate is None else slice(candidate, candidate + 1)
        logits = found.logits[:, chosen]
        full = self.sam.postprocess_masks(logits, predictor.input_size, size)[0] > self.sam.mask_threshold
        return full.cpu().numpy(), found.scores[0, chosen].cpu().numpy()


def predictor_on(sam: Sam, encoded: Encoded) -> SamPredictor:
    """A predictor of its own on a photo that is encoded already."""
    predictor = SamPredictor(sam)
    predictor.set_encoded(encoded)
    return predictor


class _SharedGenerator(SamAutomaticMaskGenerator):
    """ "Everything" on a photo that is encoded already, batch by batch on the model's thread."""

    def __init__(self, segmenter: Segmenter, photo: Photo, encoding: Encoding) -> None:
        kept = THRESHOLDS.get(segmenter.sam.image_encoder.config.name, {})
        super().__init__(segmenter.sam, output_mode="coco_rle", **EVERYTHING, **kept)
        self.segmenter = segmenter
        shown = replace(encoding.encoded, original_size=photo.preview_size)
        self.predictor = predictor_on(segmenter.sam, shown)
        # the generator sets and forgets the whole image as its only crop: it is set already, and goes with the object
        self.predictor.set_image = lambda *_: None  # type: ignore[method-assign]
        self.predictor.reset_image = lambda: None  # type: ignore[method-assign]

    def _process_batch(self, *args: Any) -> Any:
        return self.segmenter._model.submit(super()._process_batch, *args).result()
