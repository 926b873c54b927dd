"""Everything in a photo, beside segment_anything's generator."""

import numpy as np
import pytest
import segment_anything as sa
import torch
from PIL import Image
from pycocotools import mask as rle_tools
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from blsam import SamAutomaticMaskGenerator, sam_model_registry
from blsam.options import shipped_checkpoint
from scripts.benchmarks.benchmark_masks import Reference
from tests.photos import PHOTOS


@pytest.mark.parametrize("crops", [0, 1])
def test_everything_equals_segment_anything_s_generator(crops):
    """Same photo, same weights; the thresholds leave some masks and drop others."""
    small = sam_model_registry["vit_t"](shipped_checkpoint("vit_t"), image_size=256)
    options = dict(points_per_side=4, pred_iou_thresh=0.2, stability_score_thresh=0.2, crop_n_layers=crops)
    theirs = sa.SamAutomaticMaskGenerator(small, **options)
    theirs.predictor = Reference(small)  # release 1.0's own fails on sizes other than 1024
    expected, found = (g.generate(PHOTOS["landscape"]) for g in (theirs, SamAutomaticMaskGenerator(small, **options)))
    assert len(found) == len(expected) > 0
    for a, b in zip(found, expected):
        assert a["bbox"] == b["bbox"] and a["point_coords"] == b["point_coords"]
        assert a["predicted_iou"] == pytest.approx(b["predicted_iou"], abs=1e-4)
        assert (a["segmentation"] ^ b["segmentation"]).mean() <= 1e-3
    assert (
        SamAutomaticMaskGenerator(small, points_per_side=2, pred_iou_thresh=0.999).generate(PHOTOS["portrait"]) == []
    )


@pytest.mark.parametrize("crops", [0, 1])
@pytest.mark.parametrize("output_mode", ["binary_mask", "coco_rle", "uncompressed_rle"])
def test_nothing_found_is_an_empty_list(crops, output_mode):
    small = sam_model_registry["vit_t"](image_size=64)
    options = dict(crop_n_layers=crops, output_mode=output_mode, min_mask_region_area=10)
    assert SamAutomaticMaskGenerator(small, 2, pred_iou_thresh=2.0, **options).generate(PHOTOS["portrait"]) == []


def test_no_float64_reaches_the_device():
    """Points are float64, as in SAM, and stay on the CPU: Apple's devices have no such type."""

    class Doubles(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **kwargs or {})
            if str(function) in ("aten.lift_fresh.default", "aten._to_copy.default"):  # numpy's, on their way
                return out
            for tensor in (t for t in pytree.tree_leaves((args, out)) if isinstance(t, torch.Tensor)):
                if tensor.dtype == torch.float64 and tensor.dim() and tensor.shape[-1:] != (2,):
                    seen.add((str(function), tuple(tensor.shape)))
            return out

    seen, small = set(), sam_model_registry["vit_t"](shipped_checkpoint("vit_t"), image_size=128)
    generator = SamAutomaticMaskGenerator(small, 3, pred_iou_thresh=0, stability_score_thresh=0, crop_n_layers=1)
    with Doubles():
        records = generator.generate(PHOTOS["landscape"])
        generator.predictor.set_image(PHOTOS["landscape"])
        generator.predictor.predict(np.array([[9.5, 9.5]]), np.array([1]), np.array([1.0, 1, 90, 90]))
    assert records and not seen, seen


