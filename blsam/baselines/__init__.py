"""Methods that compute fewer tokens of a plain ViT, for comparison with bLViT: on one model, with one recipe."""

from .build import BASELINES, build_baseline
