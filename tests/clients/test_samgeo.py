"""samgeo (segment-geospatial): positional prompts, torch boxes, a predictor that skips the constructor."""

import numpy as np
import torch
from segment_anything.utils.transforms import ResizeLongestSide

from tests.photos import PHOTOS

PHOTO = PHOTOS["landscape"]
FEW = {"points_per_side": 4, "pred_iou_thresh": 0.5, "stability_score_thresh": 0.6}


def test_points_and_boxes(sides):
    def program(side):
        sam = side.build()
        sam.to(device="cpu")
        predictor = side.api.SamPredictor(sam)
        predictor.set_image(PHOTO, image_format="RGB")
        point = predictor.predict(np.array([[220, 110]]), np.array([1]), None, None, True, False)
        box = predictor.predict(None, None, np.array([[120, 20, 300, 280]]), None, False, True)
        boxes = torch.tensor([[120, 20, 300, 280], [300, 30, 420, 200]], device=predictor.device)
        boxes = predictor.transform.apply_boxes_torch(boxes, PHOTO.shape[:2])
        several = predictor.predict_torch(point_coords=None, point_labels=None, boxes=boxes, multimask_output=True)
        return point, box, several

    sides.compare(program)


def test_a_subclass_that_skips_the_constructor(sides):
    def program(side):
        class SamGeoPredictor(side.api.SamPredictor):
            def __init__(self, sam_model):
                self.model = sam_model
                self.transform = ResizeLongestSide(sam_model.image_encoder.img_size)

            def set_image(self, image):
                super().set_image(image)

            def predict(self, box=None):
                return super().predict(None, None, box, None, True, False)

        predictor = SamGeoPredictor(side.build())
        predictor.set_image(PHOTO)
        return predictor.predict(np.array([120, 20, 300, 280]))

    sides.compare(program)


def test_weights_put_into_an_empty_model(sides):
    def program(side):
        sam = side.api.sam_model_registry[side.model_type]()
        sam.load_state_dict(torch.load(side.checkpoint, map_location="cpu"), strict=True)
        predictor = side.api.SamPredictor(sam.eval())
        predictor.set_image(PHOTO)
        return predictor.features, predictor.predict(np.array([[220, 110]]), np.array([1]))

    sides.compare(program)


def test_sams_weights_put_into_an_empty_model(both):
    """All keys of SAM, none of ours: what is new starts as in a fresh model, so that all tokens give SAM's embedding."""
    sides = both("blsam_vit_t")
    sam = sides.ours.api.sam_model_registry["blsam_vit_t"](keep_ratio=1.0)
    sam.load_state_dict(torch.load(sides.stock.checkpoint), strict=True)
    expected, found = sides.stock.predictor(PHOTO).features, sides.ours.api.SamPredictor(sam)
    found.set_image(PHOTO)
    gap = (found.features - expected).abs().max() / expected.std()
    assert gap <= 1e-4, f"{gap:.1e}"


def test_everything_in_an_image(sides):
    def program(side):
        records = side.api.SamAutomaticMaskGenerator(side.build(), **FEW).generate(PHOTO)
        assert records
        return sorted(records, key=lambda record: record["area"], reverse=True)

    sides.compare(program)
