"""Calibration in bfloat16: what stays in float32."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from blsam import sam_model_registry
from blsam.training.calibration import Calibration, Settings


def test_the_predictors_are_fitted_in_float32(tmp_path, monkeypatch):
    """As they run: rounded scores tie, and ties decide which tokens are computed."""
    torch.manual_seed(0)
    sam = sam_model_registry["blsam_vit_t"](image_size=128)
    settings = Settings(steps=3, dtype="bfloat16")
    run = Calibration(sam.image_encoder, lambda i: (torch.zeros(3, 128, 128), (128, 96)), 4, settings, tmp_path)
    run.streams.write("goal-0", lambda i: torch.randn(8, 8, 192))
    run.streams.write("residual-1", lambda i: torch.rand(8, 8), channels=1)
    seen, cross_entropy = [], F.cross_entropy

    def look(logits, *args):
        seen.append(logits.detach())
        return cross_entropy(logits, *args)

    monkeypatch.setattr(F, "cross_entropy", look)
    run._fit_predictor(0, "residual-1")
    assert len(seen) == 3 and all(logits.dtype == torch.float32 for logits in seen)
    # not bfloat16's values in another type: those have 8 bits
    assert not np.array_equal(seen[0], seen[0].bfloat16().float())
    with torch.autocast("cpu", torch.bfloat16):  # what all other fits run in
        assert run.descent.dtype == torch.bfloat16 and (torch.ones(1, 1) @ torch.ones(1, 1)).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [(64, (100, 200, 32)), (196, (100, 200, 10)), (1024, (100, 200, 2)), (4096, (50, 50, 1)), (9216, (23, 23, 1))],
)
def test_a_run_passes_over_as_many_tokens_whatever_a_photo_holds_half_in_stages_of_large_ones(tokens, expected):
    assert Settings().of_tokens(tokens) == expected


def test_what_is_asked_for_is_not_changed():
    assert Settings(steps=7, batch_size=3).of_tokens(4096) == (7, 7, 3)
    assert Settings(steps=0, stage_steps=5).of_tokens(1024) == (0, 5, 2)
