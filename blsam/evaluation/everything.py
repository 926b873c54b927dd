"""Everything-mode against annotations: how many masks a photo gets, and which annotated objects are among them (ours).

There is no agreed measure of it: annotations hold a part of what can be cut out. So objects that are annotated are
looked for among the masks, by size, and the number of masks stands beside them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
from pycocotools import mask as rle_tools

from ..data.annotations import Annotations, Photo, encode_mask
from .prompted import SIZES


def predict_everything(generator: Any, image: np.ndarray) -> list[dict[str, Any]]:
    """The masks of a generator for a photo, uint8 [H, W, 3] RGB: rows with counts (RLE), score, stability."""
    return [
        {
            "counts": encode_mask(record["segmentation"])["counts"],
            "score": float(record["predicted_iou"]),
            "stability": float(record["stability_score"]),
        }
        for record in generator.generate(image)
    ]


class FoundObjects:
    """Masks a photo, and the share of the annotated objects that one of them fits; `process` for each photo, `evaluate`.

    found_at: the IoU from which on an object counts as found. Crowds are left out.
    """

    def __init__(self, annotations: Annotations, found_at: float) -> None:
        self.annotations, self.found_at = annotations, found_at
        self.rows: list[dict[str, Any]] = []
        self.masks: list[int] = []
        self.left_out: Counter[str] = Counter(annotations.left_out)

    def process(self, photo: Photo, predicted: Sequence[dict[str, Any]]) -> None:
        """Look for a photo's objects in the rows of `predict_everything`."""
        targets, left_out = self.annotations.targets(photo, crowd=False)
        self.left_out += left_out
        self.masks.append(len(predicted))
        size = [photo.height, photo.width]
        masks = [{"size": size, "counts": row["counts"].encode()} for row in predicted]
        for target in targets:
            best = float(rle_tools.iou(masks, [target.rle], [0]).max()) if masks else 0.0
            row = {"image": photo.source_id, "annotation": target.source_id, "area": target.area, "iou": best}
            self.rows.append(row)

    def evaluate(self) -> dict[str, Any]:
        """Figures in percent (None where there is no object of a size), their counts, and what was left out.

        Keys: masks_median, masks_mean, photos_without (a mask), found, found_large ..., best_iou ..., count ...
        """
        figures: dict[str, Any] = {"masks_median": None, "masks_mean": None}
        if self.masks:
            figures = {"masks_median": float(np.median(self.masks)), "masks_mean": float(np.mean(self.masks))}
        figures["photos_without"] = sum(count == 0 for count in self.masks)
        for size, (low, high) in SIZES.items():
            suffix = "" if size == "all" else f"_{size}"
            ious = np.array([row["iou"] for row in self.rows if low <= row["area"] <= high])
            figures["count" + suffix] = len(ious)
            figures["found" + suffix] = 100 * float((ious >= self.found_at).mean()) if len(ious) else None
            figures["best_iou" + suffix] = 100 * float(ious.mean()) if len(ious) else None
        return figures | {"left_out": {reason: n for reason, n in sorted(self.left_out.items()) if n}}
