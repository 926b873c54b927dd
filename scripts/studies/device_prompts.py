"""Prompts on many photos at a time, and what is learnt from them; every tensor stays on its device."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from blsam.modeling.sam import Sam
from blsam.training.losses import MASK_LOSSES, mask_iou, supervised_loss
from blsam.training.objective import MULTI, SINGLE, encode_prompts
from blsam.training.prompts import noisy_boxes

SHARPNESS = 0.1  # difference of scores at which one mask is e times as likely to be chosen as another

Points = tuple[torch.Tensor, torch.Tensor]  # coordinates [n, N, 2] as x, y in pixels; labels [n, N]
Prompts = tuple[torch.Tensor, torch.Tensor]  # what SAM's prompt encoder makes of them: [n, T, 256], [n, 256, g, g]


def prompts(
    sam: Sam, points: Points | None = None, boxes: torch.Tensor | None = None, logits: torch.Tensor | None = None
) -> Prompts:
    """As `encode_prompts`, without the places of the embedding."""
    return encode_prompts(sam, points, boxes, logits)[:2]


def joined(one: Prompts, other: Prompts) -> Prompts:
    """One behind the other; both have as many tokens a prompt (a click is padded, as SAM does)."""
    return torch.cat([one[0], other[0]]), torch.cat([one[1], other[1]])


def decode(
    sam: Sam, embedding: torch.Tensor, which: torch.Tensor, given: Prompts
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits [P, 4, 4 g, 4 g] and scores [P, 4] of all mask tokens for prompts on photos which [P] of [B, 256, g, g].

    SAM's own takes the prompts of one photo at a time.
    """
    decoder, (sparse, dense) = sam.mask_decoder, given
    output = torch.cat([decoder.iou_token.weight, decoder.mask_tokens.weight])
    tokens = torch.cat([output.expand(len(sparse), -1, -1), sparse], dim=1)
    with torch.autocast(tokens.device.type, enabled=False):
        places = sam.prompt_encoder.get_dense_pe()
    source = embedding[which] + dense
    answers, source = decoder.transformer(source, places.expand(len(source), -1, -1, -1), tokens)
    fine = decoder.output_upscaling(source.transpose(1, 2).unflatten(2, embedding.shape[-2:]))
    weights = torch.stack([mlp(answers[:, 1 + i]) for i, mlp in enumerate(decoder.output_hypernetworks_mlps)], dim=1)
    return (weights @ fine.flatten(2)).unflatten(2, fine.shape[2:]), decoder.iou_prediction_head(answers[:, 0])


