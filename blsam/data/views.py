"""Augmented views of photos: each a pure function of (seed, epoch, the photo's id), however it is reached.

Photos in files are read in any order (`Views`), tars as streams (`TarViews`). A damaged photo becomes a black view
without weight, so that nobody's place in the order moves; the trainer counts them.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from pycocotools import mask as rle_tools
from torch.utils.data import Dataset, IterableDataset, get_worker_info

from ..images import SUFFIXES
from .sa1b import TarPhoto, TrainingPhoto, hidden, parse

WITHOUT_DOT = tuple(suffix[1:] for suffix in SUFFIXES)
LOW_RES = 4  # pixels of the input along a pixel of the decoder's masks, unless its embedding is finer
SHUFFLED = 100  # photos that are shuffled among each other while a tar streams by
BROKEN = (OSError, ValueError, KeyError, TypeError, IndexError, SyntaxError, MemoryError, cv2.error)


@dataclass(frozen=True)
class Sample:
    """One view of one photo. h, w: its true size in the S x S frame; P: objects.

    image uint8 [3, carried * h, carried * w] (`ViewSettings`); masks float [P, S/low_res, S/low_res], the share of each
    low-resolution pixel that is object; boxes float [P, 4], x1 y1 x2 y2 in pixels of the S x S frame; key, what prompts
    are drawn from; target, the teacher's embedding if it was computed beforehand; damaged, what was wrong with the
    photo, if anything was.
    """

    image: torch.Tensor
    masks: torch.Tensor
    boxes: torch.Tensor
    id: str = ""
    key: int = 0
    target: torch.Tensor | None = None
    damaged: str = ""


@dataclass(frozen=True)
class ViewSettings:
    """Side of the frame in pixels; objects a view, 0: none is decoded; seed; how many different views of a photo
    there are (0: a new one every epoch); where its teacher's embedding comes from, (id, view) -> tensor; `finer`: pixels
    of the teacher's frame along one of this, where the teacher sees more; `low_res`: pixels of the frame along one of
    the masks."""

    image_size: int
    max_objects: int
    seed: int = 0
    views: int = 0
    targets: Callable[[str, int], torch.Tensor] | None = None
    finer: int = 1
    low_res: int = LOW_RES

    @property
    def carried(self) -> int:
        """Pixels of a sample's image along one of the frame: once the teacher has answered nobody needs more than one."""
        return 1 if self.targets else self.finer


