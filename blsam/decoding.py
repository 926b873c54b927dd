"""Many prompts on the photo that a predictor holds, decoded together; only the masks that are chosen are upscaled,
and of many points only those that the decoder is sure of are made at all.

Works on any predictor with SAM's interface (`model`, `features`, `transform`, `input_size`, `original_size`), so that
others are measured in the same way; a decoder that is not SAM's as released is called as it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from .modeling.mask_decoder import decode_photo, take_apart
from .precision import products_in

CHUNK = 32  # prompts decoded at a time, which bounds the memory


@dataclass(frozen=True)
class Candidates:
    """Masks of P prompts: logits [P, M, h, w] at low resolution and scores [P, M], M 3 or 1, as SAM's decoder gives."""

    logits: torch.Tensor
    scores: torch.Tensor


@torch.no_grad()
def decode(
    predictor: Any,
    *,
    points: Sequence[Sequence[tuple[float, float, int]]] | None = None,
    boxes: Sequence[tuple[float, float, float, float]] | None = None,
    logits: torch.Tensor | None = None,
    three: bool = True,
    dtype: torch.dtype = torch.float32,
) -> Candidates:
    """Masks of P prompts: each the same number of points (x, y, label), or a box x1 y1 x2 y2, in pixels of the photo.

    logits: [P, 1, h, w] of an earlier round, given back with the prompts. three: three candidates or the single mask.
    dtype: what the decoder multiplies in; the results are float32.
    """
    prompts = points if boxes is None else boxes
    if prompts is None:
        raise ValueError("decode needs points or boxes")
    model, device = predictor.model, predictor.features.device
    coords = labels = corners = None
    if points is not None:
        given = torch.tensor(points, dtype=torch.float32, device=device)  # [P, N, 3]
        coords, labels = predictor.transform.apply_coords_torch(given[..., :2], predictor.original_size), given[..., 2]
    if boxes is not None:
        given = torch.tensor(boxes, dtype=torch.float32, device=device)
        corners = predictor.transform.apply_boxes_torch(given, predictor.original_size)
    found_logits, found_scores, positions = [], [], model.prompt_encoder.get_dense_pe()
    for start in range(0, len(prompts), CHUNK):
        part = slice(start, start + CHUNK)
        sparse, dense = model.prompt_encoder(
            points=None if coords is None or labels is None else (coords[part], labels[part]),
            boxes=None if corners is None else corners[part],
            masks=None if logits is None else logits[part],
        )
        with products_in(dtype, device):  # not the prompt encoder: points in bfloat16 would move
            low, scores = decode_photo(model.mask_decoder, predictor.features, positions, sparse, dense, three)
        found_logits.append(low.float())  # under autocast they are not
        found_scores.append(scores.float())
    return Candidates(torch.cat(found_logits), torch.cat(found_scores))


@dataclass(frozen=True)
class Confident:
    """Masks that the decoder is sure of: logits [K, h, w] at low resolution, scores [K], prompts [K] int64, rising:
    which prompt each belongs to."""

    logits: torch.Tensor
    scores: torch.Tensor
    prompts: torch.Tensor


@torch.no_grad()
def confident(
    predictor: Any, points: np.ndarray, threshold: float | None, dtype: torch.dtype = torch.float32
) -> Confident:
    """Of three candidate masks for each point [P, 2] (x, y in pixels of the photo) those with a predicted IoU above the
    threshold; None: all. Others are not made, where the decoder is SAM's as released. dtype: what the decoder multiplies
    in."""
    model, features = predictor.model, predictor.features
    given = torch.tensor(points, dtype=torch.float32, device=features.device)[:, None]  # [P, 1, 2]
    coords = predictor.transform.apply_coords_torch(given, predictor.original_size)
    sparse, dense = model.prompt_encoder((coords, torch.ones_like(coords[..., 0])), None, None)
    photo = take_apart(model.mask_decoder, features, model.prompt_encoder.get_dense_pe(), sparse, dense)
    if photo is None:
        every = decode(predictor, points=[[(float(x), float(y), 1)] for x, y in points], dtype=dtype)
        prompts, candidates = _above(every.scores, threshold)
        return Confident(every.logits[prompts, candidates], every.scores[prompts, candidates], prompts)
    found = []
    with products_in(dtype, features.device):
        for part in photo.parts(len(points)):
            some = photo.prompted(sparse, part)
            scores = some.scores.float()  # under autocast they are not
            prompts, candidates = _above(scores, threshold)
            logits = photo.masks(some, prompts, candidates).float()
            found.append((logits, scores[prompts, candidates], prompts + part.start))
    return Confident(*(torch.cat(column) for column in zip(*found)))


def _above(scores: torch.Tensor, threshold: float | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Prompts and candidates, [K] each, of the scores [P, M] above the threshold."""
    chosen = torch.ones_like(scores, dtype=torch.bool) if threshold is None else scores > threshold
    prompts, candidates = chosen.nonzero(as_tuple=True)
    return prompts, candidates


@torch.no_grad()
def upscale(predictor: Any, logits: torch.Tensor) -> list[np.ndarray]:
    """Logits [P, h, w] at low resolution -> P masks, bool [H, W], at the photo's size."""
    masks = []
    for part in logits.split(CHUNK):
        full = predictor.model.postprocess_masks(part[:, None], predictor.input_size, predictor.original_size)
        masks += list((full[:, 0] > predictor.model.mask_threshold).cpu().numpy())
    return masks
