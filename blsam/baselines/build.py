"""The baselines by name, with their options and with weights from a file."""

from __future__ import annotations

from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ..build_classifier import with_weights
from ..config import ClassifierConfig
from .a_vit import AViT
from .ada_vit import AdaViT
from .ats import ATS
from .base import Baseline
from .dynamic_vit import DynamicViT
from .evit import EViT
from .evo_vit import EvoViT
from .tome import ToMe

BASELINES: dict[str, type[Baseline]] = {
    "evit": EViT,
    "evo_vit": EvoViT,
    "dynamic_vit": DynamicViT,
    "ats": ATS,
    "a_vit": AViT,
    "ada_vit": AdaViT,
    "tome": ToMe,
}


def build_baseline(
    name: str,
    config: ClassifierConfig,
    checkpoint: str | Path | None = None,
    *,
    image_size: int | None = None,
    num_classes: int | None = None,
    dtype: str = "float32",
    device: torch.device | str | None = None,
    **options: Any,
) -> Baseline:
    """A token-reduction method on a plain ViT, in eval mode.

    name: of `BASELINES`. config: a plain row of `CLASSIFIERS`. options: fields of the method's `Options`, those left
    out as in its paper. The rest as `build_classifier`; weights of DeiT and of timm's plain ViT fit.

    Raises what `build_classifier` does, and ValueError for a name or an option that there is not.
    """
    if name not in BASELINES:
        raise ValueError(f"baselines are {', '.join(BASELINES)}; there is no {name!r}")
    method = BASELINES[name]
    known = [option.name for option in fields(method.Options)]
    if foreign := [option for option in options if option not in known]:
        raise ValueError(f"{name} has no option {foreign[0]!r}; it has {', '.join(known)}")
    make = partial(method, config, method.Options(**options))
    return with_weights(
        make, config.dim, checkpoint, image_size=image_size, num_classes=num_classes, dtype=dtype, device=device
    )
