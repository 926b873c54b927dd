"""Prompts in the training loop: first a box or a click, then clicks where the mask is wrong."""

from __future__ import annotations

import torch
from torchvision.ops import masks_to_boxes

from ..data.views import LOW_RES

Points = tuple[torch.Tensor, torch.Tensor]  # coordinates [P, n, 2] as x, y in pixels; labels [P, n], 1 or 0


def noisy_boxes(boxes: torch.Tensor, image_size: int, generator: torch.Generator) -> torch.Tensor:
    """Boxes [P, 4] moved by normal noise, std 10 % of the side, at most 20 px at 1024 (SAM, appendix A)."""
    sides = (boxes[:, 2:] - boxes[:, :2]).repeat(1, 2)
    noise = torch.randn(boxes.shape, generator=generator).to(boxes) * 0.1 * sides
    limit = 20 * image_size / 1024
    moved = boxes + noise.clamp(-limit, limit)
    # noise must not turn a thin box inside out
    first, second = torch.minimum(moved[:, :2], moved[:, 2:]), torch.maximum(moved[:, :2], moved[:, 2:])
    return torch.cat([first, second], dim=1)


def boxes_of(masks: torch.Tensor, pixels: int) -> torch.Tensor:
    """The box x1 y1 x2 y2 around each mask [P, h, w] bool whose cells have so many pixels a side: [P, 4] in pixels. Of an
    empty mask all of it."""
    boxes = masks_to_boxes(masks | ~masks.any((1, 2), keepdim=True))
    boxes[:, 2:] += 1  # they name the last cell
    return boxes * pixels


def random_clicks(region: torch.Tensor, generator: torch.Generator, pixels: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A uniform place in each region [P, h, w] bool, whose cells have so many pixels a side: (coordinates [P, 1, 2] in
    pixels, found [P] bool)."""
    flat = region.flatten(1).float().cpu()
    found = flat.sum(1) > 0
    place = torch.multinomial(flat + (~found)[:, None], 1, generator=generator)  # an empty region: anywhere, unused
    y, x = place // region.shape[2], place % region.shape[2]
    coordinates = (torch.cat([x, y], dim=1) + 0.5) * pixels
    return coordinates[:, None].to(region.device), found.to(region.device)


def first_clicks(target: torch.Tensor, generator: torch.Generator, pixels: int = LOW_RES) -> Points:
    """One positive click in each object, target [P, h, w]."""
    coordinates, _ = random_clicks(target > 0.5, generator, pixels)
    return coordinates, torch.ones(len(target), 1, device=target.device)


def corrective_clicks(
    logits: torch.Tensor, target: torch.Tensor, generator: torch.Generator, pixels: int = LOW_RES
) -> Points:
    """One click in the region where each mask [P, h, w] is wrong: positive where the object was missed.

    A mask without an error gets label -1, which the prompt encoder takes as "no point".
    """
    missed, extra = (target > 0.5) & (logits <= 0), (target <= 0.5) & (logits > 0)
    coordinates, found = random_clicks(missed | extra, generator, pixels)
    x, y = (coordinates[:, 0] // pixels).long().unbind(1)
    positive = missed[torch.arange(len(target), device=target.device), y, x]
    return coordinates, torch.where(found, positive.float(), -1.0)[:, None]
