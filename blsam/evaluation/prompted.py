"""Prompted masks of annotated objects, their mean IoU at the photo's own size, and what no model at all would reach."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from pycocotools import mask as rle_tools

from ..data.annotations import Annotations, Photo, Target, encode_mask
from ..data.prompts import Click
from ..decoding import Candidates, decode, upscale
from ..images import read_annotated
from ..modeling.sam import Sam
from ..predictor import SamPredictor
from .protocols import PROTOCOLS, Protocol

SIZES = {"all": (0, 1e10), "large": (96**2, 1e10), "medium": (32**2, 96**2), "small": (0, 32**2)}  # COCO's, inclusive
DISC_RADII = 2.0 ** np.arange(-7, -0.75, 0.25)  # tried for the disc baseline, as shares of the photo's longer side
RESAMPLES = 1000

Box = tuple[float, float, float, float]


# --- prediction ------------------------------------------------------------------------------------------------------


def predict_objects(
    predictor: Any, targets: Sequence[Target], protocol: Protocol, prompt: str, num_points: int, seed: int
) -> list[dict[str, Any]]:
    """One mask for each object of the photo that the predictor holds: rows with id, counts (RLE), score, points."""
    masks = [target.mask for target in targets]
    if prompt == "box":
        boxes = [target.box for target in targets]
        candidates = decode(predictor, boxes=boxes, three=protocol.asks_three(0))
        _, scores, found = choose(predictor, candidates, masks, protocol.select)
        return [_row(*fields, []) for fields in zip(targets, found, scores)]

    clicks: list[list[Click]] = [[] for _ in targets]
    predictions: list[np.ndarray | None] = [None] * len(targets)
    scores = torch.zeros(len(targets))
    logits = torch.zeros(
        len(targets), *predictor.model.prompt_encoder.mask_input_size, device=predictor.features.device
    )
    for number in range(1 if protocol.drawn_at_once else num_points):
        active = []  # an object that has no error left keeps its mask
        for i, target in enumerate(targets):
            new = protocol.next_clicks(target, masks[i], predictions[i], clicks[i], num_points, seed)
            clicks[i] += new
            active += [i] if new else []
        if not active:
            break
        candidates = decode(
            predictor,
            points=[clicks[i] for i in active],
            logits=logits[active, None] if protocol.feedback and number else None,
            three=protocol.asks_three(number),
        )
        logits[active], chosen, found = choose(predictor, candidates, [masks[i] for i in active], protocol.select)
        scores[active] = chosen.cpu()
        for i, mask in zip(active, found):
            predictions[i] = mask
    rows = []
    for target, prediction, score, points in zip(targets, predictions, scores, clicks):
        assert prediction is not None  # the first round has a click for everyone
        rows.append(_row(target, prediction, score, points))
    return rows


def choose(
    predictor: Any, candidates: Candidates, masks: Sequence[np.ndarray], select: str
) -> tuple[torch.Tensor, torch.Tensor, list[np.ndarray]]:
    """Of each prompt's candidates the most confident, or the one nearest to the true mask.

    -> logits [P, h, w], scores [P], P masks bool [H, W].
    """
    rows = torch.arange(len(candidates.scores))
    if select == "oracle" and candidates.scores.shape[1] > 1:
        full = [upscale(predictor, candidates.logits[:, m]) for m in range(candidates.scores.shape[1])]
        ious = [[iou(one[i], mask) for one in full] for i, mask in enumerate(masks)]
        best = torch.tensor(ious).argmax(1)
        predictions = [full[m][i] for i, m in enumerate(best.tolist())]
        return candidates.logits[rows, best], candidates.scores[rows, best], predictions
    best = candidates.scores.argmax(1)
    logits = candidates.logits[rows, best]
    return logits, candidates.scores[rows, best], upscale(predictor, logits)


def iou(a: np.ndarray, b: np.ndarray) -> float:
    """Intersection over union of two bool masks; 1 where both are empty."""
    union = np.logical_or(a, b).sum()
    return float(np.logical_and(a, b).sum() / union) if union else 1.0


def _row(target: Target, mask: np.ndarray, score: torch.Tensor, clicks: list[Click]) -> dict[str, Any]:
    row = {"id": target.id, "counts": encode_mask(mask)["counts"], "score": float(score)}
    return row | {"points": clicks} if clicks else row


# --- what no model would reach ---------------------------------------------------------------------------------------


def filled_box(box: Box, y: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Which pixels have their centre in the box: open grids y [h, 1], x [1, w] -> bool [h, w]."""
    return (x + 0.5 > box[0]) & (x + 0.5 < box[2]) & (y + 0.5 > box[1]) & (y + 0.5 < box[3])


