"""ISAT: the whole model in bfloat16, attributes written by hand; half precision and autocast besides."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.photos import PHOTOS

PHOTO, OTHER = PHOTOS["landscape"], PHOTOS["portrait"]
PROMPT = {"point_coords": np.array([[220, 110]]), "point_labels": np.array([1])}


def agreement(a, b):
    return (a & b).sum() / max((a | b).sum(), 1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "half"])
def test_an_encoder_in_low_precision(sides, dtype):
    """The whole model is converted; release 1.0 encodes then, but its own prompt encoder mixes dtypes and fails."""

    def program(side):
        sam = side.build().eval()
        sam.to(dtype)
        sam.to(device="cpu")
        predictor = side.api.SamPredictor(sam)
        with torch.inference_mode():
            predictor.set_image(PHOTO)
        return predictor.features, sam.image_encoder.neck[0].weight[:1].detach()

    features, _ = replace(sides, exact=False).compare(program)
    expected = sides.ours.predictor(PHOTO).features
    gap = (features.float() - expected).abs().mean() / expected.std()
    assert gap <= 0.05, f"{gap:.1e}"


def test_a_prompt_encoder_in_low_precision_says_what_to_do(sides):
    """Release 1.0 fails there in a product of two dtypes; ISAT's own copy of it is changed."""
    predictor = sides.ours.predictor()
    predictor.model.to(torch.bfloat16)
    predictor.set_image(PHOTO)
    with pytest.raises(RuntimeError, match="image encoder alone"):
        predictor.predict(**PROMPT)


def test_what_was_encoded_is_written_back(sides):
    """ISAT encodes ahead in a thread, and writes four attributes when the user comes to the image."""

    def program(side):
        predictor, kept = side.predictor(), []
        for image in (PHOTO, OTHER):
            predictor.set_image(image)
            kept.append((predictor.features, predictor.original_size, predictor.input_size))
        predictor.reset_image()
        results = []
        for features, original_size, input_size in kept:
            predictor.features, predictor.original_size, predictor.input_size = features, original_size, input_size
            predictor.is_image_set = True
            masks, scores, logits = predictor.predict(**PROMPT, multimask_output=True)
            best = logits[np.argmax(scores), :, :][None, :, :]
            results.append((masks, predictor.predict(**PROMPT, mask_input=best, multimask_output=False)))
        return results

    sides.compare(program)


def test_autocast_gives_float32_arrays(sides):
    def program(side):
        predictor = side.predictor()
        generator = side.api.SamAutomaticMaskGenerator(
            predictor.model, points_per_side=3, pred_iou_thresh=0.3, stability_score_thresh=0.3
        )
        with torch.autocast("cpu", torch.bfloat16):
            predictor.set_image(PHOTO)
            masks, scores, logits = predictor.predict(**PROMPT)
            records = generator.generate(PHOTO)
        return masks, scores, logits, records

    masks, scores, logits, records = program(sides.ours)
    assert (masks.dtype, scores.dtype, logits.dtype) == (np.bool_, np.float32, np.float32)
    assert records and all(isinstance(record["predicted_iou"], float) for record in records)
    plain = sides.ours.predictor(PHOTO).predict(**PROMPT)
    best = int(np.argmax(plain[1]))
    assert agreement(masks[best], plain[0][best]) > 0.9
