"""Photos held in a device's memory, and augmented views of them cut there: hundreds a second without a reader.

The trainer's views (`blsam.data.views`) are functions of a key and made by readers on the CPU, which feed any model on
any machine; a small encoder on a large GPU outruns them. Here a few thousand photos lie on the device, and a view is
one bilinear sampling of them.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import get_context

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from pycocotools import mask as rle_tools

from blsam.data.sa1b import TrainingPhoto
from blsam.data.views import BROKEN

CANVAS = 512  # pixels of the square that a photo lies in, at its top left; larger ones are made smaller


@dataclass
class Photos:
    """pixels uint8 [N, 3, CANVAS, CANVAS] on the device, edges repeated to the right and below; sizes [N, 2], (h, w);
    masks uint8 [M, CANVAS * CANVAS / 8] on the device, packed; areas [M]; those of photo i are first[i] ... first[i+1]."""

    pixels: torch.Tensor
    sizes: np.ndarray
    masks: torch.Tensor
    areas: np.ndarray
    first: np.ndarray

    def to(self, device: torch.device) -> Photos:
        """The same with its tensors on a device."""
        return replace(self, pixels=self.pixels.to(device), masks=self.masks.to(device))

    def masks_of(self, photo: int) -> np.ndarray:
        """Numbers of its masks."""
        return np.arange(self.first[photo], self.first[photo + 1])


def read_photos(photos: Sequence[TrainingPhoto], readers: int) -> Photos:
    """All but damaged ones, which are named, in memory; read in so many processes, or with one in this."""
    if readers > 1:  # begun afresh: a copy of a process that has threads may wait for ever
        with ProcessPoolExecutor(readers, get_context("spawn")) as pool:
            tried = list(pool.map(_tried, photos, chunksize=8))
    else:
        tried = list(map(_tried, photos))
    found = [one for one in tried if not isinstance(one, str)]
    for reason in (one for one in tried if isinstance(one, str)):
        print(f"left out: {reason}", file=sys.stderr)
    if not found:
        raise ValueError("no photo can be read")
    pixels = torch.empty(len(found), 3, CANVAS, CANVAS, dtype=torch.uint8)
    for i, (image, _, _) in enumerate(found):
        pixels[i] = torch.from_numpy(image).permute(2, 0, 1)
    counts = [len(masks) for _, _, masks in found]
    packed = [mask for _, _, masks in found for mask in masks]
    rows = np.stack(packed) if packed else np.zeros((0, CANVAS * CANVAS // 8), np.uint8)
    ones = np.array([bin(i).count("1") for i in range(256)], np.uint16)
    areas = np.array([ones[row].sum(dtype=np.int64) for row in rows], np.int64)
    sizes = np.array([size for _, size, _ in found])
    return Photos(pixels, sizes, torch.from_numpy(rows), areas, np.cumsum([0, *counts]))


def _tried(photo: TrainingPhoto) -> tuple[np.ndarray, tuple[int, int], list[np.ndarray]] | str:
    """As `_read`, or what is wrong with it."""
    try:
        return _read(photo)
    except BROKEN as error:
        return f"{photo.id}: {type(error).__name__} {error}".splitlines()[0]


def _read(photo: TrainingPhoto) -> tuple[np.ndarray, tuple[int, int], list[np.ndarray]]:
    """The canvas uint8 [CANVAS, CANVAS, 3], (h, w) on it, packed masks."""
    cv2.setNumThreads(1)
    pixels, annotations = photo.read()
    scale = min(1.0, CANVAS / max(pixels.shape[:2]))
    h, w = (max(1, round(n * scale)) for n in pixels.shape[:2])
    if scale < 1:
        pixels = cv2.resize(pixels, (w, h), interpolation=cv2.INTER_AREA)
    masks = []
    for annotation in annotations:
        mask = rle_tools.decode(annotation["segmentation"])
        if scale < 1:
            mask = (cv2.resize(mask.astype(np.float32), (w, h), interpolation=cv2.INTER_AREA) > 0.5).astype(np.uint8)
        masks.append(np.packbits(np.pad(mask, ((0, CANVAS - h), (0, CANVAS - w)))))
    return np.pad(pixels, ((0, CANVAS - h), (0, CANVAS - w), (0, 0)), mode="edge"), (h, w), masks


# --- windows ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Zoom:
    """Scales of a view: 1 fits the photo's long side into the frame, as a predictor does. `fitted`: share of the views
    at exactly 1; the others are drawn between `least` and `most`, evenly in logarithms."""

    least: float = 0.7
    most: float = 2.0
    fitted: float = 0.4


@dataclass
class Windows:
    """What n tiles show of their photos, on the device: photo [n]; theta [n, 2, 3], as `affine_grid` takes it from a
    tile to the canvas; shown [n, 2], (h, w) of what is not padding, as shares of the tile."""

    photo: torch.Tensor
    theta: torch.Tensor
    shown: torch.Tensor


def draw_windows(
    photos: Photos,
    chosen: np.ndarray,
    zoom: Zoom,
    rng: np.random.Generator,
    *,
    cover: bool = False,
    mirror: bool = True,
) -> Windows:
    """A window of each chosen photo [n]; cover: none of the tile is padding."""
    h, w = photos.sizes[chosen].T.astype(float)
    factor = np.exp(rng.uniform(np.log(zoom.least), np.log(zoom.most), len(chosen)))
    factor = np.where(rng.random(len(chosen)) < zoom.fitted, 1.0, factor)
    scale = factor / np.maximum(h, w)  # of the tile's side a pixel
    if cover:
        scale = np.maximum(scale, 1 / np.minimum(h, w))
    shown = np.stack([np.minimum(h * scale, 1), np.minimum(w * scale, 1)], axis=1)
    flip = (rng.random(len(chosen)) < 0.5) & mirror
    theta = np.zeros((len(chosen), 2, 3))
    for row, axis, length in ((0, 1, w), (1, 0, h)):  # theta gives x first
        first = rng.uniform(0, 1, len(chosen)) * (length - shown[:, axis] / scale)
        across = 1 / (scale * CANVAS)  # the tile in canvases
        turned = flip & (row == 0)
        start = np.where(turned, first + shown[:, axis] / scale, first)
        theta[:, row, row] = np.where(turned, -across, across)
        theta[:, row, 2] = 2 * start / CANVAS + theta[:, row, row] - 1
    device = photos.pixels.device
    return Windows(torch.from_numpy(chosen).to(device), torch.from_numpy(theta).float().to(device), _to(shown, device))


def _to(values: np.ndarray, device: torch.device) -> torch.Tensor:
    return torch.from_numpy(values).float().to(device)


def cut(source: torch.Tensor, theta: torch.Tensor, shown: torch.Tensor, side: int) -> torch.Tensor:
    """Tiles [n, C, side, side] of canvases [n, C, CANVAS, CANVAS] float, 0 where nothing is shown."""
    grid = F.affine_grid(theta, [len(theta), source.shape[1], side, side], align_corners=False)
    tiles = F.grid_sample(source, grid, padding_mode="border", align_corners=False)
    return tiles * inside(shown, side)[:, None]


def inside(shown: torch.Tensor, side: int) -> torch.Tensor:
    """Which cells of tiles are not padding at their centres: shown [n, 2] -> bool [n, side, side]."""
    place = (torch.arange(side, device=shown.device) + 0.5) / side
    down, across = (place < shown[:, i, None] for i in (0, 1))
    return down[:, :, None] & across[:, None, :]


def reached(shown: torch.Tensor, side: int) -> torch.Tensor:
    """Which cells of tiles have any pixel that is not padding: as `inside`."""
    place = torch.arange(side, device=shown.device) / side
    down, across = (place < shown[:, i, None] - 1e-4 for i in (0, 1))
    return down[:, :, None] & across[:, None, :]


# --- views -----------------------------------------------------------------------------------------------------------


def images_of(
    photos: Photos, windows: Windows, side: int, rng: np.random.Generator | None, mean: torch.Tensor, std: torch.Tensor
) -> torch.Tensor:
    """Normalised tiles [n, 3, side, side]; with an rng contrast, brightness and saturation move by up to 25 %."""
    source = photos.pixels[windows.photo].float()
    if rng is not None:
        moves = _to(rng.uniform(0.75, 1.25, (3, len(source), 1, 1, 1)), source.device)
        grey = source.mean(1, keepdim=True)
        source = (grey + moves[0] * (source - grey) - 128) * moves[1] + 128 * moves[2]
        source = source.clamp(0, 255)
    return cut((source - mean) / std, windows.theta, windows.shown, side)


def mosaics(tiles: torch.Tensor) -> torch.Tensor:
    """Tiles [4 n, C, T, T] -> [n, C, 2 T, 2 T]."""
    four = tiles.unflatten(0, (-1, 2, 2)).permute(0, 3, 1, 4, 2, 5)  # [n, 2, 2, C, T, T] -> [n, C, 2, T, 2, T]
    return four.flatten(4, 5).flatten(2, 3)


@dataclass
class Objects:
    """masks uint8 [n, K, m, m], 255 times the share that is object; boxes [n, K, 4], x1 y1 x2 y2 as shares of the
    frame; there bool [n, K], whether a place holds one."""

    masks: torch.Tensor
    boxes: torch.Tensor
    there: torch.Tensor


def objects_of(photos: Photos, windows: Windows, side: int, most: int, rng: np.random.Generator) -> Objects:
    """Up to `most` annotated objects of each view, drawn with probability proportional to area ** 0.4; masks of
    `side` cells. Left out: what hardly shows, and what covers nine tenths and more."""
    picked = np.full((len(windows.photo), 2 * most), -1)
    for row, photo in zip(picked, windows.photo.tolist()):
        numbers = photos.masks_of(photo)
        if count := min(len(row), len(numbers)):
            weight = np.maximum(photos.areas[numbers], 1) ** 0.4
            row[:count] = rng.choice(numbers, count, replace=False, p=weight / weight.sum())
    device = photos.masks.device
    number = torch.from_numpy(picked).to(device)
    if not len(photos.masks):
        return chosen_objects(torch.zeros(*picked.shape, side, side, device=device), number >= 0, most, side)
    full = unpacked(photos.masks[number.clamp(min=0).flatten()])[:, None]
    theta, shown = (t.repeat_interleave(2 * most, 0) for t in (windows.theta, windows.shown))
    fine = cut(full, theta, shown, 2 * side)[:, 0]
    fine = fine.unflatten(0, picked.shape) * (number >= 0)[:, :, None, None]
    part = fine.mean((2, 3)) / windows.shown.prod(1)[:, None]
    return chosen_objects(fine, (part > 0) & (part < 0.9), most, side)


def unpacked(rows: torch.Tensor) -> torch.Tensor:
    """Packed masks [n, CANVAS * CANVAS / 8] -> float [n, CANVAS, CANVAS]."""
    bits = torch.arange(7, -1, -1, device=rows.device, dtype=torch.uint8)
    return ((rows[..., None] >> bits) & 1).float().view(-1, CANVAS, CANVAS)


def chosen_objects(fine: torch.Tensor, good: torch.Tensor, most: int, side: int) -> Objects:
    """The first `most` good ones of each view: masks [n, L, s, s], s a multiple of `side`, good [n, L].

    Boxes are those of the masks as they come; an object of less than two cells is none.
    """
    masks, boxes = F.avg_pool2d(fine, fine.shape[-1] // side), boxes_of(fine > 0.5)
    good = good & ((masks > 0.5).sum((2, 3)) >= 2)
    order = (~good).to(torch.uint8).argsort(dim=1, stable=True)[:, :most]
    rows = torch.arange(len(fine), device=fine.device)[:, None]
    return Objects((masks[rows, order] * 255).round().byte(), boxes[rows, order], good[rows, order])


def boxes_of(hit: torch.Tensor) -> torch.Tensor:
    """Boxes of masks bool [..., s, s], x1 y1 x2 y2 as shares of the side; of an empty one x2 < x1."""
    side, found = hit.shape[-1], []
    place = torch.arange(side, device=hit.device)
    for line in (hit.any(-2), hit.any(-1)):  # columns, then rows
        first = torch.where(line, place, side).amin(-1)
        last = torch.where(line, place, -1).amax(-1) + 1
        found.append((first, last))
    (x1, x2), (y1, y2) = found
    return torch.stack([x1, y1, x2, y2], dim=-1) / side


class Ring:
    """Views that were made already, with their teacher's embeddings: the newest take the place of the oldest."""

    def __init__(self, capacity: int) -> None:
        self.capacity, self.added = capacity, 0
        self.held: dict[str, torch.Tensor] = {}

    def add(self, found: dict[str, torch.Tensor]) -> None:
        """Tensors of equal length."""
        count = len(next(iter(found.values())))
        for name, values in found.items():
            if name not in self.held:
                self.held[name] = values.new_empty(self.capacity, *values.shape[1:])
            places = (torch.arange(count, device=values.device) + self.added) % self.capacity
            self.held[name][places] = values
        self.added += count

    def draw(self, count: int, fresh: int) -> dict[str, torch.Tensor]:
        """The newest `fresh` of them and others at random, `count` together."""
        size = min(self.added, self.capacity)
        device = next(iter(self.held.values())).device
        newest = (self.added - 1 - torch.arange(min(fresh, count), device=device)) % self.capacity
        others = torch.randint(size, (count - len(newest),), device=device)
        places = torch.cat([newest, others])
        return {name: values[places] for name, values in self.held.items()}


def shuffled(count: int, rng: np.random.Generator) -> Iterator[int]:
    """Numbers below `count`, each once in an order of its own, for ever."""
    while True:
        yield from rng.permutation(count)


def take(numbers: Iterator[int], count: int) -> np.ndarray:
    """The next of them."""
    return np.fromiter((next(numbers) for _ in range(count)), int, count)
