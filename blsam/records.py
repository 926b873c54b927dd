"""Masks as records that other tools read: COCO's compressed run-lengths, one mask alone or a whole file."""

from __future__ import annotations

from collections.abc import Sequence
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


def coco_json(records: Sequence[dict[str, Any]], file_name: str, size: tuple[int, int]) -> dict[str, Any]:
    """Records of one photo, size (H, W), as a file in COCO's instance format: one category, "object", with scores."""
    annotations = []
    for number, record in enumerate(records, 1):
        x1, y1, x2, y2 = record["box"]
        annotations.append(
            {
                "id": number,
                "image_id": 1,
                "category_id": 1,
                "segmentation": record["segmentation"],
                "bbox": [x1, y1, x2 - x1, y2 - y1],
                "area": record["area"],
                "iscrowd": 0,
                "score": record["score"],
            }
        )
    return {
        "info": {"description": "masks by blsam; pixels of the photo as it is seen, turned as its EXIF says"},
        "images": [{"id": 1, "file_name": file_name, "height": size[0], "width": size[1]}],
        "annotations": annotations,
        "categories": [{"id": 1, "name": "object"}],
    }
