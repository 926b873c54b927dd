"""Prompted mean IoU by hand and against pycocotools, and how objects are prompted."""

import dataclasses
from dataclasses import replace

import numpy as np
import pytest
from pycocotools import mask as rle_tools

from blsam import SamPredictor, sam_model_registry
from blsam.data.annotations import Annotations, encode_mask
from blsam.data.prompts import centre_point
from blsam.decoding import decode, upscale
from blsam.evaluation.prompted import (
    DISC_RADII,
    PromptedIoU,
    bootstrap,
    disc_ious,
    filled_box,
    inscribed_ellipse,
    iou,
    object_ious,
    predict_objects,
    rank_correlation,
    shape_ious,
)
from blsam.evaluation.protocols import PROTOCOLS, Protocol
from blsam.images import read_image
from tests.helpers import needs_data
from tests.photos import annotation, coco_photos

# --- figures ---------------------------------------------------------------------------------------------------------


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
    assert figures["score_error"] == pytest.approx(
        np.mean([abs(score - v) for score, v in ((1, 1), (1, 0.25), (1, 1 / 3))])
    )
    assert figures["score_rank"] is None  # of scores that are all the same
    evaluator.reset()
    figures = evaluator.evaluate()
    assert figures["miou"] is None and figures["count"] == 0 and figures["interval_95"] is None


@pytest.mark.parametrize("ids", [("cup", "b"), (0, -3), (None, "7")])
def test_rows_carry_the_ids_of_the_file(dataset, ids):
    """Which the scorers cannot work with."""
    rows = [annotation(name, image=image) for name, image in zip(ids, ("left", "right"))]
    images = [{"id": image, "file_name": f"{i}.png"} for i, image in ((1, "left"), (2, "right"))]
    annotations = Annotations(*dataset(rows, images=images), "coco")
    evaluator = PromptedIoU(annotations, PROTOCOLS["paper"], "box")
    for photo in annotations.photos:
        (target,), _ = annotations.targets(photo, crowd=False)
        evaluator.process(photo, [predicted(target.id, target.mask)])
    assert [(row["image"], row["annotation"]) for row in evaluator.rows] == list(zip(("left", "right"), ids))
    assert evaluator.evaluate()["miou"] == pytest.approx(100)


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


# --- prompts and masks -----------------------------------------------------------------------------------------------


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


def test_object_ious_are_those_of_the_evaluator(annotated, weights):
    folder, json_path = annotated
    annotations = Annotations(json_path, folder, "coco")
    sam = sam_model_registry["blsam_vit_t"](weights["blsam_vit_t"], keep_ratio=0.25)
    ious, images = object_ious(sam, annotations, 0.5, ("box", "center"))
    assert sam.image_encoder.keep_ratio == 0.25
    sam.image_encoder.keep_ratio = 0.5
    predictor, protocol = SamPredictor(sam), replace(PROTOCOLS["paper"], sampling="center")
    evaluators = {
        "box": PromptedIoU(annotations, protocol, "box"),
        "center": PromptedIoU(annotations, protocol, "point"),
    }
    for photo in annotations.photos:
        predictor.set_image(read_image(photo.path, upright=False))
        targets, _ = annotations.targets(photo, crowd=False)
        for evaluator in evaluators.values():
            evaluator.process(photo, predict_objects(predictor, targets, protocol, evaluator.prompt, 1, seed=0))
    for name, evaluator in evaluators.items():
        assert ious[name] == pytest.approx([100 * row["iou"] for row in evaluator.rows])
        assert ious[name].mean() == pytest.approx(evaluator.evaluate()["miou"])
    assert images.tolist() == [row["image"] for row in evaluators["box"].rows]


def test_rank_correlation_is_scipys():
    from scipy.stats import spearmanr

    rng = np.random.default_rng(0)
    a = rng.integers(0, 5, 50) / 4  # with ties
    b = a + rng.normal(0, 0.3, 50)
    assert rank_correlation(a, b) == pytest.approx(spearmanr(a, b).statistic)
    assert rank_correlation(a, -a) == pytest.approx(-1) and rank_correlation(a, 0 * a) is None
