"""Everything in a photo, beside segment_anything's generator."""

import pytest
import segment_anything as sa
import torch

from blsam import SamAutomaticMaskGenerator, SamPredictor, sam_model_registry
from blsam.options import shipped_checkpoint
from tests.photos import PHOTOS


@pytest.mark.parametrize("crops", [0, 1])
def test_everything_equals_segment_anything_s_generator(crops):
    """Same photo, same weights; the thresholds leave some masks and drop others."""
    small = sam_model_registry["vit_t"](shipped_checkpoint("vit_t"), image_size=256)
    options = dict(points_per_side=4, pred_iou_thresh=0.2, stability_score_thresh=0.2, crop_n_layers=crops)
    theirs = sa.SamAutomaticMaskGenerator(small, **options)
    theirs.predictor = SamPredictor(small)  # release 1.0's own fails on sizes other than 1024
    expected, found = (g.generate(PHOTOS["landscape"]) for g in (theirs, SamAutomaticMaskGenerator(small, **options)))
    assert len(found) == len(expected) > 0
    for a, b in zip(found, expected):
        assert a["bbox"] == b["bbox"] and a["point_coords"] == b["point_coords"]
        assert a["predicted_iou"] == pytest.approx(b["predicted_iou"], abs=1e-4)
        assert (a["segmentation"] ^ b["segmentation"]).mean() <= 1e-3
    assert (
        SamAutomaticMaskGenerator(small, points_per_side=2, pred_iou_thresh=0.999).generate(PHOTOS["portrait"]) == []
    )


def test_the_generator_makes_its_tensors_where_the_model_is(monkeypatch):
    generator = SamAutomaticMaskGenerator(sam_model_registry["vit_t"](image_size=64).to("meta"), points_per_side=1)
    monkeypatch.setattr(sa.SamAutomaticMaskGenerator, "generate", lambda self, image: torch.zeros(1).device.type)
    assert generator.generate(PHOTOS["landscape"]) == "meta"
