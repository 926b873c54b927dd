"""Average precision by hand, against pycocotools, and fed with the true masks."""

import json
from collections import Counter

import numpy as np
import pytest
from pycocotools import mask as rle_tools
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from blsam.data.annotations import Annotations, encode_mask
from blsam.evaluation.instance_ap import InstanceAP, predict_boxes, read_detections, true_boxes
from blsam.evaluation.prompted import (
    iou,
)
from tests.helpers import DATA, needs_data
from tests.photos import annotation, coco_photos, lvis_photos


def feed(annotations, change=lambda target, mask: mask, score=lambda target: 1.0):
    evaluator = InstanceAP(annotations)
    for photo in annotations.photos:
        rows = []
        for target in annotations.targets(photo, crowd=False)[0]:
            counts = encode_mask(change(target, target.mask))["counts"]
            rows.append({"category_id": target.category_id, "score": score(target), "counts": counts})
        evaluator.process(photo, rows)
    return evaluator


@needs_data
@pytest.mark.parametrize("kind", ["coco", "lvis"])
def test_true_masks_score_100(kind):
    annotations = coco_photos() if kind == "coco" else lvis_photos()
    figures, summary = feed(annotations).evaluate()
    assert figures["AP"] == pytest.approx(100, abs=1e-6) and figures["AP_small"] == pytest.approx(100, abs=1e-6)
    assert "Average Precision" in summary


@needs_data
def test_perturbed_masks_score_as_by_the_official_files(tmp_path):
    """The same masks through COCO's own reader and a results file."""
    annotations = coco_photos(40)
    noise = np.random.default_rng(0)
    shifts = {i: noise.integers(0, 6, 2) for i in annotations.api.anns}
    evaluator = feed(
        annotations,
        lambda target, mask: np.roll(mask, shifts[target.id], (0, 1)),
        lambda target: 1 / (1 + target.id % 97),
    )
    figures, _ = evaluator.evaluate()
    (tmp_path / "results.json").write_text(json.dumps(evaluator.results))
    truth = COCO(DATA / "coco" / "instances_val2017.json")
    official = COCOeval(truth, truth.loadRes(str(tmp_path / "results.json")), "segm")
    official.params.imgIds = [photo.id for photo in annotations.photos]
    official.evaluate(), official.accumulate(), official.summarize()
    assert figures["AP"] == pytest.approx(100 * official.stats[0])
    assert figures["AP_large"] == pytest.approx(100 * official.stats[5])
    assert 20 < figures["AP"] < 90, "the perturbation tests nothing"


def test_ap_of_a_4x4_case_by_hand(dataset):  # noqa: F811
    """Two objects, three masks: a hit, a miss, a hit. Precision 1 up to recall 1/2, then 2/3."""
    rows = [annotation(1), annotation(2, image=2)]
    annotations = Annotations(*dataset(rows), "coco")
    hit, miss = np.zeros((4, 4), bool), np.zeros((4, 4), bool)
    hit[1:3, 1:3], miss[3:, 3:] = True, True
    evaluator = InstanceAP(annotations)
    row = {"category_id": 1}
    counts = [encode_mask(mask)["counts"] for mask in (hit, miss)]
    evaluator.process(
        annotations.photos[0], [row | {"score": 0.9, "counts": counts[0]}, row | {"score": 0.8, "counts": counts[1]}]
    )
    evaluator.process(annotations.photos[1], [row | {"score": 0.7, "counts": counts[0]}])
    figures, _ = evaluator.evaluate()
    assert figures["AP"] == pytest.approx(100 * (51 * 1 + 50 * 2 / 3) / 101)
    assert figures["AP_large"] is None  # nothing annotated
    evaluator.reset()
    assert evaluator.evaluate()[0] == {"AP": 0.0}


@needs_data
def test_lvis_discards_and_ignores_as_its_rules_say():
    """Masks of a category neither annotated nor negative on a photo change nothing; negative ones cost precision."""
    annotations = lvis_photos()
    photo = next(p for p in annotations.photos if annotations.api.imgs[p.id]["neg_category_ids"])
    record = annotations.api.imgs[photo.id]
    present = {target.category_id for target in annotations.targets(photo, crowd=False)[0]}
    unknown = next(c for c in annotations.api.cats if c not in present | set(record["neg_category_ids"]))
    elsewhere = {a["category_id"] for a in annotations.api.anns.values()}
    counts = encode_mask(np.ones((photo.height, photo.width), bool))["counts"]
    base = feed(annotations, score=lambda target: 0.5)
    base.process(photo, [{"category_id": unknown, "score": 0.9, "counts": counts}])
    assert base.evaluate()[0]["AP"] == pytest.approx(100, abs=1e-6)
    negative = [
        (p, c) for p in annotations.photos for c in annotations.api.imgs[p.id]["neg_category_ids"] if c in elsewhere
    ]
    photo, category = negative[0]
    counts = encode_mask(np.ones((photo.height, photo.width), bool))["counts"]
    base.process(photo, [{"category_id": category, "score": 0.9, "counts": counts}])
    assert base.evaluate()[0]["AP"] < 100
    assert not hasattr(np, "float"), "the shim must not outlive its use"


