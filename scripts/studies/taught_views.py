"""Views with what a teacher says of them: its embedding, objects that it finds, what it draws at random points."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from blsam.modeling.sam import Sam
from blsam.training.objective import MULTI

from .device_prompts import clicks, decode, prompts
from .device_views import (
    Objects,
    Photos,
    Zoom,
    chosen_objects,
    draw_windows,
    images_of,
    mosaics,
    objects_of,
    reached,
    shuffled,
    take,
)

POINTS, ASKED = 16, 3  # of a view that the teacher is asked at for objects of its own, and for what it draws there
Order = tuple[np.ndarray, Iterator[int]]


@dataclass
class Made:
    """What views are made with: photos of training, the teacher (encoder, and a copy of the decoder that reads it), the
    student, sides of the frame, shares."""

    photos: Photos
    teacher: nn.Module
    reader: Sam
    sam: Sam
    finer: int
    mosaic: float
    unlabelled: float
    objects: int
    zoom: Zoom

    @property
    def side(self) -> int:
        """Of the student's frame, in pixels."""
        return self.sam.image_encoder.img_size

    @property
    def grid(self) -> int:
        """Cells along the student's embedding."""
        return self.sam.prompt_encoder.image_embedding_size[0]


def fused(teacher: nn.Module) -> nn.Module:
    """MobileSAM's convolutions with the norms that follow them as one."""
    for module in teacher.modules():
        for name, child in module.named_children():
            if callable(getattr(child, "fuse", None)):
                setattr(module, name, child.fuse().requires_grad_(False))
    return teacher


def orders(photos: Photos, rng: np.random.Generator) -> list[Order]:
    """Endless orders of all photos, of those with masks and of those without."""
    labelled = np.diff(photos.first) > 0
    every, with_masks, without = (np.flatnonzero(x) for x in (labelled | True, labelled, ~labelled))
    return [(which, shuffled(len(which), rng)) for which in (every, with_masks, without)]


@torch.no_grad()
def views(made: Made, order: list[Order], count: int, rng: np.random.Generator, phase: str) -> dict[str, torch.Tensor]:
    """So many new views: image half [3, S, S], real bool [g, g], target half [256, g, g]; after the first phase their
    objects, for the last what the teacher says at random points."""
    masks = phase != "encoder"
    many = 0 if masks else round(made.mosaic * count)
    if masks and len(order[1][0]) and len(order[2][0]):
        without = int(rng.binomial(count, made.unlabelled))
        chosen = np.concatenate([following(order[1], count - without), following(order[2], without)])
    else:
        chosen = following(order[0], count - many)
    windows = draw_windows(made.photos, chosen, made.zoom, rng)
    side, mean, std = made.finer * made.side, made.sam.pixel_mean, made.sam.pixel_std
    frames, shown = images_of(made.photos, windows, side, rng, mean, std), windows.shown
    if many:
        tiles = draw_windows(made.photos, following(order[0], 4 * many), made.zoom, rng, cover=True)
        frames = torch.cat([frames, mosaics(images_of(made.photos, tiles, side // 2, rng, mean, std))])
        shown = torch.cat([shown, torch.ones_like(shown[:1]).expand(many, -1)])
    found = seen(made, frames, shown)
    if masks:
        objects = objects_of(made.photos, windows, 4 * made.grid, made.objects, rng)
        blank = ~torch.from_numpy(np.diff(made.photos.first)[chosen] > 0).to(frames.device)
        if blank.any():
            own = teachers_objects(made, found["target"][blank].float(), shown[blank])
            for name, values in vars(own).items():
                getattr(objects, name)[blank] = values
        found |= vars(objects)
    if phase == "decoder":
        found |= answers(made, found["target"].float(), shown)
    return found


def following(order: list[Order], count: int) -> np.ndarray:
    """The next numbers of photos of an endless order."""
    return order[0][take(order[1], count)]


@torch.no_grad()
def seen(made: Made, frames: torch.Tensor, shown: torch.Tensor) -> dict[str, torch.Tensor]:
    """Frames as the student gets them, and what the teacher says."""
    target = []
    with torch.autocast(frames.device.type, torch.bfloat16):
        for piece in frames.split(64):
            target.append(made.teacher(piece.contiguous(memory_format=torch.channels_last)).float())
    answer = torch.cat(target)
    answer = F.avg_pool2d(answer, answer.shape[-1] // made.grid)
    image = F.avg_pool2d(frames, made.finer)
    return {"image": image.half(), "real": reached(shown, made.grid), "target": answer.half()}


@torch.no_grad()
def answers(made: Made, target: torch.Tensor, shown: torch.Tensor) -> dict[str, torch.Tensor]:
    """What the teacher says at random points: asked [n, Q, 2], x and y as shares of the frame, told bool [n, Q, 3, m, m]
    and its scores, sure [n, Q, 3]."""
    place = torch.rand(len(target), ASKED, 2, device=target.device) * shown.flip(1)[:, None]
    logits, scores = told_by(made, target, place)
    shape = len(target), ASKED
    return {"asked": place, "told": (logits > 0).unflatten(0, shape), "sure": scores.unflatten(0, shape)}


def told_by(made: Made, target: torch.Tensor, place: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The teacher's three masks and scores at each place [n, Q, 2] of its embeddings [n, 256, g, g]."""
    points = place.flatten(0, 1)[:, None] * made.side
    which = torch.arange(len(target), device=target.device).repeat_interleave(place.shape[1])
    with torch.autocast(target.device.type, torch.bfloat16):
        given = prompts(made.reader, (points, torch.ones(len(points), 1, device=points.device)))
        logits, scores = decode(made.reader, target, which, given)
    return logits[:, MULTI].float(), scores[:, MULTI].float()


@torch.no_grad()
def teachers_objects(made: Made, target: torch.Tensor, shown: torch.Tensor) -> Objects:
    """Objects that the teacher finds at random points: sure and stable masks that do not cover everything."""
    count = len(target)
    points = max(POINTS, 2 * made.objects)
    place = torch.rand(count, points, 2, device=target.device) * shown.flip(1)[:, None]
    logits, scores = told_by(made, target, place)
    best = scores.argmax(1)
    rows = torch.arange(len(best), device=best.device)
    mask, score = logits[rows, best], scores[rows, best]
    stable = (mask > 1).sum((1, 2)) / (mask > -1).sum((1, 2)).clamp(min=1)
    hit = (mask > 0).float().unflatten(0, (count, points))
    part = hit.mean((2, 3)) / shown.prod(1)[:, None]
    good = (score > 0.85) & (stable > 0.85)
    return chosen_objects(hit, good.view(count, points) & (part < 0.7), made.objects, hit.shape[-1])


def validation_views(made: Made, photos: Photos) -> list[dict[str, torch.Tensor]]:
    """Photos held out, each whole, in its own colours, with its teacher's embedding and objects."""
    rng, found = np.random.default_rng(0), []
    for some in np.array_split(np.arange(len(photos.sizes)), max(1, len(photos.sizes) // 16)):
        windows = draw_windows(photos, some, Zoom(fitted=1.0), rng, mirror=False)
        side = made.finer * made.side
        frames = images_of(photos, windows, side, None, made.sam.pixel_mean, made.sam.pixel_std)
        objects = objects_of(photos, windows, 4 * made.grid, made.objects, rng)
        region = objects.masks.flatten(0, 1) > 127
        middle = clicks(region, middle=torch.ones(len(region), dtype=torch.bool, device=region.device))
        found.append(
            seen(made, frames, windows.shown) | vars(objects) | {"middle": middle.unflatten(0, objects.there.shape)}
        )
    return found
