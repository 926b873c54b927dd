"""Photos with masks in SA-1B's layout: `NAME.jpg` beside `NAME.json`, masks as compressed RLE."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import torch
from PIL import Image
from pycocotools import mask as rle_tools
from torch.utils.data import Dataset

LOW_RES = 4  # pixels of the input along a pixel of the decoder's masks
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png")


def list_photos(folders: Iterable[str | Path]) -> list[Path]:
    """The photos of the folders that have a json beside them, in the order of their names.

    FileNotFoundError for a folder that is missing or has none.
    """
    photos = []
    for folder in map(Path, folders):
        if not folder.is_dir():
            raise FileNotFoundError(f"no folder {folder}")
        found = sorted(p for p in folder.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES)
        found = [p for p in found if p.with_suffix(".json").is_file()]
        if not found:
            raise FileNotFoundError(f"{folder} has no photo with a .json beside it (SA-1B's layout)")
        photos += found
    return photos


def split_photos(photos: list[Path], holdout: float, seed: int) -> tuple[list[Path], list[Path]]:
    """(training, validation): a seeded share `holdout` of the photos is kept for validation."""
    order = np.random.default_rng(seed).permutation(len(photos))
    count = round(holdout * len(photos))
    return [photos[i] for i in sorted(order[count:])], [photos[i] for i in sorted(order[:count])]


def read_photo(path: Path) -> tuple[np.ndarray, list[dict]]:
    """The photo, uint8 [h, w, 3] RGB, and its annotations as they stand in the json."""
    with Image.open(path) as image:
        pixels = np.asarray(image.convert("RGB"))
    return pixels, json.loads(path.with_suffix(".json").read_text())["annotations"]


@dataclass(frozen=True)
class Sample:
    """One view of one photo. h, w: its true size in the S x S frame; P: objects.

    image uint8 [3, h, w]; masks float [P, S/4, S/4], the share of each low-resolution pixel that is object;
    boxes float [P, 4], x1 y1 x2 y2 in pixels of the S x S frame.
    """

    image: torch.Tensor
    masks: torch.Tensor
    boxes: torch.Tensor


class TrainingViews(Dataset):
    """Augmented views, `length` of them; number i is a pure function of (seed, i), whatever ran before.

    Every photo is seen once an epoch, in an order drawn for the epoch. Augmentation: scale 0.7 to 1.8, crop, mirror,
    colour. Objects are drawn with probability proportional to area ** 0.4, so that small ones do not fill every view;
    with max_objects 0 none is decoded.
    """

    def __init__(self, photos: list[Path], image_size: int, max_objects: int, seed: int, length: int) -> None:
        self.photos, self.size, self.max_objects = photos, image_size, max_objects
        self.seed, self.length = seed, length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, i: int) -> Sample:
        epoch, place = divmod(i, len(self.photos))
        order = np.random.default_rng([self.seed, epoch]).permutation(len(self.photos))
        rng = np.random.default_rng([self.seed, 1, i])
        pixels, annotations = read_photo(self.photos[order[place]])
        for _ in range(10):  # a crop without any object is drawn again
            sample = self._view(pixels, annotations if self.max_objects else [], rng)
            if len(sample.masks) or not self.max_objects:
                break
        return sample

    def _view(self, pixels: np.ndarray, annotations: list[dict], rng: np.random.Generator) -> Sample:
        h, w = pixels.shape[:2]
        scale = self.size / max(h, w) * np.exp(rng.uniform(np.log(0.7), np.log(1.8)))
        crop_h, crop_w = min(h, int(self.size / scale)), min(w, int(self.size / scale))
        top, left = rng.integers(h - crop_h + 1), rng.integers(w - crop_w + 1)
        window = np.s_[top : top + crop_h, left : left + crop_w]
        mirror = rng.random() < 0.5
        # a multiple of LOW_RES, so that the low-resolution masks lie exactly over the image
        new_h, new_w = (max(1, min(self.size, round(n * scale)) // LOW_RES) * LOW_RES for n in (crop_h, crop_w))

        image = cv2.resize(np.ascontiguousarray(pixels[window]), (new_w, new_h), interpolation=cv2.INTER_LINEAR)
        image = _colour(image[:, ::-1] if mirror else image, rng)
        masks, boxes = [], []
        weight = np.array([max(a["area"], 1) for a in annotations], float) ** 0.4
        order = rng.choice(len(weight), len(weight), replace=False, p=weight / weight.sum()) if annotations else ()
        for i in order:
            full = rle_tools.decode(annotations[i]["segmentation"])[window]
            full = full[:, ::-1] if mirror else full
            if not 0 < full.mean() <= 0.9:  # as SAM's own training leaves out what covers the image
                continue
            low = np.zeros((self.size // LOW_RES,) * 2, np.float32)
            small = cv2.resize(
                full.astype(np.float32), (new_w // LOW_RES, new_h // LOW_RES), interpolation=cv2.INTER_AREA
            )
            low[: small.shape[0], : small.shape[1]] = small
            if (low > 0.5).sum() < 2:  # nothing left to learn from at this resolution
                continue
            ys, xs = np.flatnonzero(full.any(1)), np.flatnonzero(full.any(0))
            box = np.array([xs[0], ys[0], xs[-1] + 1, ys[-1] + 1], np.float32)
            boxes.append(box * np.array([new_w / crop_w, new_h / crop_h] * 2, np.float32))
            masks.append(low)
            if len(masks) == self.max_objects:
                break
        side = self.size // LOW_RES
        return Sample(
            torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1))),
            torch.from_numpy(np.stack(masks)) if masks else torch.zeros(0, side, side),
            torch.from_numpy(np.stack(boxes)) if boxes else torch.zeros(0, 4),
        )


def _colour(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Contrast, brightness and saturation, each within 20 %."""
    contrast, brightness, saturation = rng.uniform(0.8, 1.2, 3)
    x = image.astype(np.float32)
    grey = x.mean(-1, keepdims=True)
    x = grey + saturation * (x - grey)
    x = contrast * (x - 128) + 128 * brightness
    return x.clip(0, 255).astype(np.uint8)
