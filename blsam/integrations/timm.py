"""bLViT classifiers as timm models.

    import blsam.integrations.timm
    model = timm.create_model("blvit_base_tiny_patch16_224")

Weights come from local files: `pretrained_cfg_overlay={"file": "deit_base.pth"}` with `pretrained=True`, or
`checkpoint_path="trained.safetensors"`. Those of DeiT and of timm's plain ViT start a bLViT too.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

try:
    from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
    from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
except ImportError as error:
    raise ImportError(f"timm's models need timm: pip install 'blsam[classify]' ({error})") from None

from ..config import CLASSIFIERS, ClassifierConfig
from ..modeling.classifier import BLVisionTransformer

ROUTED = {name: config for name, config in CLASSIFIERS.items() if config.routed}  # the plain ones are timm's own


def _default_cfg(config: ClassifierConfig) -> dict[str, Any]:
    """What timm's data and tools ask of a model."""
    return {
        "num_classes": config.classes,
        "input_size": (3, config.image_size, config.image_size),
        "pool_size": None,
        "crop_pct": 0.875,  # as the papers of token reduction evaluate
        "interpolation": "bicubic",
        "fixed_input_size": True,
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "patch_embed.proj",
        "classifier": "head",
        "license": "apache-2.0",
    }


default_cfgs = generate_default_cfgs({f"{name}.untrained": _default_cfg(config) for name, config in ROUTED.items()})


def _entrypoint(name: str) -> Callable[..., BLVisionTransformer]:
    def create(pretrained: bool = False, **kwargs: Any) -> BLVisionTransformer:
        if kwargs.pop("features_only", False):
            raise ValueError(f"{name} has no pyramid of features; forward_features gives its tokens")
        return build_model_with_cfg(partial(BLVisionTransformer, ROUTED[name]), name, pretrained, **kwargs)

    create.__name__ = create.__qualname__ = name
    create.__module__ = __name__  # where timm looks for the default_cfgs
    create.__doc__ = f"`{name}` of `blsam.config.CLASSIFIERS`; arguments as `BLVisionTransformer`."
    return register_model(create)


for _name in ROUTED:
    globals()[_name] = _entrypoint(_name)
