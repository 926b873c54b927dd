"""The predictor path against segment_anything's, and the checks of prompts."""

import numpy as np
import pytest
import segment_anything as sa
import torch
from conftest import DATA, gap, reference_encoder
from segment_anything.modeling import MaskDecoder, PromptEncoder, Sam, TwoWayTransformer
from skimage import data

from blsam import SamAutomaticMaskGenerator, SamPredictor, sam_model_registry
from blsam.config import CONFIGS
from blsam.options import shipped_checkpoint
from blsam.predictor import ResizeLongestSide, check_prompts

TRIAL = DATA / "trial" / "vit_t_512.pth"
PHOTOS = {"landscape": data.astronaut()[:300], "portrait": data.astronaut()[:, 100:400]}


@pytest.fixture(scope="module")
def predictors():
    """Ours and segment_anything's on the same weights."""
    config = CONFIGS["vit_t"]
    reference = Sam(
        reference_encoder(config, 512),
        PromptEncoder(embed_dim=256, image_embedding_size=(32, 32), input_image_size=(512, 512), mask_in_chans=16),
        MaskDecoder(
            transformer_dim=256, transformer=TwoWayTransformer(depth=2, embedding_dim=256, mlp_dim=2048, num_heads=8)
        ),
    ).eval()
    reference.load_state_dict(torch.load(TRIAL, weights_only=True))
    return SamPredictor(sam_model_registry["vit_t"](TRIAL)), sa.SamPredictor(reference)


@pytest.mark.skipif(not TRIAL.is_file(), reason=f"no weights at {TRIAL} (set BLSAM_DATA)")
@pytest.mark.parametrize("photo", PHOTOS)
def test_predictor_equals_segment_anything(predictors, photo):
    ours, reference = predictors
    for predictor in predictors:
        predictor.set_image(PHOTOS[photo])
    one, two = (np.array([[150.0, 120.0]]), np.array([1])), (np.array([[150.0, 120.0], [20, 20]]), np.array([1, 0]))
    box = np.array([60.0, 20, 250, 280])
    first = reference.predict(*one)[2][:1]
    prompts = {
        "point": {"point_coords": one[0], "point_labels": one[1]},
        "single": {"point_coords": two[0], "point_labels": two[1], "multimask_output": False},
        "box": {"box": box},
        "all": {"point_coords": two[0], "point_labels": two[1], "box": box, "mask_input": first},
    }
    for name, prompt in prompts.items():
        (masks, scores, _), (expected, expected_scores, _) = ours.predict(**prompt), reference.predict(**prompt)
        assert masks.shape == expected.shape
        different = (masks != expected).mean()
        assert different <= 1e-3, f"{name}: {different:.2%} of the pixels differ"
        assert np.abs(scores - expected_scores).max() <= 1e-4, f"{name}: {scores} {expected_scores}"


@pytest.fixture(scope="module")
def small():
    return sam_model_registry["blsam_vit_t"](shipped_checkpoint("blsam_vit_t"), image_size=256)


def test_sam_forward_passes_extents_and_equals_the_predictor(small):
    predictor, records = SamPredictor(small), []
    boxes = torch.tensor([[60.0, 20, 250, 280]])
    for image in PHOTOS.values():
        resized = torch.as_tensor(predictor.transform.apply_image(image)).permute(2, 0, 1)
        frame = predictor.transform.apply_boxes_torch(boxes, image.shape[:2])
        records.append({"image": resized, "original_size": image.shape[:2], "boxes": frame})
    for image, result in zip(PHOTOS.values(), small(records, multimask_output=True)):
        predictor.set_image(image)
        masks, scores, _ = predictor.predict(box=boxes[0].numpy())
        assert (result["masks"][0].numpy() != masks).mean() <= 1e-3
        assert np.abs(result["iou_predictions"][0].numpy() - scores).max() <= 1e-4