GOOD = {"image_id": 1, "category_id": 1, "bbox": [1, 1, 2, 2], "score": 0.5}
BAD_DETECTIONS = [
    (3, "detections that are no json objects"),
    (None, "detections that are no json objects"),
    ({"image_id": 9}, "detections on unknown images"),
    ({"image_id": None}, "detections on unknown images"),
    ({"image_id": "1.png"}, "detections on unknown images"),
    ({"category_id": 77}, "detections of unknown categories"),
    ({"category_id": "a"}, "detections of unknown categories"),
    ({"bbox": None}, "detections without a box of four numbers"),
    ({"bbox": [1, 1, 2]}, "detections without a box of four numbers"),
    ({"bbox": ["a", "b", "c", "d"]}, "detections without a box of four numbers"),
    ({"bbox": [1, 1, float("nan"), 2]}, "detections without a box of four numbers"),
    ({"bbox": "1 1 2 2"}, "detections without a box of four numbers"),
    ({"bbox": [1, 1, 0, 2]}, "box without area"),
    ({"bbox": [1, 1, -2, 2]}, "box without area"),
    ({"bbox": [1, 1, 1e-38, 2]}, "box without area"),
    ({"bbox": [5, 1, 2, 2]}, "box outside its image"),
    ({"score": None}, "detections without a score"),
    ({"score": float("nan")}, "detections without a score"),
    ({"score": "high"}, "detections without a score"),
]


def test_detections_are_read_and_checked(dataset, tmp_path):  # noqa: F811
    annotations = Annotations(*dataset([annotation(1)]), "coco")
    path = tmp_path / "detections.json"
    rows = [GOOD | row if isinstance(row, dict) else row for row, _ in BAD_DETECTIONS]
    same = [
        {"image_id": "1"},
        {"image_id": 1.0},
        {"category_id": "1"},
        {"bbox": ["1", "1", "2", "2"]},
        {"score": "0.5"},
    ]
    path.write_text(json.dumps([GOOD, *rows, *(GOOD | row for row in same)]))
    found, left_out = read_detections(path, annotations)
    assert found == {1: 6 * [{"category_id": 1, "box": (1.0, 1.0, 3.0, 3.0), "score": 0.5}], 2: []}
    assert left_out == Counter(reason for _, reason in BAD_DETECTIONS)
    for row, reason in zip(rows, (reason for _, reason in BAD_DETECTIONS)):
        path.write_text(json.dumps([row]))
        with pytest.raises(ValueError, match=f"no detection can be used: 1 {reason}; each needs image_id"):
            read_detections(path, annotations)
    path.write_text("[]")
    assert read_detections(path, annotations) == ({1: [], 2: []}, {})
    path.write_text("{}")
    with pytest.raises(ValueError, match="must be a list"):
        read_detections(path, annotations)
    with pytest.raises(FileNotFoundError, match="no detections"):
        read_detections(tmp_path / "none.json", annotations)
    path.write_text(json.dumps([GOOD | {"image_id": 2}]))
    first = Annotations(*dataset([annotation(1)]), "coco", limit=1)
    assert read_detections(path, first) == (
        {1: []},
        {"detections on other images": 1},
    )  # of the file, beyond the limit


def test_ids_in_words_score_and_come_back(dataset, tmp_path):
    images = [{"id": name, "file_name": f"{i}.png", "height": 4, "width": 4} for i, name in ((1, "b"), (2, "a"))]
    rows = [annotation("x", image="a", category_id="cup"), annotation(0, image="b", category_id="cup")]
    categories = [{"id": "cup", "name": "cup"}]
    annotations = Annotations(*dataset(rows, images=images, categories=categories), "coco")
    path = tmp_path / "detections.json"
    path.write_text(json.dumps([GOOD | {"image_id": name, "category_id": "cup"} for name in "ab"]))
    found, left_out = read_detections(path, annotations)
    assert not left_out and [len(rows) for rows in found.values()] == [1, 1]
    evaluator = InstanceAP(annotations)
    square = np.zeros((4, 4), bool)
    square[1:3, 1:3] = True
    for photo in annotations.photos:
        (detection,) = found[photo.id]
        evaluator.process(photo, [detection | {"counts": encode_mask(square)["counts"]}])
    assert evaluator.evaluate()[0]["AP"] == pytest.approx(100)
    assert [(row["image_id"], row["category_id"]) for row in evaluator.results] == [("a", "cup"), ("b", "cup")]


def test_boxes_become_masks_with_the_detectors_class_and_score(predictor):
    annotations = coco_photos(1)
    boxes, left_out = true_boxes(annotations)
    detections = [d | {"score": 0.1 * i} for i, d in enumerate(boxes[predictor.photo.id])]
    plain, refined = (predict_boxes(predictor, detections, refine=r) for r in (False, True))
    assert [(row["category_id"], row["score"]) for row in plain] == [
        (d["category_id"], d["score"]) for d in detections
    ]
    i = 0
    masks, scores, logits = predictor.predict(box=np.array(detections[i]["box"]))
    again, again_scores, _ = predictor.predict(
        box=np.array(detections[i]["box"]), mask_input=logits[[scores.argmax()]]
    )
    for row, mask in ((plain[i], masks[scores.argmax()]), (refined[i], again[again_scores.argmax()])):
        rles = [{"size": list(mask.shape), "counts": c.encode()} for c in (row["counts"], encode_mask(mask)["counts"])]
        assert rle_tools.iou(rles[:1], rles[1:], [0])[0, 0] > 0.99
    single = predict_boxes(predictor, detections, single_mask=True)
    expected = predictor.predict(box=np.array(detections[i]["box"]), multimask_output=False)[0][0]
    assert (
        iou(
            rle_tools.decode({"size": list(expected.shape), "counts": single[i]["counts"].encode()}).astype(bool),
            expected,
        )
        > 0.99
    )