@torch.no_grad()
def clicks(region: torch.Tensor, middle: torch.Tensor) -> torch.Tensor:
    """A place in each region [P, m, m] bool, x and y as shares of the frame [P, 2]: any of them, or one of those that
    are farthest from its edge, where `middle` [P] says so."""
    depth, left = region.float(), region.float()[:, None]
    for radius in (1, 1, 2, 4, 8, 16):  # by boxes
        size = 2 * radius + 1
        left = -F.max_pool2d(F.max_pool2d(-left, (size, 1), 1, (radius, 0)), (1, size), 1, (0, radius))
        depth = depth + left[:, 0]
    level = torch.where(middle[:, None, None], depth, region.float())
    place = (level + 0.9 * torch.rand_like(level) * (level > 0)).flatten(1).argmax(1)
    return torch.stack([place % region.shape[2], place // region.shape[2]], dim=1).add(0.5) / region.shape[2]


@torch.no_grad()
def correction(logits: torch.Tensor, target: torch.Tensor, side: int) -> Points:
    """A click where each mask [P, m, m] is wrong, -1 ("no point") for one that is not."""
    missed, extra = (target > 0.5) & (logits <= 0), (target <= 0.5) & (logits > 0)
    wrong = missed | extra
    where = clicks(wrong, middle=torch.rand(len(wrong), device=wrong.device) < 0.5)
    x, y = (where * target.shape[-1]).long().unbind(1)
    positive = missed[torch.arange(len(wrong), device=wrong.device), y, x].float()
    return where[:, None] * side, torch.where(wrong.any(2).any(1), positive, -1.0)[:, None]


def appended(before: Points | None, new: Points, rows: slice) -> Points:
    """A click more for some of the prompts."""
    points, labels = new[0][rows], new[1][rows]
    return (
        (points, labels) if before is None else (torch.cat([before[0], points], 1), torch.cat([before[1], labels], 1))
    )


def seeded() -> torch.Generator:
    """Another generator on the CPU every time, of torch's own seed."""
    return torch.Generator().manual_seed(int(torch.randint(2**31, ())))


# --- what is learnt --------------------------------------------------------------------------------------------------


def prompted(
    sam: Sam, embedding: torch.Tensor, batch: dict[str, torch.Tensor], corrections: int
) -> dict[str, torch.Tensor]:
    """L_sup of the objects: half begin with a box, half with a click (every other one in the middle); up to so many
    clicks where the most confident mask is wrong follow. {} for fewer than two objects."""
    which, slot = batch["there"].nonzero(as_tuple=True)
    if len(which) < 2:
        return {}
    turn = torch.randperm(len(which), device=which.device)
    which, slot = which[turn], slot[turn]
    target = batch["masks"][which, slot].float() / 255
    side = sam.image_encoder.img_size
    first = len(which) // 2
    boxes = noisy_boxes(batch["boxes"][which[:first], slot[:first]] * side, side, seeded())
    begun = target[first:] > 0.5
    where = clicks(begun, middle=torch.arange(len(begun), device=begun.device) % 2 == 0)
    points = (where[:, None] * side, torch.ones(len(begun), 1, device=begun.device))
    inputs = joined(prompts(sam, boxes=boxes), prompts(sam, points))
    logits, scores = decode(sam, embedding, which, inputs)
    loss = supervised_loss(logits, scores, target, MULTI, "balanced")
    loss = loss + 0.5 * supervised_loss(logits[:first], scores[:first], target[:first], SINGLE, "balanced")
    rows = torch.arange(len(which), device=which.device)
    iou = mask_iou(logits[rows, MULTI.start + scores[:, MULTI].argmax(1)][:, None], target).mean()
    asked, rounds = MULTI, int(torch.randint(corrections + 1, ()))
    after_box, after_click = None, points
    for _ in range(rounds):
        best = asked.start + scores[:, asked].argmax(1)
        previous = logits[rows, best].detach().float()
        new = correction(previous, target, side)
        after_box = appended(after_box, new, slice(0, first))
        after_click = appended(after_click, new, slice(first, None))
        inputs = joined(
            prompts(sam, after_box, boxes, previous[:first, None]),
            prompts(sam, after_click, None, previous[first:, None]),
        )
        logits, scores = decode(sam, embedding, which, inputs)
        asked = MULTI if torch.rand(()) < 0.5 else SINGLE
        loss = loss + supervised_loss(logits, scores, target, asked, "balanced")
    return {"sup": loss / (1.5 + rounds), "iou": iou}


def tuned(sam: Sam, embedding: torch.Tensor, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What the decoder alone learns at last, from one prompt each (ours).

    - A box is not ambiguous: every mask is to be the object, and every score its IoU.
    - Of a click on an object the mask that fits best is learnt, and that it is the one to choose.
    - At random points it learns mask by mask what the teacher draws there, as score the IoU with that, or the teacher's own
      where that is lower. So a click's score says how clear a segment is, which is what everything-mode filters by,
      whatever annotators would call the object.

    {} for fewer than two objects.
    """
    which, slot = batch["there"].nonzero(as_tuple=True)
    if len(which) < 2:
        return {}
    turn = torch.randperm(len(which), device=which.device)
    which, slot = which[turn], slot[turn]
    target, side = batch["masks"][which, slot].float() / 255, sam.image_encoder.img_size
    first, asked = len(which) // 2, batch["asked"].flatten(0, 1)
    boxes = noisy_boxes(batch["boxes"][which[:first], slot[:first]] * side, side, seeded())
    where = clicks(target[first:] > 0.5, middle=torch.arange(len(target) - first, device=target.device) % 2 == 0)
    places = torch.cat([where, asked])[:, None] * side
    points = places, torch.ones(len(places), 1, device=places.device)
    photo = torch.arange(len(embedding), device=which.device).repeat_interleave(batch["asked"].shape[1])
    given = joined(prompts(sam, boxes=boxes), prompts(sam, points))
    logits, scores = (x.float() for x in decode(sam, embedding, torch.cat([which, photo]), given))
    sizes = [first, len(where), len(asked)]
    (of_boxes, of_clicks, of_asked), (box_scores, click_scores, asked_scores) = (
        logits.split(sizes),
        scores.split(sizes),
    )

    every = [slice(token, token + 1) for token in range(MULTI.stop)]
    box = torch.stack([supervised_loss(of_boxes, box_scores, target[:first], one, "balanced") for one in every]).mean()
    fits = MASK_LOSSES["balanced"](of_clicks[:, MULTI], target[first:, None].expand(-1, 3, -1, -1))
    iou = mask_iou(of_clicks[:, MULTI], target[first:])
    choice = F.cross_entropy(click_scores[:, MULTI] / SHARPNESS, iou.argmax(1))
    told = batch["told"].flatten(0, 1).float()
    same = torch.stack([MASK_LOSSES["balanced"](of_asked[:, 1 + i, None], told[:, i, None]) for i in range(3)], 1)
    with torch.no_grad():
        agreed = torch.stack([mask_iou(of_asked[:, 1 + i, None], told[:, i])[:, 0] for i in range(3)], dim=1)
        sure = torch.minimum(agreed, batch["sure"].flatten(0, 1))
    score = F.mse_loss(asked_scores[:, MULTI], sure)
    rows = torch.arange(len(where), device=which.device)
    return {
        "sup": (box + fits.min(1).values.mean() + same.mean()) / 3 + 0.1 * choice + score,
        "box": box.detach(),
        "iou": iou[rows, click_scores[:, MULTI].argmax(1)].mean(),
        "agreed": agreed.mean(),
        "score": score.detach(),
        "choice": (iou.argmax(1) == click_scores[:, MULTI].argmax(1)).float().mean(),
    }
