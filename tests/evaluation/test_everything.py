"""Objects among the masks of everything-mode: by hand, and on a real photo with a model that finds some."""

import json

import numpy as np
import pytest

from blsam.cli import main
from blsam.data.annotations import Annotations, encode_mask
from blsam.evaluation.everything import FoundObjects, predict_everything
from blsam.evaluation.report import everything_table
from tests.helpers import COCO, needs_data
from tests.photos import annotation


def rows_of(*masks):
    return [{"counts": encode_mask(mask)["counts"], "score": 1.0, "stability": 1.0} for mask in masks]


def test_a_4x4_case_by_hand(dataset):
    """One photo with two objects and two masks, one of which fits one of them; another photo without a mask."""
    annotations = Annotations(*dataset([annotation(1), annotation(2, area=96**2), annotation(3, image=2)]), "coco")
    evaluator = FoundObjects(annotations, 0.7)
    square, corner = np.zeros((2, 4, 4), bool)
    square[1:3, 1:3] = corner[:1, :1] = True
    evaluator.process(annotations.photos[0], rows_of(square, corner))
    evaluator.process(annotations.photos[1], [])
    figures = evaluator.evaluate()
    assert (figures["masks_median"], figures["masks_mean"], figures["photos_without"]) == (1.0, 1.0, 1)
    assert [figures[key] for key in ("count", "count_large", "count_small")] == [3, 1, 2]
    assert (
        figures["found"] == pytest.approx(200 / 3) and figures["found_large"] == 100 and figures["found_small"] == 50
    )
    assert figures["best_iou_small"] == 50
    assert "objects found               66.7" in everything_table(figures | {"images": 2})


def test_nothing_at_all(dataset):
    figures = FoundObjects(Annotations(*dataset([]), "coco"), 0.7).evaluate()
    assert figures["found"] is None and figures["count"] == 0 and figures["masks_median"] is None


def test_what_a_generator_says_is_kept():
    mask = np.eye(4, dtype=bool)

    class Generator:
        def generate(self, image):
            return [{"segmentation": mask, "predicted_iou": 0.9, "stability_score": 0.8}]

    row = predict_everything(Generator(), np.zeros((4, 4, 3), np.uint8))[0]
    assert row == {"counts": encode_mask(mask)["counts"], "score": 0.9, "stability": 0.8}


@needs_data
def test_the_command_on_a_photo(tmp_path, capsys):
    """With filters as loose as the small model needs; the figures are those of the json."""
    command = ["evaluate", "everything", "--model", "vit_t", *map(str, COCO), "--limit", "1"]
    loose = ["--points-per-side", "4", "--pred-iou-thresh", "0.5", "--stability-score-thresh", "0.5"]
    out = tmp_path / "out.json"
    assert not main([*command, *loose, "--output", str(tmp_path / "run"), "--json", str(out)])
    figures = json.loads(out.read_text())
    assert figures["masks_mean"] > 0 and figures["images"] == 1 and figures["count"] > 0
    assert 0 < figures["best_iou"] <= 100 and figures["images_per_second"]["masks"] > 0
    assert f"masks a photo: median {figures['masks_median']:.0f}" in capsys.readouterr().out
