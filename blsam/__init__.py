"""Segment Anything with a big.LITTLE image encoder."""

from .automatic_mask_generator import SamAutomaticMaskGenerator
from .build_sam import (
    build_blsam_vit_b,
    build_blsam_vit_h,
    build_blsam_vit_l,
    build_blsam_vit_t,
    build_sam,
    build_sam_vit_b,
    build_sam_vit_h,
    build_sam_vit_l,
    build_sam_vit_t,
    sam_model_registry,
)
from .predictor import SamPredictor

__version__ = "0.1.0"
