"""The predictor path against segment_anything's, and the checks of prompts."""

import threading

import numpy as np
import pytest
import segment_anything as sa
import torch
from PIL import Image
from segment_anything.modeling import MaskDecoder, PromptEncoder, Sam, TwoWayTransformer

from blsam import SamAutomaticMaskGenerator, SamPredictor, sam_model_registry
from blsam.config import CONFIGS
from blsam.encoded import Encoded
from blsam.modeling.routing import Routing
from blsam.predictor import ResizeLongestSide, check_prompts
from scripts.benchmarks.benchmark_row import reference_encoder
from tests.helpers import DATA, gap
from tests.photos import PHOTOS

TRIAL = DATA / "trial" / "vit_t_512.pth"


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
        ({"point_coords": [[1, 1]], "point_labels": [np.nan]}, "finite"),
        ({"point_coords": [["a", "b"]], "point_labels": [1]}, "finite"),
        ({"point_labels": [1]}, "without point_coords"),
        ({"box": np.zeros((100, 4))}, "predict_torch takes many"),
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


SENSELESS = {
    "outside": {"point_coords": np.array([[600.0, 10.0]]), "point_labels": np.array([1])},
    "labels": {"point_coords": np.array([[10.0, 10.0], [90.0, 90.0]]), "point_labels": np.array([2, 3])},
    "reversed": {"box": np.array([250.0, 280.0, 60.0, 20.0])},
    "empty": {"box": np.array([60.0, 20.0, 60.0, 20.0])},
    "misses": {"box": np.array([600.0, 20.0, 700.0, 90.0])},
    "no points": {"point_labels": np.array([1])},
}


@pytest.mark.skipif(not TRIAL.is_file(), reason=f"no weights at {TRIAL} (set BLSAM_DATA)")
@pytest.mark.parametrize("name", SENSELESS)
def test_what_sam_answers_is_answered_with_one_warning(predictors, name):
    ours, reference = predictors
    for predictor in predictors:
        predictor.set_image(PHOTOS["landscape"])
    with pytest.warns(UserWarning, match="little meaning") as caught:
        masks, scores, _ = ours.predict(**SENSELESS[name])
    assert len(caught) == 1
    expected, expected_scores, _ = reference.predict(**SENSELESS[name])
    assert (masks != expected).mean() <= 1e-3 and np.abs(scores - expected_scores).max() <= 1e-4


@pytest.mark.skipif(not TRIAL.is_file(), reason=f"no weights at {TRIAL} (set BLSAM_DATA)")
def test_no_points_beside_a_box(predictors):
    ours, reference = predictors
    for predictor in predictors:
        predictor.set_image(PHOTOS["landscape"])
    box, none = np.array([60.0, 20, 250, 280]), (np.empty((0, 2)), np.empty(0))
    expected = reference.predict(*none, box=box)[1]
    for points in (none, ([], []), (np.empty((0, 2)), np.empty((0, 1)))):
        assert np.abs(ours.predict(*points, box=box)[1] - expected).max() <= 1e-4
    assert np.abs(ours.predict([], [])[1] - reference.predict(*none)[1]).max() <= 1e-4


@pytest.mark.skipif(not TRIAL.is_file(), reason=f"no weights at {TRIAL} (set BLSAM_DATA)")
def test_a_batch_in_set_torch_image(predictors):
    batch = torch.rand(2, 3, 300, 512, generator=torch.Generator().manual_seed(0)) * 255
    for predictor in predictors:
        predictor.set_torch_image(batch, (300, 512))
    found, expected = (predictor.get_image_embedding() for predictor in predictors)
    assert found.shape == expected.shape and gap(found, expected) <= 1e-4
    assert found.is_contiguous()


def test_no_prompts_give_no_masks(small):
    predictor = SamPredictor(small)
    predictor.set_image(PHOTOS["landscape"])
    for given in (
        {"boxes": torch.zeros(0, 4)},
        {"point_coords": torch.zeros(0, 1, 2), "point_labels": torch.zeros(0, 1)},
    ):
        for three, logits in ((True, False), (False, True)):
            prompts = {"point_coords": None, "point_labels": None, "boxes": None, **given}
            wanted = predictor.predict_torch(
                **{k: None if v is None else torch.ones(1, *v.shape[1:]) for k, v in prompts.items()},
                multimask_output=three,
                return_logits=logits,
            )
            found = predictor.predict_torch(**prompts, multimask_output=three, return_logits=logits)
            for mine, one in zip(found, wanted):
                assert mine.shape == (0, *one.shape[1:]) and mine.dtype == one.dtype