def test_segment_anythings_own_tools_work_on_our_model(small):
    predictor = sa.SamPredictor(small)
    predictor.set_image(PHOTOS["landscape"])
    assert predictor.predict(box=np.array([60.0, 20, 250, 280]))[0].shape == (3, 300, 512)
    for generator in (SamAutomaticMaskGenerator, sa.SamAutomaticMaskGenerator):
        records = generator(small, points_per_side=3, pred_iou_thresh=0, stability_score_thresh=0).generate(
            PHOTOS["landscape"]
        )
        assert records and all(r["segmentation"].shape == (300, 512) for r in records)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ({"point_coords": [[1, 1]]}, "go together"),
        ({"point_coords": [1, 1], "point_labels": [1]}, r"\[N, 2\]"),
        ({"point_coords": [[1, 1]], "point_labels": [1, 1]}, "one for each point"),
        ({"point_coords": [[np.nan, 1]], "point_labels": [1]}, "finite"),
        ({"point_coords": [[1, 1]], "point_labels": [2]}, "1 \\(object\\)"),
        ({"box": [1, 1, 2]}, "four finite"),
        ({"box": [5, 1, 5, 9]}, "x1 < x2"),
        ({"box": [600, 1, 700, 9]}, "misses the image"),
        ({"mask_input": np.zeros((64, 64))}, "mask_input"),
    ],
)
def test_prompts_are_checked(prompt, message):
    given = {"point_coords": None, "point_labels": None, "box": None, "mask_input": None, **prompt}
    with pytest.raises(ValueError, match=message):
        check_prompts(**given, image_size=(300, 512))


def test_boxes_of_coco_touch_the_border_and_notebooks_add_a_dimension():
    for box in ([0, 0, 512, 300], [[0, 0, 512, 300]], [-3, -3, 10, 10]):
        check_prompts(None, None, box, None, (300, 512))


def test_a_point_outside_is_one_warning(small):
    predictor = SamPredictor(small)
    predictor.set_image(PHOTOS["landscape"])
    with pytest.warns(UserWarning, match="outside the image") as caught:
        predictor.predict(np.array([[600.0, 10.0]]), np.array([1]))
    assert len(caught) == 1


def test_torch_images_are_resized_by_their_height_and_width():
    assert ResizeLongestSide(64).apply_image_torch(torch.rand(2, 3, 100, 50)).shape == (2, 3, 64, 32)


def test_the_generator_makes_its_tensors_where_the_model_is(monkeypatch):
    generator = SamAutomaticMaskGenerator(sam_model_registry["vit_t"](image_size=64).to("meta"), points_per_side=1)
    monkeypatch.setattr(sa.SamAutomaticMaskGenerator, "generate", lambda self, image: torch.zeros(1).device.type)
    assert generator.generate(PHOTOS["landscape"]) == "meta"


def test_lists_are_taken_for_arrays(small):
    predictor = SamPredictor(small)
    predictor.set_image(PHOTOS["landscape"])
    from_lists = predictor.predict(point_coords=[[150, 120]], point_labels=[1], box=[60, 20, 250, 280])
    arrays = predictor.predict(np.array([[150, 120]]), np.array([1]), np.array([60, 20, 250, 280]))
    assert np.array_equal(from_lists[0], arrays[0])


def test_several_images_together_equal_one_by_one(small):
    predictor = SamPredictor(small)
    photos = [*PHOTOS.values(), PHOTOS["landscape"][:100, :90]]
    box = np.array([10, 10, 60, 60])
    alone = []
    for photo in photos:
        predictor.set_image(photo)
        alone.append((predictor.features.clone(), predictor.routing, predictor.predict(box=box)))
    predictor.set_images(photos)
    for i in reversed(range(len(photos))):
        predictor.use_image(i)
        features, routing, (masks, scores, _) = alone[i]
        assert all(torch.equal(a.mask, b.mask) for a, b in zip(routing.stages, predictor.routing.stages))
        assert gap(predictor.features, features) <= 1e-4
        together = predictor.predict(box=box)
        assert together[0].shape == masks.shape and (together[0] ^ masks).mean() <= 1e-3
        assert np.allclose(together[1], scores, atol=1e-4)


def test_set_images_checks(small):
    predictor = SamPredictor(small)
    with pytest.raises(ValueError, match="at least one image"):
        predictor.set_images([])
    with pytest.raises(ValueError, match="must be uint8"):
        predictor.set_images([PHOTOS["landscape"].astype(float)])
    predictor.set_images([PHOTOS["landscape"]])
    with pytest.raises(ValueError, match="image 1 is none of the 1"):
        predictor.use_image(1)
    predictor.set_image(PHOTOS["landscape"])
    with pytest.raises(ValueError, match="image 0 is none of the 0"):
        predictor.use_image(0)


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
