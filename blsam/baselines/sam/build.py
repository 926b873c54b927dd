"""The encoder that a configuration asks for."""

from __future__ import annotations

from ...config import EncoderConfig
from ...modeling.image_encoder import ImageEncoder
from .base import ReducedEncoder
from .evit import EViTEncoder
from .evo import EvoViTEncoder
from .sparse import SparseEncoder

ENCODERS: tuple[type[ReducedEncoder], ...] = (EViTEncoder, EvoViTEncoder, SparseEncoder)


def build_encoder(config: EncoderConfig, img_size: int = 1024, keep_ratio: float | None = None) -> ImageEncoder:
    """An encoder with random weights: this package's own, or that of a method. keep_ratio None: the model's own."""
    keep_ratio = config.keep_ratio if keep_ratio is None else keep_ratio
    if config.rule is None:
        return ImageEncoder(config, img_size, keep_ratio)
    method = next(one for one in ENCODERS if isinstance(config.rule, one.rule))
    return method(config, img_size, keep_ratio)