def test_under_autocast_arrays_are_float32(small):
    predictor, box = SamPredictor(small), np.array([60.0, 20, 250, 280])
    predictor.set_image(PHOTOS["landscape"])
    plain = predictor.predict(box=box)
    with torch.autocast("cpu", torch.bfloat16):
        predictor.set_image(PHOTOS["landscape"])
        masks, scores, logits = predictor.predict(box=box, return_logits=True)
        records = SamAutomaticMaskGenerator(small, 2, pred_iou_thresh=0, stability_score_thresh=0).generate(
            PHOTOS["landscape"]
        )
    assert predictor.get_image_embedding().dtype == torch.float32
    assert masks.dtype == scores.dtype == logits.dtype == np.float32
    assert ((masks > 0) != plain[0]).mean() < 0.02 and np.abs(scores - plain[1]).max() < 0.05
    assert records and all(isinstance(r["predicted_iou"], float) for r in records)


def test_a_decoder_that_was_cast_names_the_option():
    predictor = SamPredictor(sam_model_registry["blsam_vit_t"](image_size=128).to(torch.bfloat16))
    predictor.set_image(np.zeros((90, 128, 3), np.uint8))
    assert predictor.features.dtype == torch.bfloat16
    with pytest.raises(RuntimeError, match='dtype="bfloat16"'):
        predictor.predict(box=np.array([1, 1, 50, 50]))


