"""Zero-shot instance segmentation: masks for boxes, scored as COCO and LVIS score detectors.

The box's class and score stay the detector's. Boxes may also be the annotations' own, with score 1.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pycocotools.cocoeval import COCOeval

from ..data.annotations import Annotations, Photo, encode_mask
from ..decoding import decode
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
    """A detector's results (image_id, category_id, bbox x y w h, score) by image, in the file's order."""
    try:
        rows = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise FileNotFoundError(f"no detections at {path}") from None
    except ValueError as error:
        raise ValueError(f"{path} is not json ({error})") from None
    if not isinstance(rows, list):
        raise ValueError(f"{path} must be a list of detections (image_id, category_id, bbox, score)")
    found: dict[int, list[Detection]] = {photo.id: [] for photo in annotations.photos}
    left_out: Counter[str] = Counter()
    known = {category["id"] for category in annotations.api.dataset["categories"]}
    for row in rows:
        try:
            x, y, w, h = map(float, row["bbox"])
            image, category, score = row["image_id"], row["category_id"], float(row["score"])
        except (TypeError, KeyError, ValueError):
            wanted = "image_id, category_id, bbox [x, y, w, h] and score"
            raise ValueError(f"{path}: a detection needs {wanted}, one is {str(row)[:80]}") from None
        if image not in found:
            left_out["detections on other images"] += 1
        elif category not in known:
            left_out["detections of unknown categories"] += 1
        elif not (w > 0 and h > 0 and np.isfinite((x, y, w, h)).all()):
            left_out["box without area"] += 1
        else:
            found[image].append({"category_id": category, "box": (x, y, x + w, y + h), "score": score})
    if rows and left_out["detections of unknown categories"] == len(rows):
        raise ValueError(f"{path}: no detection has a category of the annotations (COCO's ids are 1 to 90)")
    return found, left_out


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
    """Average precision of masks by `COCOeval` or `LVISEval`; `reset`, `process` for each photo, `evaluate`."""

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
            result = {"image_id": photo.id, "category_id": row["category_id"]}
            self.results.append(result | {"segmentation": rle, "score": row["score"]})  # no bbox: areas are the masks'

    def evaluate(self) -> tuple[dict[str, float | None], str]:
        """Figures in percent (None where nothing is annotated) and the official summary as text."""
        if not self.results:
            return {"AP": 0.0}, "no predictions: AP 0"
        rows = [dict(result) for result in self.results]  # both packages change what they are given
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
