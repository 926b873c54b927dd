"""The training loss: SAM's for masks and their predicted IoU, and distillation of the embedding and of the answers to
prompts (design: L_sup + 2.5 L_fd)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torchvision.ops import sigmoid_focal_loss

FOCAL, DICE = 20.0, 1.0  # SAM, appendix A


def dice_loss(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Dice of each mask, smoothed by one pixel: logits and target [P, M, h, w] -> [P, M]."""
    probability = logits.sigmoid()
    overlap = 2 * (probability * target).sum((-2, -1))
    return 1 - (overlap + 1) / (probability.sum((-2, -1)) + target.sum((-2, -1)) + 1)


def sam_mask_loss(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """20 x focal (alpha 0.25, gamma 2) + dice, as SAM: logits and target (0 ... 1) [P, M, h, w] -> [P, M]."""
    focal = sigmoid_focal_loss(logits, target, alpha=0.25, gamma=2.0).mean((-2, -1))
    return FOCAL * focal + DICE * dice_loss(logits, target)


def balanced_mask_loss(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Dice + 2 x cross-entropy in which 1.6 times the object's box counts like the rest of the image (ours).

    For small data: the focal loss above lets a small model leave small masks empty. Shapes as `sam_mask_loss`.
    """
    near = _around(target[:, 0] > 0.5, 1.6)[:, None].float()  # [P, 1, h, w]
    entropy = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
    inside = (entropy * near).sum((-2, -1)) / near.sum((-2, -1)).clamp(min=1)
    outside = (entropy * (1 - near)).sum((-2, -1)) / (1 - near).sum((-2, -1)).clamp(min=1)
    return dice_loss(logits, target) + inside + outside


MASK_LOSSES = {"sam": sam_mask_loss, "balanced": balanced_mask_loss}


def _around(mask: torch.Tensor, factor: float) -> torch.Tensor:
    """The box of each mask [P, h, w] bool, its sides times `factor` about its centre: [P, h, w] bool."""
    sides = []
    for hit in (mask.any(2), mask.any(1)):  # rows, then columns: [P, n]
        place = torch.arange(hit.shape[1], device=mask.device)
        first = torch.where(hit, place, hit.shape[1]).amin(1, keepdim=True)
        last = torch.where(hit, place, -1).amax(1, keepdim=True) + 1
        sides.append((2 * place + 1 - first - last).abs() <= factor * (last - first))
    return sides[0][:, :, None] & sides[1][:, None, :]


def mask_iou(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """IoU of thresholded masks: logits [P, M, h, w], target [P, h, w] -> [P, M]."""
    predicted, true = logits > 0, (target > 0.5)[:, None]
    intersection = (predicted & true).sum((-2, -1)).float()
    return intersection / (predicted | true).sum((-2, -1)).clamp(min=1)


def supervised_loss(
    logits: torch.Tensor, scores: torch.Tensor, target: torch.Tensor, masks: slice, kind: str = "sam"
) -> torch.Tensor:
    """L_sup of one round of prompts, a mean over the P objects.

    logits [P, 4, h, w] and scores [P, 4] of all mask tokens; `masks` are those asked for. Of several, the one that fits
    best by the mask loss `kind` is learnt; the IoU head learns on all of them, since "most confident" needs every score
    right.
    """
    logits, scores = logits[:, masks].float(), scores[:, masks].float()
    best = MASK_LOSSES[kind](logits, target[:, None].expand_as(logits)).min(dim=1).values
    return best.mean() + score_loss(logits, scores, target)


def score_loss(logits: torch.Tensor, scores: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Squared error of the predicted IoU, a mean over P objects and M masks: logits [P, M, h, w], scores [P, M], target
    [P, h, w]."""
    with torch.no_grad():
        true_iou = mask_iou(logits, target)
    return F.mse_loss(scores.float(), true_iou)


def answer_loss(
    logits: torch.Tensor, scores: torch.Tensor, goal_logits: torch.Tensor, goal_scores: torch.Tensor
) -> torch.Tensor:
    """How far answers to P prompts are from a teacher's, a mean over prompts and mask tokens (after EdgeSAM, arXiv
    2312.06660; the scores are ours, since they choose the mask).

    logits [P, M, h, w] and scores [P, M] of both. Dice to the teacher's mask, cross-entropy to its probabilities, and
    the squared error of the predicted IoU. It weighs 1 beside the others.
    """
    logits, goal_logits = logits.float(), goal_logits.float()
    entropy = F.binary_cross_entropy_with_logits(logits, goal_logits.sigmoid(), reduction="none").mean((-2, -1))
    apart = dice_loss(logits, (goal_logits > 0).float()) + entropy
    return apart.mean() + F.mse_loss(scores.float(), goal_scores.float())


def cosine_distance(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """1 - cosine of every token: embeddings [B, C, H, W] -> [B, H, W]."""
    return 1 - F.cosine_similarity(student.float(), teacher.float(), dim=1)


def cosine_loss(student: torch.Tensor, teacher: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
    """L_fd: 1 - cosine of embeddings [B, C, H, W], a mean over the real tokens [B, H, W] bool of each image: [B]."""
    return (cosine_distance(student, teacher) * real).sum((1, 2)) / real.sum((1, 2))


def token_cosine_loss(
    student: torch.Tensor, teacher: torch.Tensor, places: torch.Tensor | None = None
) -> torch.Tensor:
    """L_fd of classifiers: 1 - cosine of normalised tokens, the class token among them, a mean over each image's: [B].

    student [B, m, C], teacher [B, 1 + n, C]. places [B, m] int64: the place of each of the student's tokens among the
    teacher's, -1 for one that is made of several and does not count; None: m = 1 + n, in order.
    """
    if places is None:
        return (1 - F.cosine_similarity(student.float(), teacher.float(), dim=2)).mean(1)
    index = places.clamp(min=0)[..., None].expand(-1, -1, teacher.shape[2])  # [B, m] -> [B, m, C]
    distance = 1 - F.cosine_similarity(student.float(), teacher.float().gather(1, index), dim=2)
    real = places >= 0
    return (distance * real).sum(1) / real.sum(1)


def relative_mse_loss(student: torch.Tensor, teacher: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
    """Squared error as a share of the teacher's variance over each image's real tokens; as `cosine_loss` (ours).

    For students that are used with the teacher's own decoder, which the size of the embedding matters to.
    """
    student, teacher, weight = student.float(), teacher.float(), real[:, None].float()
    mean = (teacher * weight).sum((2, 3), keepdim=True) / weight.sum((2, 3), keepdim=True)
    error, variance = ((x.square() * weight).sum((1, 2, 3)) for x in (student - teacher, teacher - mean))
    return error / variance.clamp(min=1e-6)


DISTILLATION_LOSSES = {"cosine": cosine_loss, "mse": relative_mse_loss}
