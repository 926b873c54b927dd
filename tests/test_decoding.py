"""Prompts decoded together."""

import numpy as np
import pytest
import torch

from blsam.data.prompts import centre_point
from blsam.decoding import decode, upscale


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


def test_no_gradients_are_kept(predictor, targets):
    assert not decode(predictor, boxes=[targets[0].box]).logits.requires_grad
    assert torch.is_grad_enabled()


def test_nothing_to_decode_is_an_error(predictor):
    with pytest.raises(ValueError, match="points or boxes"):
        decode(predictor)
