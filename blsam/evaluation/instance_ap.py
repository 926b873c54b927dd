"""Zero-shot instance segmentation: masks for boxes, scored as COCO and LVIS score detectors.

The box's class and score stay the detector's. Boxes may also be the annotations' own, with score 1.
"""

from __future__ import annotations

import contextlib
import io
import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pycocotools.cocoeval import COCOeval

from ..data.annotations import Annotations, Photo, encode_mask
from ..data.fields import box_of, finite, read_json, reasons, wrong_box
from ..decoding import decode
from ..files import printable
from .prompted import choose

Detection = dict[str, Any]
LVIS_CHUNK = 50  # categories scored at a time: of all 1,203 on 19,809 images the evaluator keeps many gigabytes


def true_boxes(annotations: Annotations) -> tuple[dict[int, list[Detection]], Counter[str]]:
    """The annotations' own boxes as detections of score 1, by image, and what was left out."""
    found: dict[int, list[Detection]] = {}
    left_out: Counter[str] = Counter()
    for photo in annotations.photos:
        targets, skipped = annotations.targets(photo, crowd=False)
        left_out += skipped
        found[photo.id] = [{"category_id": t.category_id, "box": t.box, "score": 1.0} for t in targets]
    return found, left_out


def read_detections(path: Path, annotations: Annotations) -> tuple[dict[int, list[Detection]], Counter[str]]:
    """A detector's results (image_id, category_id, bbox x y w h, score) by image, in the file's order, and how many
    cannot be used, by reason; ValueError if none can.
    """
    rows = read_json(path, "detections")
    if not isinstance(rows, list):
        raise ValueError(f"{path} must be a list of detections (image_id, category_id, bbox, score)")
    photos = {photo.id: photo for photo in annotations.photos}
    found: dict[int, list[Detection]] = {image: [] for image in photos}
    left_out: Counter[str] = Counter()
    for row in rows:
        read = _detection(row, annotations, photos)
        if isinstance(read, str):
            left_out[read] += 1
        else:
            image, detection = read
            found[image].append(detection)
    if rows and sum(left_out.values()) == len(rows) and set(left_out) != {"detections on other images"}:
        raise ValueError(
            f"{path}: no detection can be used: {reasons(left_out)}; each needs image_id and category_id of the "
            f"annotations, bbox [x, y, w, h] and score, the first is {printable(rows[0])}"
        )
    return found, left_out


def _detection(row: Any, annotations: Annotations, photos: dict[int, Photo]) -> tuple[int, Detection] | str:
    """The image and the detection of a row, or why there is none."""
    if not isinstance(row, dict):
        return "detections that are no json objects"
    image, category = annotations.images.find(row.get("image_id")), annotations.categories.find(row.get("category_id"))
    if image is None:
        return "detections on unknown images"
    if image not in photos:
        return "detections on other images"
    if category is None:
        return "detections of unknown categories"
    box, score = box_of(row.get("bbox")), finite(row.get("score"))
    if box is None:
        return "detections without a box of four numbers"
    if score is None:
        return "detections without a score"
    corners = (box[0], box[1], box[0] + box[2], box[1] + box[3])
    if wrong := wrong_box(corners, photos[image].height, photos[image].width):
        return wrong
    return image, {"category_id": category, "box": corners, "score": score}


def predict_boxes(
    predictor: Any, detections: Sequence[Detection], *, single_mask: bool = False, refine: bool = False
) -> list[dict[str, Any]]:
    """A mask for every box on the photo that the predictor holds: rows with category_id, score, counts (RLE).

    refine: the most confident mask's logits go back with the box once, as in the SAM paper (appendix D.4).
    """
    boxes = [detection["box"] for detection in detections]
    candidates = decode(predictor, boxes=boxes, three=not single_mask)
    if refine:
        best = candidates.scores.argmax(1)
        logits = candidates.logits[torch.arange(len(best)), best]
        candidates = decode(predictor, boxes=boxes, logits=logits[:, None], three=not single_mask)
    _, _, masks = choose(predictor, candidates, [], "score")
    return [
        {"category_id": d["category_id"], "score": d["score"], "counts": encode_mask(mask)["counts"]}
        for d, mask in zip(detections, masks)
    ]


