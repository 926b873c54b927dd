"""Prompted mean IoU and average precision: by hand, against pycocotools, and fed with the true masks."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from conftest import DATA
from pycocotools import mask as rle_tools
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from test_annotations import annotation, dataset  # noqa: F401 (a fixture)

from blsam import SamPredictor, sam_model_registry
from blsam.data.annotations import Annotations, encode_mask
from blsam.data.prompts import centre_point
from blsam.decoding import decode, upscale
from blsam.evaluation.instance_ap import InstanceAP, predict_boxes, read_detections, true_boxes
from blsam.evaluation.prompted import (
    DISC_RADII,
    PromptedIoU,
    bootstrap,
    disc_ious,
    filled_box,
    inscribed_ellipse,
    iou,
    predict_objects,
    shape_ious,
)
from blsam.evaluation.protocols import PROTOCOLS, Protocol

needs_data = pytest.mark.skipif(not (DATA / "coco").is_dir(), reason="no coco photos (BLSAM_DATA)")


def coco_photos(limit=None):
    return Annotations(DATA / "coco" / "instances_val2017.json", DATA / "coco" / "val2017", "coco", limit)


def lvis_photos():
    pytest.importorskip("lvis")
    return Annotations(DATA / "lvis" / "lvis_v0.5_val.json", DATA / "lvis", "lvis")


# --- mean IoU --------------------------------------------------------------------------------------------------------


def test_a_4x4_case_by_hand(dataset):  # noqa: F811
    """Two objects on one photo, one on another; IoU 1, 1/4 and 2/6."""
    big = [[0, 0, 4, 0, 4, 4, 0, 4]]
    rows = [
        annotation(1),
        annotation(2, segmentation=big, area=96**2, bbox=[0, 0, 4, 4]),  # the border belongs to both sizes
        annotation(3, image=2),
    ]
    annotations = Annotations(*dataset(rows), "coco")
    evaluator = PromptedIoU(annotations, PROTOCOLS["paper"], "box")
    square, quarter, shifted = (np.zeros((4, 4), bool) for _ in range(3))
    square[1:3, 1:3] = quarter[:2, :2] = shifted[1:3, 2:4] = True
    evaluator.process(annotations.photos[0], [predicted(1, square), predicted(2, quarter)])
    evaluator.process(annotations.photos[1], [predicted(3, shifted)])
    figures = evaluator.evaluate()
    assert figures["miou"] == pytest.approx(100 * (1 + 4 / 16 + 2 / 6) / 3)
    assert (figures["miou_large"], figures["miou_medium"]) == (25.0, 25.0)
    assert figures["miou_small"] == pytest.approx(100 * (1 + 2 / 6) / 2)
    assert [figures[k] for k in ("count", "count_large", "count_medium", "count_small")] == [3, 1, 1, 2]
    assert figures["baseline_filled_box"] == 100.0
    low, high = figures["interval_95"]
    assert low == pytest.approx(100 / 3) and high == pytest.approx(62.5)  # all draws of image 2, or of image 1
    evaluator.reset()
    figures = evaluator.evaluate()
    assert figures["miou"] is None and figures["count"] == 0 and figures["interval_95"] is None


def predicted(number, mask, points=()):
    row = {"id": number, "counts": encode_mask(mask)["counts"], "score": 1.0}
    return row | ({"points": points} if points else {})


@needs_data
def test_iou_agrees_with_pycocotools_and_numpy_on_perturbed_masks():
    annotations = coco_photos(5)
    evaluator = PromptedIoU(annotations, PROTOCOLS["efficientvit"], "box")
    expected = []
    for photo in annotations.photos:
        targets, _ = annotations.targets(photo, crowd=True, min_area=1)
        masks = [np.roll(target.mask, (3, -2), (0, 1)) for target in targets]
        evaluator.process(photo, [predicted(target.id, mask) for target, mask in zip(targets, masks)])
        expected += [iou(mask, target.mask) for target, mask in zip(targets, masks)]
    assert any(a["iscrowd"] for a in annotations.api.anns.values())
    assert np.allclose([row["iou"] for row in evaluator.rows], expected, atol=1e-12)
    assert evaluator.evaluate()["miou"] == pytest.approx(100 * np.mean(expected))


def test_bootstrap_draws_whole_images():
    rng = np.random.default_rng(1)
    effect = rng.normal(size=200)
    images = np.repeat(np.arange(200), 5)
    values = effect[images] + 0.01 * rng.normal(size=1000)
    low, high = bootstrap(values, images, seed=0)
    assert (high - low) / 2 == pytest.approx(1.96 / np.sqrt(200), rel=0.15)  # not / sqrt(1000)
    assert bootstrap(values, images, seed=0) == [low, high]


def test_baselines():
    y, x = np.ogrid[:4, :4]
    assert filled_box((1, 0, 3, 2), y, x).nonzero()[0].tolist() == [0, 0, 1, 1]
    y, x = np.ogrid[:60, :100]
    ellipse = inscribed_ellipse((0, 0, 100, 60), y, x)
    assert abs(ellipse.sum() / (np.pi * 50 * 30) - 1) < 0.01
    # only the box's pixels are looked at, with the result of the whole photo
    rng = np.random.default_rng(0)
    for box in ((3.2, 4.9, 40.5, 33.1), (60, 20, 99.99, 60), (-3, -2, 20, 20)):
        mask = rng.random((60, 100)) < 0.3
        found = shape_ious(box, mask)
        assert found["ellipse"] == pytest.approx(iou(inscribed_ellipse(box, y, x), mask))
        assert found["filled_box"] == pytest.approx(iou(filled_box(box, y, x), mask))


def test_discs():
    rng = np.random.default_rng(0)
    mask = rng.random((60, 100)) < 0.3
    y, x = np.ogrid[:60, :100]
    for click in ((50.0, 30.0, 1), (0.0, 0.0, 1), (99.0, 3.0, 1)):
        discs = [(x - click[0]) ** 2 + (y - click[1]) ** 2 <= (r * 100) ** 2 for r in DISC_RADII]
        assert np.allclose(disc_ious(click, mask), [iou(disc, mask) for disc in discs])


# --- prompts, masks, rules -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def predictor():
    """The dense model that ships, on the first COCO photo."""
    if not (DATA / "coco").is_dir():
        pytest.skip("no coco photos (BLSAM_DATA)")
    from blsam.images import read_image
    from blsam.options import shipped_checkpoint

    predictor = SamPredictor(sam_model_registry["vit_t"](shipped_checkpoint("vit_t")))
    predictor.photo = coco_photos(1).photos[0]
    predictor.set_image(read_image(predictor.photo.path, upright=False))
    return predictor


@pytest.fixture(scope="module")
def targets(predictor):
    return coco_photos(1).targets(predictor.photo, crowd=False)[0]


def test_prompts_decoded_together_equal_the_predictor_one_by_one(predictor, targets):
    boxes = [target.box for target in targets]
    many = decode(predictor, boxes=boxes)
    points = [[(*centre_point(target.mask)[:2], 1), (1.0, 2.0, 0)] for target in targets]
    clicked = decode(predictor, points=points, logits=many.logits[:, :1], three=False)
    best = upscale(predictor, many.logits[:, 0])
    for i, target in enumerate(targets):
        masks, scores, logits = predictor.predict(box=np.array(target.box))
        assert np.allclose(scores, many.scores[i], atol=1e-4) and np.abs(logits - many.logits[i].numpy()).max() < 1e-2
        assert (masks[0] ^ best[i]).mean() < 1e-3
        coords, labels = np.array(points[i])[:, :2], np.array(points[i])[:, 2]
        _, scores, _ = predictor.predict(coords, labels, mask_input=logits[:1], multimask_output=False)
        assert np.allclose(scores, clicked.scores[i], atol=1e-4)


def calls(predictor, targets, protocol, prompt, num_points, monkeypatch):
    """What `predict_objects` asks the decoder for: (points an object, labels of the first, logits?, three?)."""
    seen = []

    def spy(predictor, *, points=None, boxes=None, logits=None, three=True):
        labels = [p[2] for p in points[0]] if points else "box"
        seen.append((len(points[0]) if points else 0, labels, logits is not None, three))
        return decode(predictor, points=points, boxes=boxes, logits=logits, three=three)

    monkeypatch.setattr("blsam.evaluation.prompted.decode", spy)
    return seen, predict_objects(predictor, targets, protocol, prompt, num_points, seed=0)


def test_rules_of_the_protocols(predictor, targets, monkeypatch):
    seen, rows = calls(predictor, targets, PROTOCOLS["paper"], "point", 3, monkeypatch)
    assert seen == [(3, [1, 1, 1], False, True)]
    for row, target in zip(rows, targets):
        assert all(target.mask[int(y), int(x)] for x, y, _ in row["points"])
    seen, rows = calls(predictor, targets, PROTOCOLS["efficientvit"], "point", 3, monkeypatch)
    assert [(n, logits, three) for n, _, logits, three in seen] == [(n, False, True) for n in (1, 2, 3)]
    assert tuple(rows[0]["points"][0]) == centre_point(targets[0].mask)
    seen, rows = calls(predictor, targets, PROTOCOLS["sam"], "point", 3, monkeypatch)
    assert [(n, logits, three) for n, _, logits, three in seen] == [
        (1, False, True),
        (2, True, False),
        (3, True, False),
    ]
    for row, target in zip(rows, targets):
        assert all(label == target.mask[int(y), int(x)] for x, y, label in row["points"])
    seen, _ = calls(predictor, targets, PROTOCOLS["paper"], "box", 1, monkeypatch)
    assert seen == [(0, "box", False, True)]
    single = Protocol("paper", single_mask="always")
    assert calls(predictor, targets, single, "box", 1, monkeypatch)[0] == [(0, "box", False, False)]


def test_an_object_that_is_found_exactly_gets_no_further_click(predictor, targets, monkeypatch):
    found = decode(predictor, points=[[centre_point(targets[0].mask)]])
    best = upscale(predictor, found.logits[:, found.scores.argmax()])[0]

    rle = encode_mask(best)
    easy = dataclasses.replace(targets[0], rle=rle | {"counts": rle["counts"].encode()})
    clicked = {id(easy): centre_point(targets[0].mask)}  # the click that gives just this mask
    monkeypatch.setattr(Protocol, "next_clicks", first_click_of(clicked, Protocol.next_clicks), raising=True)
    rows = predict_objects(predictor, [easy, targets[1]], PROTOCOLS["sam"], "point", 3, seed=0)
    assert [len(row["points"]) for row in rows] == [1, 3]
    assert np.array_equal(rle_tools.decode({**easy.rle, "counts": rows[0]["counts"].encode()}).astype(bool), best)


def first_click_of(clicked, usual):
    """`next_clicks` that begins with a given click on some objects."""

    def next_clicks(self, target, mask, prediction, earlier, total, seed):
        if not earlier and id(target) in clicked:
            return [clicked[id(target)]]
        return usual(self, target, mask, prediction, earlier, total, seed)

    return next_clicks


def test_oracle_takes_the_best_by_true_iou(predictor, targets):
    by_score = predict_objects(predictor, targets, PROTOCOLS["paper"], "box", 1, seed=0)
    oracle = predict_objects(predictor, targets, Protocol("paper", select="oracle"), "box", 1, seed=0)
    three = decode(predictor, boxes=[target.box for target in targets])
    full = [upscale(predictor, three.logits[:, m]) for m in range(3)]
    for i, target in enumerate(targets):
        ious = [iou(full[m][i], target.mask) for m in range(3)]
        size = list(target.mask.shape)
        found = [rle_tools.decode({"size": size, "counts": rows[i]["counts"].encode()}) for rows in (by_score, oracle)]
        assert iou(found[1].astype(bool), target.mask) == pytest.approx(max(ious))
        assert iou(found[0].astype(bool), target.mask) == pytest.approx(ious[int(three.scores[i].argmax())])


def test_predictions_do_not_depend_on_the_other_objects(predictor, targets):
    together = predict_objects(predictor, targets, PROTOCOLS["paper"], "point", 3, seed=0)
    alone = [predict_objects(predictor, [target], PROTOCOLS["paper"], "point", 3, seed=0)[0] for target in targets]
    assert [row["points"] for row in together] == [row["points"] for row in alone]
    for a, b, target in zip(together, alone, targets):
        rles = [{"size": list(target.mask.shape), "counts": row["counts"].encode()} for row in (a, b)]
        assert abs(np.diff(rle_tools.iou(rles, [target.rle], [0])[:, 0])[0]) < 1e-3


def test_heads_state_every_rule():
    assert PROTOCOLS["paper"].rules("point", 3) == (
        "3 points (uniform in the mask, drawn at once); 3 masks, most confident; crowd left out"
    )
    assert PROTOCOLS["sam"].rules("point", 2) == (
        "2 points (centre of the mask, then farthest error); 3 masks, 1 from the second prompt on, most confident; "
        "logits fed back; crowd left out"
    )
    assert (
        PROTOCOLS["efficientvit"].rules("box", 1)
        == "true box; 3 masks, most confident; areas below 1 left out; crowd included"
    )


# --- average precision -----------------------------------------------------------------------------------------------


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


def test_detections_are_read_and_checked(dataset, tmp_path):  # noqa: F811
    annotations = Annotations(*dataset([annotation(1)]), "coco")
    path = tmp_path / "detections.json"
    good = {"image_id": 1, "category_id": 1, "bbox": [1, 1, 2, 2], "score": 0.5}
    path.write_text(
        json.dumps([good, good | {"image_id": 9}, good | {"bbox": [1, 1, 0, 2]}, good | {"category_id": 77}])
    )
    found, left_out = read_detections(path, annotations)
    assert found == {1: [{"category_id": 1, "box": (1.0, 1.0, 3.0, 3.0), "score": 0.5}], 2: []}
    assert left_out == {"detections on other images": 1, "box without area": 1, "detections of unknown categories": 1}
    path.write_text(json.dumps([good | {"category_id": 0}]))
    with pytest.raises(ValueError, match="no detection has a category"):
        read_detections(path, annotations)
    for bad in ({"image_id": 1}, good | {"bbox": None}, good | {"score": None}, 3):
        path.write_text(json.dumps([bad]))
        with pytest.raises(ValueError, match="needs image_id, category_id, bbox"):
            read_detections(path, annotations)
    path.write_text("{}")
    with pytest.raises(ValueError, match="must be a list"):
        read_detections(path, annotations)
    with pytest.raises(FileNotFoundError, match="no detections"):
        read_detections(tmp_path / "none.json", annotations)


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


def test_no_gradients_are_kept(predictor, targets):
    assert not decode(predictor, boxes=[targets[0].box]).logits.requires_grad
    assert torch.is_grad_enabled()