def test_threads_never_mix_two_photos(small):
    """One thread changes the photo while others predict: each answer belongs to one of both, or says that none is set."""
    predictor, box = SamPredictor(small), np.array([20, 20, 250, 250])
    photos = [PHOTOS["landscape"][:, :400], PHOTOS["portrait"][:200]]
    expected = []
    for photo in photos:
        predictor.set_image(photo)
        expected.append((predictor.encoded, *predictor.predict(box=box)))
    wrong, stop = [], threading.Event()

    def change():
        for i in range(400):
            predictor.set_encoded(expected[i % 2][0])
        stop.set()

    def ask():
        while not stop.is_set():
            try:
                found = predictor.predict(box=box)
            except RuntimeError as error:
                if "An image must be set" not in str(error):
                    wrong.append(error)
                continue
            if not any(
                f.shape == e.shape and np.allclose(f, e, atol=1e-4) for _, f, *_ in expected for e in found[:1]
            ):
                wrong.append(found[0].shape)

    threads = [threading.Thread(target=target) for target in (change, ask, ask)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong, wrong[:3]


def test_what_a_thread_sees_is_one_photo_while_the_last_one_is_freed(small):
    """Other threads run while a large tensor is let go of, in the middle of the change that lets go of it."""
    predictor, seen = SamPredictor(small), []
    other = threading.Thread(target=lambda: seen.append(predictor.encoded))

    class Freed:
        def __del__(self):
            other.start()
            other.join(0.2)

    new = torch.zeros(1, 256, 20, 20)
    predictor._use(Encoded(Freed(), Routing(), (1, 1), (1, 1)))
    predictor._use(Encoded(new, Routing(), (2, 2), (2, 2)))
    other.join()
    assert seen == [Encoded(new, predictor.routing, (2, 2), (2, 2))]


def test_a_subclass_that_sets_its_attributes_itself(small):
    class Own(SamPredictor):
        def __init__(self, sam):
            self.model, self.transform = sam, ResizeLongestSide(sam.image_encoder.img_size)

    predictor = Own(small)
    predictor.set_image(PHOTOS["landscape"])
    assert predictor.predict(box=[60, 20, 250, 280])[0].shape == (3, 300, 512)


def test_torch_images_are_resized_by_their_height_and_width():
    assert ResizeLongestSide(64).apply_image_torch(torch.rand(2, 3, 100, 50)).shape == (2, 3, 64, 32)


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
    with pytest.raises(ValueError, match="image 1: an image must be uint8"):
        predictor.set_images([PHOTOS["landscape"], PHOTOS["landscape"] - 300.0])
    with pytest.raises(ValueError, match="one image as a list of one"):
        predictor.set_images(PHOTOS["landscape"])
    predictor.set_images([PHOTOS["landscape"]])
    with pytest.raises(ValueError, match="image 1 is none of the 1"):
        predictor.use_image(1)
    predictor.set_image(PHOTOS["landscape"])
    with pytest.raises(ValueError, match="image 0 is none of the 0"):
        predictor.use_image(0)


@pytest.fixture(scope="module")
def tiny():
    return sam_model_registry["blsam_vit_t"](image_size=64)


def test_a_photo_is_the_same_in_any_form(tiny, tmp_path):
    photo = PHOTOS["landscape"]
    Image.fromarray(photo).save(tmp_path / "photo.png")
    predictor = SamPredictor(tiny)
    predictor.set_image(photo)
    expected = predictor.features.clone()
    forms = {
        "path": tmp_path / "photo.png",
        "picture": Image.fromarray(photo),
        "floats": photo / 255,
        "tensor": torch.from_numpy(photo).permute(2, 0, 1),
        "mirrored twice": photo[:, ::-1].copy()[:, ::-1],
    }
    for name, image in forms.items():
        predictor.set_image(image)
        assert torch.equal(predictor.features, expected) and predictor.original_size == (300, 512), name
    predictor.set_image(photo[..., ::-1], "BGR")
    assert torch.equal(predictor.features, expected)
    predictor.set_images(forms.values())
    for number in range(len(forms)):
        predictor.use_image(number)
        assert gap(predictor.features, expected) <= 1e-4


def test_after_a_photo_that_failed_none_is_set(tiny):
    predictor = SamPredictor(tiny)
    for fails in (
        lambda: predictor.set_image(None),
        lambda: predictor.set_image(PHOTOS["landscape"] - 300.0),
        lambda: predictor.set_image(PHOTOS["landscape"], "GBR"),
        lambda: predictor.set_image("none.jpg"),
        lambda: predictor.set_images([PHOTOS["landscape"], None]),
        lambda: predictor.set_images([]),
    ):
        predictor.set_images([PHOTOS["portrait"]])
        with pytest.raises((ValueError, FileNotFoundError)):
            fails()
        assert not predictor.is_image_set and predictor.features is None
        with pytest.raises(RuntimeError, match="image must be set"):
            predictor.predict(box=np.array([1, 1, 9, 9]))
        with pytest.raises(ValueError, match="none of the 0"):
            predictor.use_image(0)


@pytest.mark.parametrize("size", [(2000, 1), (1, 2000), (1, 1), (5000, 2)], ids=str)
def test_photos_that_are_hardly_there(tiny, size):
    predictor = SamPredictor(tiny)
    photo = np.full((*size, 3), 99, np.uint8)
    predictor.set_image(photo)
    assert max(predictor.input_size) == 64 and min(predictor.input_size) >= 1
    masks, scores, _ = predictor.predict(box=np.array([0, 0, size[1], size[0]]))
    assert masks.shape == (3, *size) and np.isfinite(scores).all()
    predictor.set_images([photo, PHOTOS["landscape"]])


def test_a_mask_input_of_another_size_is_a_value_error():
    predictor = SamPredictor(sam_model_registry["blsam_vit_t"](image_size=128))
    predictor.set_image(np.zeros((90, 128, 3), np.uint8))
    predictor.predict(mask_input=np.zeros((1, 32, 32), np.float32))
    with pytest.raises(ValueError, match="mask_input"):
        predictor.predict(mask_input=np.zeros((1, 10, 10), np.float32))


def test_what_a_subclass_notes_is_kept(small):
    class Own(SamPredictor):
        def predict_torch(self, *args, **kwargs):
            self.last = super().predict_torch(*args, **kwargs)
            return self.last

    predictor = Own(small)
    predictor.set_image(PHOTOS["landscape"])
    masks = predictor.predict(box=[60, 20, 250, 280])[0]
    assert np.array_equal(predictor.last[0][0].numpy(), masks)


def test_a_box_may_have_any_shape_of_four_numbers(small):
    predictor = SamPredictor(small)
    predictor.set_image(PHOTOS["landscape"])
    expected = predictor.predict(box=[60, 20, 250, 280])[1]
    for box in ([[60, 20, 250, 280]], [[60, 20], [250, 280]]):
        assert np.array_equal(predictor.predict(box=np.array(box))[1], expected)


def test_prompts_of_unlike_numbers_are_an_error_as_in_sam(small):
    predictor = SamPredictor(small)
    predictor.set_image(PHOTOS["landscape"])
    with pytest.raises(RuntimeError):
        predictor.predict_torch(torch.zeros(0, 1, 2), torch.zeros(0, 1), boxes=torch.ones(2, 4))