@pytest.mark.parametrize("changed", [False, True], ids=["decoder", "hooked decoder"])
def test_the_decoder_multiplies_in_bfloat16_and_finds_nearly_the_same(changed):
    """The prompts' positions stay float32: in bfloat16 points would move by pixels."""
    small, seen = sam_model_registry["vit_t"](shipped_checkpoint("vit_t"), image_size=256), set()
    if changed:
        small.mask_decoder.register_forward_hook(lambda *_: None)
    small.prompt_encoder.register_forward_hook(
        lambda *found: seen.add((str(found[2][0].dtype), torch.is_autocast_enabled("cpu")))
    )
    options = dict(points_per_side=5, pred_iou_thresh=0.2, stability_score_thresh=0.2, output_mode="coco_rle")
    expected, found = (
        SamAutomaticMaskGenerator(small, decoder_dtype=dtype, **options).generate(PHOTOS["landscape"])
        for dtype in ("float32", "bfloat16")
    )
    assert seen == {("torch.float32", False)} and len(found) and abs(len(found) - len(expected)) <= 2
    ious = rle_tools.iou(
        *([record["segmentation"] for record in records] for records in (found, expected)), [0] * len(expected)
    )
    assert np.median(ious.max(1)) > 0.97, ious.max(1)
    scores = [[record["predicted_iou"] for record in records] for records in (found, expected)]
    assert scores[0] != scores[1]  # something was rounded
    with pytest.raises(ValueError, match="dtype must be one of float32, bfloat16, auto, is 'int8'"):
        SamAutomaticMaskGenerator(small, decoder_dtype="int8")


@pytest.mark.parametrize("size", [(1, 2000), (1, 1), (3, 700)], ids=str)
def test_everything_in_photos_with_fewer_pixels_than_crops(size):
    """Some of segment_anything's crops are empty then."""
    small = sam_model_registry["vit_t"](shipped_checkpoint("vit_t"), image_size=64)
    options = dict(points_per_side=1, pred_iou_thresh=0, stability_score_thresh=0, crop_n_layers=1)
    found = SamAutomaticMaskGenerator(small, **options).generate(np.full((*size, 3), 99, np.uint8))
    assert found and all(record["segmentation"].shape == size for record in found)


def test_everything_takes_photos_in_any_form():
    small = sam_model_registry["vit_t"](shipped_checkpoint("vit_t"), image_size=64)
    generator = SamAutomaticMaskGenerator(small, points_per_side=2, pred_iou_thresh=0, stability_score_thresh=0)
    photo = PHOTOS["portrait"]
    expected = generator.generate(photo)
    for image in (photo / 255, torch.from_numpy(photo).permute(2, 0, 1), Image.fromarray(photo)):
        found = generator.generate(image)
        assert [one["bbox"] for one in found] == [one["bbox"] for one in expected] != []
    with pytest.raises(ValueError, match="an image must be uint8"):
        generator.generate(None)


def test_nothing_of_a_batch_depends_on_the_default_device():
    """Which is the GPU's while `generate` runs on one; here it is a device whose tensors cannot be looked at."""
    small = sam_model_registry["vit_t"](shipped_checkpoint("vit_t"), image_size=128)
    generator = SamAutomaticMaskGenerator(small, 2, pred_iou_thresh=0.1, stability_score_thresh=0.1)
    photo = PHOTOS["landscape"]
    generator.predictor.set_image(photo)
    size, points = photo.shape[:2], np.array([[20.0, 20.0], [60.0, 40.0], [50.0, 50.0]])
    expected = generator._process_batch(points, size, [0, 0, size[1], size[0]], size)
    with torch.device("meta"):
        found = generator._process_batch(points, size, [0, 0, size[1], size[0]], size)
    assert len(expected["rles"]) > 0 and found["rles"] == expected["rles"]


def test_a_model_that_is_not_on_the_default_device():
    small = sam_model_registry["vit_t"](shipped_checkpoint("vit_t"), image_size=128)
    generator = SamAutomaticMaskGenerator(small, 2, pred_iou_thresh=0.1, stability_score_thresh=0.1)
    expected = generator.generate(PHOTOS["landscape"])
    torch.set_default_device("meta")
    try:
        found = generator.generate(PHOTOS["landscape"])
    finally:
        torch.set_default_device(None)
    assert expected and [one["bbox"] for one in found] == [one["bbox"] for one in expected]


def test_the_generator_makes_its_tensors_where_the_model_is(monkeypatch):
    generator = SamAutomaticMaskGenerator(sam_model_registry["vit_t"](image_size=64).to("meta"), points_per_side=1)
    monkeypatch.setattr(sa.SamAutomaticMaskGenerator, "generate", lambda self, image: torch.zeros(1).device.type)
    assert generator.generate(PHOTOS["landscape"]) == "meta"
