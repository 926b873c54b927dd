"""Classifiers to be measured side by side: ours by name, timm's by `timm:NAME`."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..baselines import build_baseline
from ..build_classifier import build_classifier
from ..checkpoint import checked_path
from ..checkpoint_files import CheckpointError, read_content
from ..checkpoint_layouts import WRAPPED, tensor_dicts
from ..config import CLASSIFIERS
from ..data.imagenet import CROP, EvaluationTransform, LabelledImages, crop_ratio_of, open_images, require_timm
from ..modeling.classifier import BLVisionTransformer
from ..options import UsageError, one_line

TIMM = "timm:"


@dataclass
class Measured:
    """A classifier in eval mode, images [B, 3, S, S] -> logits [B, classes], and how photos are prepared for it.

    names: of its classes, where its file has them; preparation: in words.
    """

    name: str
    model: nn.Module
    size: int
    classes: int
    crop_ratio: float
    transform: Callable[[Any], torch.Tensor]
    preparation: str
    names: tuple[str, ...] | None = None


def load_classifier(
    name: str,
    checkpoint: Path | None,
    *,
    image_size: int | None = None,
    crop_ratio: float | None = None,
    keep_ratio: float | None = None,
    baseline: str | None = None,
    dtype: str = "float32",
    device: torch.device,
) -> Measured:
    """A row of `CLASSIFIERS`, as it is or with a method of `blsam.baselines` on it, or `timm:NAME`; random weights (seed
    0) without a checkpoint.

    keep_ratio: of a routed model or a baseline; None: 0.25, a baseline's own. crop_ratio None: what a file of the
    trainer was validated with, otherwise one for all, 0.875. timm's models have their own mean, standard deviation and
    interpolation, ours ImageNet's and bicubic.
    UsageError, FileNotFoundError, CheckpointError or ImportError in one line.
    """
    torch.manual_seed(0)
    if name.startswith(TIMM):
        if baseline is not None:
            raise UsageError("--baseline is for our own plain models")
        if dtype != "float32" or keep_ratio is not None:
            raise UsageError("timm's models are measured whole, in float32; leave --keep-ratio and --dtype out")
        return _timms(name, checkpoint, image_size, crop_ratio, device)
    if name not in CLASSIFIERS:
        raise UsageError(f"no classifier {name!r}; there are {', '.join(CLASSIFIERS)}, and timm's as timm:NAME")
    if keep_ratio is not None and baseline is None and not CLASSIFIERS[name].routed:
        raise UsageError(f"{name} is a plain model, which keeps all tokens; leave --keep-ratio out")
    how: dict[str, Any] = {"image_size": image_size, "dtype": dtype, "device": device}
    how |= {} if keep_ratio is None else {"keep_ratio": keep_ratio}
    if baseline is None:
        model: BLVisionTransformer = build_classifier(CLASSIFIERS[name], checkpoint, **how)
    else:
        model = build_baseline(baseline, CLASSIFIERS[name], checkpoint, **how)
        name = f"{baseline} on {name}"
    size, stored = model.img_size[0], read_content(checkpoint)[1] if checkpoint is not None else {}
    if crop_ratio is None and "crop_ratio" in stored:
        crop_ratio = float(stored["crop_ratio"])
    crop = crop_ratio_of(size, crop_ratio)
    names = tuple(json.loads(stored["classes"])) if "classes" in stored else None
    transform = EvaluationTransform(size, crop)
    return Measured(name, model, size, model.num_classes, crop, transform, _words(size, crop, "bicubic"), names)


def labelled(measured: Measured, paths: Sequence[Path]) -> LabelledImages:
    """The validation images at some paths; UsageError unless they are of the model's classes."""
    images = open_images(paths, "val", classes=measured.names)
    if len(images.classes) != measured.classes:
        raise UsageError(
            f"the images are of {len(images.classes)} classes, {measured.name} answers {measured.classes}; they must be "
            "the same, in the order of their names"
        )
    return images


def _words(size: int, crop: float, interpolation: str) -> str:
    return f"{interpolation} to {int(size / crop)}, centre {size} (crop ratio {crop:g})"


def _timms(name: str, checkpoint: Path | None, size: int | None, crop: float | None, device: torch.device) -> Measured:
    require_timm()
    import timm
    from timm.data import create_transform, resolve_data_config

    wanted = name.removeprefix(TIMM)
    if not timm.is_model(wanted):
        near = timm.list_models(f"*{wanted.split('_')[0]}*")[:3]
        hint = f", such as {', '.join(near)}" if near else ""
        raise UsageError(f"timm {timm.__version__} has no model {wanted!r}; timm.list_models() names all{hint}")
    try:
        model: Any = _sized(timm.create_model, wanted, size)
        if size is not None:  # some find out in a pass alone
            model.eval()(torch.zeros(1, 3, size, size))
    except (AssertionError, ValueError, RuntimeError) as error:
        raise UsageError(f"{name} cannot be made with --image-size {size} ({one_line(error)})") from None
    if checkpoint is not None:
        _load(model, checked_path(checkpoint), name)
    config: dict[str, Any] = resolve_data_config(model=model)
    side = size or config["input_size"][1]
    ratio = CROP if crop is None else crop
    config |= {"input_size": (3, side, side), "crop_pct": ratio, "crop_mode": "center"}
    return Measured(
        name,
        model.eval().to(device),
        side,
        model.num_classes,
        ratio,
        create_transform(**config),
        _words(side, ratio, config["interpolation"]),
    )


def _sized(create: Callable[..., Any], name: str, size: int | None) -> Any:
    """A model for images of that size; convolutions take any, and know no such option."""
    try:
        return create(name, **({} if size is None else {"img_size": size}))
    except TypeError as error:
        if "img_size" not in str(error):
            raise
        return create(name)


def _load(model: nn.Module, path: Path, name: str) -> None:
    """The weights of a file that has most of the model's names in it; strictly."""
    own = model.state_dict()
    found = [{WRAPPED.sub("", k): v for k, v in one.items()} for _, one in tensor_dicts(read_content(path)[0])]
    state = max(found, key=lambda one: len(one.keys() & own.keys()), default={})
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        detail = str(error).splitlines()[-1].strip()
        raise CheckpointError(f"{path} does not fit {name}: {detail}") from None
