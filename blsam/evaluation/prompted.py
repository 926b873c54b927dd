"""Prompted segmentation of annotated objects: one prompt, one mask, its IoU with the true mask at original size."""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np

from ..predictor import SamPredictor

SIZES = {"all": (0, 1e10), "large": (96**2, 1e10), "medium": (32**2, 96**2), "small": (0, 32**2)}  # COCO's


@dataclass(frozen=True)
class Target:
    """An annotation: id, bool mask [H, W], box x1 y1 x2 y2, the annotation's own area in pixels."""

    id: int
    mask: np.ndarray
    box: tuple[float, float, float, float]
    area: float


def iou(a: np.ndarray, b: np.ndarray) -> float:
    """Intersection over union of two bool masks; 1 where both are empty."""
    union = np.logical_or(a, b).sum()
    return float(np.logical_and(a, b).sum() / union) if union else 1.0


def filled_box(box: tuple[float, float, float, float], shape: tuple[int, int]) -> np.ndarray:
    """The pixels whose centre lies in the box: bool [H, W]."""
    y, x = np.ogrid[: shape[0], : shape[1]]
    return (x + 0.5 > box[0]) & (x + 0.5 < box[2]) & (y + 0.5 > box[1]) & (y + 0.5 < box[3])


def inscribed_ellipse(box: tuple[float, float, float, float], shape: tuple[int, int]) -> np.ndarray:
    """The pixels whose centre lies in the ellipse that touches the box's sides: bool [H, W]."""
    y, x = np.ogrid[: shape[0], : shape[1]]
    across = (2 * (x + 0.5) - box[0] - box[2]) / max(box[2] - box[0], 1e-9)
    down = (2 * (y + 0.5) - box[1] - box[3]) / max(box[3] - box[1], 1e-9)
    return across**2 + down**2 <= 1


def centre_point(mask: np.ndarray) -> tuple[float, float]:
    """x, y of the first pixel that is farthest from the mask's border (SAM, appendix D.1)."""
    padded = np.pad(mask.astype(np.uint8), 1)
    y, x = np.unravel_index(cv2.distanceTransform(padded, cv2.DIST_L2, 0)[1:-1, 1:-1].argmax(), mask.shape)
    return float(x), float(y)


def random_point(mask: np.ndarray, seed: int) -> tuple[float, float]:
    """x, y of a pixel drawn uniformly from the mask."""
    ys, xs = np.nonzero(mask)
    i = np.random.default_rng(seed).integers(len(xs))
    return float(xs[i]), float(ys[i])


def prompted_ious(predictor: SamPredictor, target: Target, seed: int) -> dict[str, float]:
    """IoU of one object on the image that is set, for each kind of prompt, and of the trivial baselines.

    `box` and the points take the most confident of three masks, `box_single` the single mask.
    """
    result = {
        "ellipse": iou(inscribed_ellipse(target.box, target.mask.shape), target.mask),
        "filled_box": iou(filled_box(target.box, target.mask.shape), target.mask),
    }
    prompts = {"box": (None, True), "box_single": (None, False)}
    prompts["point_center"] = (centre_point(target.mask), True)
    prompts["point_random"] = (random_point(target.mask, seed * 1_000_003 + target.id), True)
    for name, (point, several) in prompts.items():
        given = (
            {"box": np.array(target.box)}
            if point is None
            else {"point_coords": np.array([point]), "point_labels": np.array([1])}
        )
        masks, scores, _ = predictor.predict(**given, multimask_output=several)
        result[name] = iou(masks[scores.argmax()], target.mask)
    return result
