"""Losses by hand."""

import math

import pytest
import torch

from blsam.training.losses import (
    answer_loss,
    balanced_mask_loss,
    cosine_loss,
    mask_iou,
    relative_mse_loss,
    sam_mask_loss,
    score_loss,
    supervised_loss,
)


def square():
    """A square of 2 x 2 pixels in 4 x 4, [1, 4, 4], and the logits [1, 1, 4, 4] of all and of half of it."""
    target = torch.zeros(1, 4, 4)
    target[0, :2, :2] = 1
    perfect = torch.where(target > 0, 50.0, -50.0)[:, None]
    half = perfect.clone()
    half[0, 0, 0, :2] = -50
    return target, perfect, half


def test_losses_on_a_hand_computed_case():
    target, perfect, half = square()
    assert mask_iou(perfect, target).item() == 1 and mask_iou(half, target).item() == 0.5
    # the wrong half: focal 20 * 2 pixels * 0.25 * 50 / 16; dice 1 - (2 * 2 + 1) / (2 + 4 + 1)
    assert sam_mask_loss(perfect, target[:, None]).item() == pytest.approx(0, abs=1e-6)
    assert sam_mask_loss(half, target[:, None]).item() == pytest.approx(20 * 2 * 0.25 * 50 / 16 + 2 / 7, rel=1e-5)
    # 1.6 x the 2 x 2 box about (1, 1) reaches the pixel centres at 0.5, 1.5 and 2.5: 9 pixels, 2 of them wrong
    assert balanced_mask_loss(half, target[:, None]).item() == pytest.approx(2 * 50 / 9 + 2 / 7, rel=1e-5)


def test_the_best_mask_and_every_score_are_learnt():
    target, perfect, half = square()
    logits, scores = torch.cat([half, perfect, half, half], 1), torch.tensor([[0.4, 0.9, 0.7, 0.5]])
    apart = [0.1**2, 0.1**2, 0.2**2, 0]
    assert score_loss(logits, scores, target).item() == pytest.approx(sum(apart) / 4)
    assert supervised_loss(logits, scores, target, slice(1, 4)).item() == pytest.approx(sum(apart[1:]) / 3, abs=1e-6)


def test_distillation_losses_on_a_hand_computed_case():
    # two images of one or two real tokens; the token in the padding would be far off
    a = torch.tensor([[[1.0, 5.0]], [[0.0, 5.0]]])[None].movedim(2, 3)  # [1, 2, 2, 1]
    b = torch.tensor([[[1.0, -9.0]], [[1.0, 3.0]]])[None].movedim(2, 3)
    real = torch.tensor([True, False]).view(1, 2, 1)
    assert cosine_loss(a, b, real).tolist() == pytest.approx([1 - 0.5**0.5])
    # three tokens of one channel, the last one padding: errors 1 and 3, the teacher's deviations -2 and 2
    student, teacher = torch.tensor([2.0, 8.0, 99.0]), torch.tensor([1.0, 5.0, 0.0])
    real = torch.tensor([True, True, False]).view(1, 1, 3)
    found = relative_mse_loss(student.view(1, 1, 1, 3), teacher.view(1, 1, 1, 3), real)
    assert found.tolist() == pytest.approx([(1 + 9) / (4 + 4)])


def test_answers_on_a_hand_computed_case():
    # two masks of two pixels, each with one: the student gives the first as the teacher does, and the second inverted
    goal = torch.tensor([[50.0, -50], [50, -50]]).view(1, 2, 1, 2)
    logits = goal * torch.tensor([1.0, -1]).view(1, 2, 1, 1)
    scores, goal_scores = torch.tensor([[0.9, 0.5]]), torch.tensor([[0.7, 0.5]])
    wrong = 50 + (1 - 1 / 3)  # entropy of each pixel; dice, smoothed by a pixel
    assert answer_loss(logits, scores, goal, goal_scores).item() == pytest.approx(wrong / 2 + 0.2**2 / 2, rel=1e-5)
    # a teacher that is not sure wants its own probability: 3 to 1 for a pixel of one
    unsure = torch.full((1, 1, 1, 1), math.log(3))
    given = [
        answer_loss(x.view(1, 1, 1, 1), scores[:, :1], unsure, scores[:, :1]) for x in torch.tensor([0.5, 1.1, 9])
    ]
    assert given[1] < min(given[0], given[2]), given
