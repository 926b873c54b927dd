"""napari-sam and napari-segment-anything: builders by place, swapped features, boxes nobody checked, boolean labels."""

import numpy as np
import pytest

import blsam
from tests.clients.conftest import SIZE
from tests.photos import PHOTOS

PHOTO = PHOTOS["landscape"]
AUTO = {
    "points_per_side": 4,
    "points_per_batch": 8,
    "pred_iou_thresh": 0.5,
    "stability_score_thresh": 0.6,
    "stability_score_offset": 1.0,
    "box_nms_thresh": 0.7,
    "crop_n_layers": 0,
    "crop_nms_thresh": 0.7,
    "crop_overlap_ratio": 0.3413,
    "crop_n_points_downscale_factor": 1,
    "min_mask_region_area": 0,
}


def test_slices_of_a_volume(sides):
    """Features and logits are kept for every slice, and put back when the user clicks there."""

    def program(side):
        sam = side.api.sam_model_registry[side.model_type](side.checkpoint)  # by place
        sam.to("cpu")
        predictor, features, logits = side.api.SamPredictor(sam), [], {}
        for image in (PHOTO, PHOTO[::-1]):
            predictor.set_image(image)
            features.append(predictor.features)
        results = []
        for index in (0, 1, 0):
            predictor.features = features[index]
            masks, _, logits[index] = predictor.predict(
                point_coords=np.array([[220, 110]]),
                point_labels=np.asarray([1]),
                box=None,
                mask_input=logits.get(index),
                multimask_output=False,
            )
            results.append(masks[0])
        return results, logits

    sides.compare(program)


BOXES = {
    "reversed": [300, 280, 120, 20],
    "a point": [150, 150, 150, 150],
    "a line": [150, 20, 150, 200],
    "partly outside": [-40, -20, 700, 100],
    "outside": [600, 400, 700, 500],
}


@pytest.mark.parametrize("box", BOXES)
def test_boxes_are_not_checked(sides, box):
    def program(side):
        predictor = side.predictor(PHOTO)
        return predictor.predict(
            point_coords=None, point_labels=None, box=np.array(BOXES[box]), mask_input=None, multimask_output=False
        )

    sides.compare(program)


def test_everything_in_an_image(sides):
    def program(side):
        generator = side.api.SamAutomaticMaskGenerator(side.build(), **AUTO)
        records = generator.generate(PHOTO)
        return np.argmax(np.asarray([record["segmentation"] for record in records]), axis=0)

    sides.compare(program)


def test_labels_are_booleans_and_boxes_have_a_batch(sides):
    def program(side):
        predictor = side.predictor(PHOTO)
        boxes = np.asarray([[120, 20, 300, 280]])
        first = predictor.predict(
            point_coords=np.array([[220.0, 110.0], [20, 20]]),
            point_labels=np.array([True, False]),
            mask_input=None,
            multimask_output=False,
        )
        again = predictor.predict(
            point_coords=None, point_labels=None, box=boxes, mask_input=first[2], multimask_output=False
        )
        return first, again

    sides.compare(program)


def test_the_registry_is_a_menu():
    assert {"default", "vit_h", "vit_l", "vit_b"} <= set(blsam.sam_model_registry.keys())


IMPORTS = """
from segment_anything import SamAutomaticMaskGenerator, SamPredictor, sam_model_registry
from segment_anything import build_sam_vit_b, build_sam_vit_h, build_sam_vit_l
from segment_anything.automatic_mask_generator import SamAutomaticMaskGenerator as Generator
from segment_anything.build_sam import build_sam, sam_model_registry as registry
from segment_anything.predictor import SamPredictor as Predictor
found = dict(locals())
"""


def names_found():
    found = {}
    exec(IMPORTS, found)
    return found["found"]


def test_what_programs_import_is_ours_once_installed():
    with blsam.install():
        found = names_found()
        assert found["Predictor"] is found["SamPredictor"] is blsam.SamPredictor
        assert found["Generator"] is found["SamAutomaticMaskGenerator"] is blsam.SamAutomaticMaskGenerator
        assert found["registry"] is found["sam_model_registry"]
        assert found["sam_model_registry"]["vit_b"] is found["build_sam_vit_b"] is blsam.build_sam_vit_b
        assert found["build_sam_vit_h"] is found["build_sam_vit_h"] is blsam.build_sam_vit_h
        assert {"vit_t", "blsam_vit_t"} <= set(found["sam_model_registry"])
    names = {key: value for key, value in names_found().items() if not key.startswith("_")}
    assert not [key for key, value in names.items() if getattr(value, "__module__", "").startswith("blsam")]
    assert "blsam_vit_t" not in names["sam_model_registry"]


def test_a_program_that_is_imported_after_install(checkpoints, tmp_path, monkeypatch):
    (tmp_path / "some_client.py").write_text(
        "from segment_anything import SamPredictor, sam_model_registry\n"
        "def masks(kind, checkpoint, image):\n"
        "    predictor = SamPredictor(sam_model_registry[kind](checkpoint=checkpoint))\n"
        "    predictor.set_image(image)\n"
        "    return predictor, predictor.predict(point_coords=None, point_labels=None)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    with blsam.install():
        import some_client

        predictor, (masks, _, _) = some_client.masks("blsam_vit_t", checkpoints["blsam_vit_t"], PHOTO)
    assert isinstance(predictor, blsam.SamPredictor) and predictor.model.image_encoder.img_size == SIZE
    assert masks.shape == (3, *PHOTO.shape[:2])
