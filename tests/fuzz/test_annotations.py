"""COCO's and LVIS's json and detections with any field changed: what is usable, or one line that says what is not."""

import json
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import strategies as st
from PIL import Image

from blsam.data.annotations import Annotations, encode_mask
from blsam.evaluation.instance_ap import InstanceAP, read_detections, true_boxes
from tests.fuzz.helpers import changed_json, few, many, outcome
from tests.photos import annotation

ERRORS = (ValueError, FileNotFoundError)
MORE = {"neg_category_ids": [1], "not_exhaustive_category_ids": []}
SEGMENTATIONS = [
    [[1, 1, 3, 1, 3, 3, 1, 3]],
    {"size": [4, 4], "counts": [5, 2, 2, 2, 5]},
    {"size": [4, 4], "counts": encode_mask(np.eye(4, dtype=bool))["counts"]},
]
DATASET = {
    "images": [{"id": i, "file_name": f"{i}.png", "height": 4, "width": 4} | MORE for i in (1, 2)],
    "annotations": [annotation(i, image=1 + i % 2, segmentation=SEGMENTATIONS[i % 3]) for i in range(1, 5)],
    "categories": [{"id": 1, "name": "a", "frequency": "f"}, {"id": 2, "name": "b", "frequency": "r"}],
}
DETECTIONS = [{"image_id": 1 + i % 2, "category_id": 1, "bbox": [1, 1, 2, 2], "score": 0.5} for i in range(3)]


def check(case):
    """Reading, listing the targets, and scoring the true masks and the detections' boxes."""
    kind, dataset, detections = case
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for number in (1, 2):
            Image.new("L", (4, 4)).save(folder / f"{number}.png")
        (folder / "a.json").write_text(json.dumps(dataset))
        (folder / "d.json").write_text(json.dumps(detections))
        annotations = outcome(lambda: Annotations(folder / "a.json", folder, kind, skip_missing=True), *ERRORS)
        if annotations is None:
            return
        evaluator = InstanceAP(annotations)
        found = outcome(lambda: read_detections(folder / "d.json", annotations), *ERRORS)
    boxes, _ = true_boxes(annotations)
    for photo in annotations.photos:
        targets, left_out = annotations.targets(photo, crowd=True)
        assert all(n > 0 for n in left_out.values())
        rows = [*boxes[photo.id], *(found[0][photo.id] if found else ())]
        for target in targets:
            assert target.mask.shape == (photo.height, photo.width) and target.mask.any()
            assert np.isfinite([*target.box, target.area]).all() and target.id > 0
        for row in rows:
            x1, y1, x2, y2 = row["box"]
            assert x1 < x2 and y1 < y2 and x1 < photo.width and y1 < photo.height and x2 > 0 and y2 > 0
            mask = np.zeros((photo.height, photo.width), bool)
            mask[max(0, int(y1)) : int(min(y2, 99)) + 1, max(0, int(x1)) : int(min(x2, 99)) + 1] = True
            evaluator.process(photo, [row | {"counts": encode_mask(mask)["counts"]}])
    json.dumps(evaluator.results)
    figures, _ = evaluator.evaluate()
    assert all(value is None or 0 <= value <= 100 for value in figures.values()), figures


def cases(kind):
    dataset = changed_json(DATASET) | st.just(DATASET)
    return st.tuples(st.just(kind), dataset, changed_json(DETECTIONS) | st.just(DETECTIONS))


@pytest.mark.parametrize(("kind", "count"), [("coco", 60), ("lvis", 20)])
def test_a_few(kind, count):
    if kind == "lvis":
        pytest.importorskip("lvis")
    few(check, cases(kind), count)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["coco", "lvis"])
def test_many(kind, capsys):
    if kind == "lvis":
        pytest.importorskip("lvis")
    with capsys.disabled():
        many(check, cases(kind), f"annotations, {kind}")