class InstanceAP:
    """Average precision of masks by `COCOeval` or `LVISEval`; `reset`, `process` for each photo, `evaluate`.

    `results` are rows in COCO's format, with the ids of the annotation file.
    """

    def __init__(self, annotations: Annotations) -> None:
        self.annotations = annotations
        self.reset()

    def reset(self) -> None:
        """Forget everything processed."""
        self.results: list[dict[str, Any]] = []

    def process(self, photo: Photo, predicted: Sequence[dict[str, Any]]) -> None:
        """Take the rows of `predict_boxes` for one photo."""
        for row in predicted:
            rle = {"size": [photo.height, photo.width], "counts": row["counts"]}
            result = {
                "image_id": photo.source_id,
                "category_id": self.annotations.categories.source[row["category_id"]],
            }
            self.results.append(result | {"segmentation": rle, "score": row["score"]})  # no bbox: areas are the masks'

    def evaluate(self) -> tuple[dict[str, float | None], str]:
        """Figures in percent (None where nothing is annotated) and the official summary as text."""
        if not self.results:
            return {"AP": 0.0}, "no predictions: AP 0"
        images, categories = self.annotations.images, self.annotations.categories
        rows = [  # copies, by the scorers' ids: both packages change what they are given
            result
            | {"image_id": images.find(result["image_id"]), "category_id": categories.find(result["category_id"])}
            for result in self.results
        ]
        return (_coco if self.annotations.kind == "coco" else _lvis)(self.annotations.api, rows)


def _coco(api: Any, rows: list[dict[str, Any]]) -> tuple[dict[str, float | None], str]:
    text = io.StringIO()
    with contextlib.redirect_stdout(io.StringIO()):
        found = api.loadRes(rows)
        parts = []
        for category in api.getCatIds():  # one at a time, or what COCOeval keeps fills the memory
            evaluation = COCOeval(api, found, "segm")
            evaluation.params.catIds = [category]
            evaluation.evaluate()
            evaluation.accumulate()
            parts.append(evaluation.eval)
        whole = COCOeval(api, found, "segm")
        whole.eval = {
            key: np.concatenate([p[key] for p in parts], axis) for key, axis in (("precision", 2), ("recall", 1))
        }
        with contextlib.redirect_stdout(text):
            whole.summarize()
    names = ("AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large")
    return {name: _percent(value) for name, value in zip(names, whole.stats)}, text.getvalue().rstrip()


def _lvis(api: Any, rows: list[dict[str, Any]]) -> tuple[dict[str, float | None], str]:
    from lvis import LVISEval, LVISResults

    text = io.StringIO()
    logging.getLogger("lvis").setLevel(logging.ERROR)  # it warns that results come as a list
    found = LVISResults(api, rows)  # which keeps 300 an image
    parts = []
    whole = LVISEval(api, found)
    categories = whole.params.cat_ids
    for start in range(0, len(categories), LVIS_CHUNK):
        evaluation = LVISEval(api, found)
        evaluation.params.cat_ids = categories[start : start + LVIS_CHUNK]
        evaluation.evaluate()
        with numpy_float():
            evaluation.accumulate()
        parts.append(evaluation.eval)
    whole.eval = {
        key: np.concatenate([p[key] for p in parts], axis) for key, axis in (("precision", 2), ("recall", 1))
    }
    whole.freq_groups = whole._prepare_freq_group()
    whole.summarize()
    with contextlib.redirect_stdout(text):
        whole.print_results()
    names = {"AP": "AP", "AP50": "AP50", "AP75": "AP75", "APs": "AP_small", "APm": "AP_medium", "APl": "AP_large"}
    names |= {"APr": "AP_rare", "APc": "AP_common", "APf": "AP_frequent"}
    return {name: _percent(whole.results[key]) for key, name in names.items()}, text.getvalue().rstrip()


@contextlib.contextmanager
def numpy_float() -> Iterator[None]:
    """`np.float` for a while: lvis 0.5.3 asks for it after its long evaluation, and NumPy 1.24 took it away."""
    if hasattr(np, "float"):
        yield
        return
    np.float = float  # type: ignore[attr-defined]
    try:
        yield
    finally:
        del np.float  # type: ignore[attr-defined]


def _percent(value: float) -> float | None:
    return None if value < 0 else 100 * float(value)
