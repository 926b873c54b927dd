"""Prompts decoded together."""

from contextlib import contextmanager

import numpy as np
import pytest
import torch

from blsam.data.prompts import centre_point
from blsam.decoding import confident, decode, upscale
from blsam.modeling import mask_decoder


@contextmanager
def as_segment_anything(predictor):
    """The decoder as somebody hooked it, and so called as it is."""
    handle = predictor.model.mask_decoder.register_forward_hook(lambda *_: None)
    try:
        yield
    finally:
        handle.remove()


def test_prompts_decoded_together_equal_the_predictor_one_by_one(predictor, targets):
    boxes = [target.box for target in targets]
    points = [[(*centre_point(target.mask)[:2], 1), (1.0, 2.0, 0)] for target in targets]
    with as_segment_anything(predictor):
        many = decode(predictor, boxes=boxes)
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


@pytest.mark.parametrize("cells", [2**8, 2**20], ids=["prompt by prompt", "all at once"])
@pytest.mark.parametrize("threshold", [None, 0.3, 2.0])
def test_confident_masks_are_those_of_all_that_pass(predictor, monkeypatch, cells, threshold):
    monkeypatch.setattr(mask_decoder, "CELLS", cells)
    height, width = predictor.original_size
    points = np.random.default_rng(0).uniform((0, 0), (width, height), (7, 2))
    with as_segment_anything(predictor):
        every = decode(predictor, points=[[(x, y, 1)] for x, y in points])
    passes = every.scores > (-1 if threshold is None else threshold)
    assert threshold != 0.3 or 0 < passes.sum() < passes.numel(), every.scores  # otherwise the case says nothing
    found = confident(predictor, points, threshold)
    assert found.prompts.tolist() == passes.nonzero()[:, 0].tolist()
    assert torch.allclose(found.scores, every.scores[passes], atol=1e-5)
    expected = every.logits[passes]
    assert found.logits.shape == expected.shape
    assert torch.allclose(found.logits, expected, rtol=1e-4, atol=1e-3), (found.logits - expected).abs().max()


def test_confident_masks_of_a_decoder_that_somebody_hooked(predictor):
    """It is called as it is, and its masks are the same."""
    points, calls = np.array([[20.0, 20.0], [60.0, 40.0]]), []
    expected = confident(predictor, points, None)
    hook = predictor.model.mask_decoder.register_forward_hook(lambda *_: calls.append(1))
    try:
        found = confident(predictor, points, None)
    finally:
        hook.remove()
    assert calls and torch.equal(found.prompts, expected.prompts)
    assert torch.allclose(found.logits, expected.logits, rtol=1e-4, atol=1e-3)


def test_confident_masks_under_autocast_are_float32(predictor):
    points = np.array([[20.0, 20.0], [60.0, 40.0]])
    expected = confident(predictor, points, None)
    with torch.autocast("cpu", torch.bfloat16):
        found = confident(predictor, points, None)
    assert found.logits.dtype == found.scores.dtype == torch.float32
    assert torch.nn.functional.cosine_similarity(found.logits.flatten(), expected.logits.flatten(), dim=0) > 0.99