def inscribed_ellipse(box: Box, y: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Which pixels have their centre in the ellipse that touches the box's sides."""
    across = (2 * (x + 0.5) - box[0] - box[2]) / (box[2] - box[0])
    down = (2 * (y + 0.5) - box[1] - box[3]) / (box[3] - box[1])
    return across**2 + down**2 <= 1


def shape_ious(box: Box, mask: np.ndarray) -> dict[str, float]:
    """IoU of the inscribed ellipse and of the filled box with the mask; only the box's own pixels are looked at."""
    h, w = mask.shape
    top, left = max(0, int(box[1])), max(0, int(box[0]))
    y, x = np.ogrid[top : min(h, int(np.ceil(box[3]))), left : min(w, int(np.ceil(box[2])))]
    inside, area = mask[top : top + y.shape[0], left : left + x.shape[1]], mask.sum()
    found = {}
    for name, shape in (("ellipse", inscribed_ellipse(box, y, x)), ("filled_box", filled_box(box, y, x))):
        common = (shape & inside).sum()
        found[name] = float(common / (shape.sum() + area - common))
    return found


def disc_ious(click: Click, mask: np.ndarray) -> np.ndarray:
    """IoU with the mask of discs about a click, one for each of `DISC_RADII`: float [R]."""
    h, w = mask.shape
    squares = (DISC_RADII * max(h, w)) ** 2
    x, y = int(click[0]), int(click[1])
    xs, ys = np.divmod(np.flatnonzero(mask.ravel(order="F")), h)  # column by column, as pycocotools decodes
    first_radius = np.searchsorted(squares, (ys - y) ** 2 + (xs - x) ** 2)  # the smallest disc that has the pixel
    common = np.bincount(first_radius, minlength=len(squares) + 1)[:-1].cumsum()
    rest = squares[:, None] - (np.arange(h) - y) ** 2  # [R, h]
    half = np.floor(np.sqrt(np.maximum(rest, 0)))
    widths = np.minimum(w - 1, x + half) - np.maximum(0, x - half) + 1
    area = np.where(rest >= 0, widths, 0).sum(1)
    return common / (area + len(ys) - common)


# --- scores ----------------------------------------------------------------------------------------------------------


class PromptedIoU:
    """Mean IoU over objects, by size, beside the baselines; `reset`, `process` for each photo, `evaluate`."""

    def __init__(self, annotations: Annotations, protocol: Protocol, prompt: str, seed: int = 0) -> None:
        self.annotations, self.protocol, self.prompt, self.seed = annotations, protocol, prompt, seed
        self.reset()

    def reset(self) -> None:
        """Forget everything processed."""
        self.rows: list[dict[str, Any]] = []
        self.discs: list[np.ndarray] = []
        self.left_out: Counter[str] = Counter(self.annotations.left_out)

    def process(self, photo: Photo, predicted: Sequence[dict[str, Any]]) -> None:
        """Score the rows of `predict_objects` for one photo."""
        targets, left_out = self.annotations.targets(photo, crowd=self.protocol.crowd, min_area=self.protocol.min_area)
        self.left_out += left_out
        of_id = {row["id"]: row for row in predicted}
        for target in targets:
            row, mask = of_id[target.id], target.mask
            found = {"size": [photo.height, photo.width], "counts": row["counts"].encode()}
            value = float(rle_tools.iou([found], [target.rle], [0])[0, 0])
            base = {"image": photo.source_id, "annotation": target.source_id, "area": target.area, "iou": value}
            base["score"] = row["score"]
            self.rows.append(base | shape_ious(target.box, mask))
            if self.prompt == "point":
                self.discs.append(disc_ious(row["points"][0], mask))

    def evaluate(self) -> dict[str, Any]:
        """Figures in percent (None where there is no object of a size), their counts, and what was left out.

        Keys: miou, miou_large ..., count, count_large ..., interval_95, interval_95_large ... (bootstrap over images),
        baseline_ellipse, baseline_filled_box and, for points, baseline_disc, each by size too; score_error, how far the
        predicted IoU lies from the true one in the mean, and score_rank, their rank correlation (-1 ... 1); left_out.
        """
        column = {key: np.array([row[key] for row in self.rows]) for key in self.rows[0]} if self.rows else {}
        names = {"miou": "iou", "baseline_ellipse": "ellipse", "baseline_filled_box": "filled_box"}
        figures: dict[str, Any] = {}
        if self.discs:
            discs = np.stack(self.discs)  # [P, R]
            best = discs.mean(0).argmax()  # the one radius that suits all objects best
            column["disc"], names["baseline_disc"] = discs[:, best], "disc"
            figures["disc_radius"] = float(DISC_RADII[best])
        for size, (low, high) in SIZES.items():
            suffix = "" if size == "all" else f"_{size}"
            member = (column["area"] >= low) & (column["area"] <= high) if column else np.zeros(0, bool)
            figures["count" + suffix] = int(member.sum())
            for name, key in names.items():
                figures[name + suffix] = 100 * float(column[key][member].mean()) if member.any() else None
            figures["interval_95" + suffix] = None
            if member.any():
                interval = bootstrap(100 * column["iou"][member], column["image"][member], self.seed)
                figures["interval_95" + suffix] = interval
        if len(self.rows) > 1:
            figures["score_error"] = float(np.abs(column["score"] - column["iou"]).mean())
            figures["score_rank"] = rank_correlation(column["score"], column["iou"])
        return figures | {"left_out": {reason: n for reason, n in sorted(self.left_out.items()) if n}}


def rank_correlation(a: np.ndarray, b: np.ndarray) -> float | None:
    """Spearman's, ties at their mean rank; None where all of either are the same."""
    ranks = []
    for values in (a, b):
        _, place, count = np.unique(values, return_inverse=True, return_counts=True)
        ranks.append((count.cumsum() - (count - 1) / 2)[place])
    if min(np.ptp(one) for one in ranks) == 0:
        return None
    return float(np.corrcoef(ranks[0], ranks[1])[0, 1])


def object_ious(
    sam: Sam, annotations: Annotations, keep_ratio: float, prompts: Sequence[str] = ("box",)
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """IoU in percent of every object, protocol `paper`, of each prompt, and the id of the photo that it lies on.

    prompts: "box", "center" (one point in the middle) -> {prompt: float [P]}, int [P]; the same objects in any model.
    """
    predictor, before = SamPredictor(sam), sam.image_encoder.keep_ratio
    protocols = {name: replace(PROTOCOLS["paper"], sampling="random" if name == "box" else name) for name in prompts}
    kinds = {name: "box" if name == "box" else "point" for name in prompts}
    evaluators = {name: PromptedIoU(annotations, protocol, kinds[name]) for name, protocol in protocols.items()}
    sam.image_encoder.keep_ratio = keep_ratio
    for photo in annotations.photos:
        targets, _ = annotations.targets(photo, crowd=False)
        if targets:
            predictor.set_image(read_annotated(photo.path, (photo.height, photo.width)))
            for name, evaluator in evaluators.items():
                rows = predict_objects(predictor, targets, protocols[name], kinds[name], 1, seed=0)
                evaluator.process(photo, rows)
    sam.image_encoder.keep_ratio = before
    ious = {name: np.array([100 * row["iou"] for row in one.rows]) for name, one in evaluators.items()}
    return ious, np.array([row["image"] for row in evaluators[prompts[0]].rows])


def bootstrap(values: np.ndarray, images: np.ndarray, seed: int) -> list[float]:
    """[low, high] of the mean of `values`, 95 %: images drawn with replacement, with all their values."""
    _, group = np.unique(images, return_inverse=True)
    sums, counts = np.bincount(group, values), np.bincount(group)
    rng = np.random.default_rng(seed)
    draws = (rng.integers(len(sums), size=len(sums)) for _ in range(RESAMPLES))
    means = [sums[draw].sum() / counts[draw].sum() for draw in draws]
    return [float(v) for v in np.percentile(means, (2.5, 97.5))]