def view_key(seed: int, epoch: int, photo: str) -> int:
    """63 bits that everything random about a view is drawn from."""
    digest = hashlib.blake2b(f"{seed}/{epoch}/{photo}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def make_view(photo: str, read: Callable[[], Any], epoch: int, settings: ViewSettings) -> Sample:
    """The view of a photo in an epoch; `read()` gives pixels and annotations."""
    epoch = epoch % settings.views if settings.views else epoch
    key = view_key(settings.seed, epoch, photo)
    try:
        pixels, annotations = read()
        sample = _draw(pixels, annotations if settings.max_objects else [], settings, np.random.default_rng(key))
    except BROKEN as error:
        reason = f"{photo}: {type(error).__name__} {error}".splitlines()[0]
        return damaged(photo, key, settings, reason)
    if settings.targets is None:
        return replace(sample, id=photo, key=key)
    image = F.avg_pool2d(sample.image.float(), settings.finer).round().byte()
    return replace(sample, image=image, id=photo, key=key, target=settings.targets(photo, epoch))


def damaged(photo: str, key: int, settings: ViewSettings, reason: str) -> Sample:
    """A black view without objects."""
    low, side = settings.image_size // settings.low_res, settings.image_size * settings.carried
    black = torch.zeros(3, side, side, dtype=torch.uint8)
    target = torch.zeros_like(settings.targets(photo, 0)) if settings.targets else None
    return Sample(black, torch.zeros(0, low, low), torch.zeros(0, 4), photo, key, target, reason)


# --- augmentation ----------------------------------------------------------------------------------------------------


def _draw(pixels: np.ndarray, annotations: list[dict], settings: ViewSettings, rng: np.random.Generator) -> Sample:
    """Scale 0.7 to 1.8, crop, mirror, colour; a crop without any object is drawn again, ten times at most."""
    h, w = pixels.shape[:2]
    for annotation in annotations:
        if list(annotation["segmentation"]["size"]) != [h, w]:
            raise ValueError(f"a mask of {annotation['segmentation']['size']} on a photo of {[h, w]} (h, w)")
    for _ in range(10):
        sample = _crop(pixels, annotations, settings, rng)
        if len(sample.masks) or not annotations:
            break
    return sample


def _crop(pixels: np.ndarray, annotations: list[dict], settings: ViewSettings, rng: np.random.Generator) -> Sample:
    """Objects are drawn with probability proportional to area ** 0.4, so that small ones do not fill every view."""
    size, (h, w) = settings.image_size, pixels.shape[:2]
    scale = size / max(h, w) * np.exp(rng.uniform(np.log(0.7), np.log(1.8)))
    crop_h, crop_w = min(h, int(size / scale)), min(w, int(size / scale))
    top, left = rng.integers(h - crop_h + 1), rng.integers(w - crop_w + 1)
    window = np.s_[top : top + crop_h, left : left + crop_w]
    mirror = rng.random() < 0.5
    # a multiple of LOW_RES, so that the low-resolution masks lie exactly over the image
    new_h, new_w = (max(1, min(size, round(n * scale)) // LOW_RES) * LOW_RES for n in (crop_h, crop_w))

    shape = (new_w * settings.finer, new_h * settings.finer)
    image = cv2.resize(np.ascontiguousarray(pixels[window]), shape, interpolation=cv2.INTER_LINEAR)
    image = _colour(image[:, ::-1] if mirror else image, rng)
    masks, boxes = [], []
    weight = np.array([max(a["area"], 1) for a in annotations], float) ** 0.4
    order = rng.choice(len(weight), len(weight), replace=False, p=weight / weight.sum()) if annotations else ()
    for i in order:
        full = rle_tools.decode(annotations[i]["segmentation"])[window]
        full = full[:, ::-1] if mirror else full
        if not 0 < full.mean() <= 0.9:  # as SAM's own training leaves out what covers the image
            continue
        if (_low(full, new_w, new_h, LOW_RES) > 0.5).sum() < 2:  # hardly anything to see, and the same at any low_res
            continue
        small = _low(full, new_w, new_h, settings.low_res)
        low = np.zeros((size // settings.low_res,) * 2, np.float32)
        low[: small.shape[0], : small.shape[1]] = small
        ys, xs = np.flatnonzero(full.any(1)), np.flatnonzero(full.any(0))
        box = np.array([xs[0], ys[0], xs[-1] + 1, ys[-1] + 1], np.float32)
        boxes.append(box * np.array([new_w / crop_w, new_h / crop_h] * 2, np.float32))
        masks.append(low)
        if len(masks) == settings.max_objects:
            break
    side = size // settings.low_res
    return Sample(
        torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1))),
        torch.from_numpy(np.stack(masks)) if masks else torch.zeros(0, side, side),
        torch.from_numpy(np.stack(boxes)) if boxes else torch.zeros(0, 4),
    )


def _low(mask: np.ndarray, width: int, height: int, pixels: int) -> np.ndarray:
    """A mask bool [h, w] of so many pixels in the frame -> float32 [height / pixels, width / pixels], shares."""
    return cv2.resize(mask.astype(np.float32), (width // pixels, height // pixels), interpolation=cv2.INTER_AREA)


def _colour(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Contrast, brightness and saturation, each within 20 %."""
    contrast, brightness, saturation = rng.uniform(0.8, 1.2, 3)
    x = image.astype(np.float32)
    grey = x.mean(-1, keepdims=True)
    x = grey + saturation * (x - grey)
    x = contrast * (x - 128) + 128 * brightness
    return x.clip(0, 255).astype(np.uint8)


# --- the order of a run ----------------------------------------------------------------------------------------------


class Views(Dataset):
    """Photos in files: sample number i of a run is place i % n of epoch i // n, in an order drawn for the epoch."""

    def __init__(self, photos: Sequence[TrainingPhoto], settings: ViewSettings) -> None:
        self.photos, self.settings = photos, settings
        self._order: tuple[int, np.ndarray] = (-1, np.empty(0))

    def __getitem__(self, i: int) -> Sample:
        epoch, place = divmod(i, len(self.photos))
        if self._order[0] != epoch:  # drawn once an epoch: the whole of SA-1B takes a second
            self._order = (epoch, np.random.default_rng([self.settings.seed, epoch]).permutation(len(self.photos)))
        photo = self.photos[self._order[1][place]]
        return make_view(photo.id, photo.read, epoch, self.settings)


def batches(
    first: int, steps: int, batch_size: int, accumulate: int, rank: int = 0, world: int = 1
) -> Iterator[list[int]]:
    """The sample numbers of each pass of one process, steps first ... steps - 1.

    Step n is on samples n * batch_size and on; they are cut into `accumulate` passes, each into `world` pieces.
    """
    each = batch_size // (accumulate * world)
    for step in range(first, steps):
        for i in range(accumulate):
            start = step * batch_size + (i * world + rank) * each
            yield list(range(start, start + each))


class TarViews(IterableDataset):
    """Tars read from front to back with webdataset, for ever: the order of the tars is drawn for each epoch, and 100
    photos at a time are shuffled.

    Every reader (process or worker) has tars of its own; `skip` samples of this process are left out, which is how a
    run goes on where it was. The order is a pure function of (seed, epoch) and the number of readers.
    """

    def __init__(
        self, photos: Sequence[TarPhoto], settings: ViewSettings, rank: int, world: int, batch: int, skip: int
    ) -> None:
        self.settings, self.rank, self.world, self.batch, self.skip = settings, rank, world, batch, skip
        self.ids: dict[str, set[str]] = {}
        for photo in photos:
            self.ids.setdefault(str(photo.tar), set()).add(photo.id)

    def __iter__(self) -> Iterator[Sample]:
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        # passes come from the workers in turn: the first one here was not always the first one then
        passes = self.skip // self.batch
        worker = (worker + passes) % workers
        skip = self.batch * (passes // workers + (worker < passes % workers))
        epoch = 0
        while True:
            tars = sorted(self.ids)
            random.Random(f"{self.settings.seed} {epoch}").shuffle(tars)
            for tar in tars[self.rank * workers + worker :: self.world * workers]:
                if skip >= len(self.ids[tar]):  # each gives exactly as many as were chosen from it
                    skip -= len(self.ids[tar])
                    continue
                for photo, read in self._stream(tar, epoch):
                    if skip:
                        skip -= 1
                        continue
                    yield make_view(photo, read, epoch, self.settings)
            epoch += 1

    def _stream(self, tar: str, epoch: int) -> Iterator[tuple[str, Callable[[], Any]]]:
        """The chosen photos of a tar; those that could not be got out of it come last, to be found damaged."""
        import webdataset as wds

        wanted = set(self.ids[tar])
        errors: list[Exception] = []

        def note(error: Exception) -> bool:
            errors.append(error)
            return True

        pipeline = wds.DataPipeline(
            wds.SimpleShardList([tar]),
            wds.tarfile_to_samples(handler=note, select_files=lambda name: not hidden(name)),
            wds.shuffle(SHUFFLED, initial=SHUFFLED, rng=random.Random(f"{self.settings.seed} {epoch} {tar}")),
        )
        for sample in pipeline:
            photo = sample["__key__"].rpartition("/")[2]
            image = next((sample[s] for s in WITHOUT_DOT if s in sample), None)
            if photo in wanted and image is not None and "json" in sample:
                wanted.remove(photo)
                yield photo, partial(parse, image, sample["json"])

        def lost() -> None:
            raise OSError(f"not to be read from {tar}" + (f" ({errors[0]})" if errors else ""))

        for photo in sorted(wanted):
            yield photo, lost
