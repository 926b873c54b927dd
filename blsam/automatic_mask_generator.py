"""`segment_anything`'s mask generator on our predictor, so that crops tell the encoder what is padding."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from segment_anything import SamAutomaticMaskGenerator as _SamAutomaticMaskGenerator

from .predictor import SamPredictor


class SamAutomaticMaskGenerator(_SamAutomaticMaskGenerator):
    """Arguments and results as in `segment_anything`."""

    def __init__(self, model: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(model, *args, **kwargs)
        self.predictor = SamPredictor(model)

    def generate(self, image: np.ndarray) -> list[dict[str, Any]]:
        """Masks of everything in an image, uint8 [H, W, 3]; one record for each, as in `segment_anything`."""
        # release 1.0 makes the categories of its NMS on the default device, which fails beside boxes on CUDA
        with torch.device(self.predictor.device):
            return super().generate(image)
