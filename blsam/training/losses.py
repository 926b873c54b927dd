"""The training loss: SAM's for masks and their predicted IoU, and feature distillation (design: L_sup + 2.5 L_fd)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torchvision.ops import sigmoid_focal_loss

FOCAL, DICE = 20.0, 1.0  # SAM, appendix A


def mask_loss(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """20 x focal (alpha 0.25, gamma 2) + dice of each mask: logits [P, M, h, w], target [P, h, w] in 0 ... 1 -> [P, M]."""
    target = target[:, None].expand_as(logits)
    focal = sigmoid_focal_loss(logits, target, alpha=0.25, gamma=2.0).mean((-2, -1))
    probability = logits.sigmoid()
    overlap = 2 * (probability * target).sum((-2, -1))
    dice = 1 - (overlap + 1) / (probability.sum((-2, -1)) + target.sum((-2, -1)) + 1)
    return FOCAL * focal + DICE * dice


def mask_iou(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """IoU of thresholded masks: logits [P, M, h, w], target [P, h, w] -> [P, M]."""
    predicted, true = logits > 0, (target > 0.5)[:, None]
    intersection = (predicted & true).sum((-2, -1)).float()
    return intersection / (predicted | true).sum((-2, -1)).clamp(min=1)


def supervised_loss(logits: torch.Tensor, scores: torch.Tensor, target: torch.Tensor, masks: slice) -> torch.Tensor:
    """L_sup of one round of prompts, a mean over the P objects.

    logits [P, 4, h, w] and scores [P, 4] of all mask tokens; `masks` are those asked for: of several, the one that
    fits best is learnt; the IoU head learns on all of them, since "most confident" needs every score right.
    """
    logits, scores = logits[:, masks].float(), scores[:, masks].float()
    best = mask_loss(logits, target).min(dim=1).values
    with torch.no_grad():
        true_iou = mask_iou(logits, target)
    return (best + F.mse_loss(scores, true_iou, reduction="none").mean(1)).mean()


def distillation_loss(student: torch.Tensor, teacher: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
    """L_fd: 1 - cosine of embeddings [B, C, H, W], a mean over the real tokens [B, H, W] bool."""
    return (1 - F.cosine_similarity(student.float(), teacher.float(), dim=1))[real].mean()
