"""Masks as records that other tools read: COCO's compressed run-lengths, one mask alone or a whole file."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from pycocotools import mask as rle_tools

from .data.annotations import encode_mask


def mask_record(mask: np.ndarray, score: float) -> dict[str, Any]:
    """A mask, bool [H, W], and the IoU predicted for it -> segmentation (compressed RLE), score, box x1 y1 x2 y2, area."""
    rle = encode_mask(mask)
    x, y, w, h = (float(v) for v in rle_tools.toBbox(rle))
    return {
        "segmentation": rle,
        "score": float(score),
        "box": [x, y, x + w, y + h],
        "area": int(mask.sum()),
    }


def coco_annotation(record: dict[str, Any]) -> dict[str, Any]:
    """A `mask_record` in COCO's words."""
    x1, y1, x2, y2 = record["box"]
    kept = {name: record[name] for name in ("segmentation", "area", "score")}
    return kept | {"bbox": [x1, y1, x2 - x1, y2 - y1]}


def coco_json(photos: Iterable[tuple[str, tuple[int, int], Sequence[dict[str, Any]]]]) -> dict[str, Any]:
    """Photos, each with its file name, size (H, W) and annotations (segmentation, bbox x y w h, area, and what else there
    is), as a file in COCO's instance format: one category, "object"."""
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for file_name, (height, width), found in photos:
        images.append({"id": len(images) + 1, "file_name": file_name, "height": height, "width": width})
        for one in found:
            ids = {"id": len(annotations) + 1, "image_id": len(images), "category_id": 1, "iscrowd": 0}
            annotations.append(ids | one)
    return {
        "info": {"description": "masks by blsam; pixels of the photo as it is seen, turned as its EXIF says"},
        "images": images,
        "annotations": annotations,
        "categories": [{"id": 1, "name": "object"}],
    }
