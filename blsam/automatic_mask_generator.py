"""`segment_anything`'s mask generator on our predictor, so that crops tell the encoder what is padding."""

from __future__ import annotations

from typing import Any

from segment_anything import SamAutomaticMaskGenerator as _SamAutomaticMaskGenerator

from .predictor import SamPredictor


class SamAutomaticMaskGenerator(_SamAutomaticMaskGenerator):
    """Arguments and results as in `segment_anything`. Release 1.0 of it fails on CUDA (its NMS mixes devices)."""

    def __init__(self, model: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(model, *args, **kwargs)
        self.predictor = SamPredictor(model)
