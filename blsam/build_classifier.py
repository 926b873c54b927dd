"""Classifiers by name, with weights from a file: ours, DeiT's or timm's plain ViT's."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch

from .checkpoint import checked_path
from .checkpoint_files import CheckpointError, read_content
from .checkpoint_layouts import WRAPPED, State, tensor_dicts
from .config import ClassifierConfig
from .modeling.classifier import BLVisionTransformer
from .precision import resolve_dtype

MARK = "patch_embed.proj.weight"  # which every ViT has
HEADS = re.compile(r"head(_cls)?\.")  # head_cls: Evo-ViT's second
Model = TypeVar("Model", bound=BLVisionTransformer)


def build_classifier(
    config: ClassifierConfig,
    checkpoint: str | Path | None = None,
    *,
    image_size: int | None = None,
    num_classes: int | None = None,
    keep_ratio: float = 0.25,
    dtype: str = "float32",
    device: torch.device | str | None = None,
) -> BLVisionTransformer:
    """A classifier in eval mode.

    Args:
        config: a row of `CLASSIFIERS`, or one of your own.
        checkpoint: a file of torch's or safetensors, ours or a plain ViT's of the same width and depth; None: random
            weights.
        image_size: side of the input in pixels; None: that of the checkpoint, the preset's without. Positions are
            resampled where the checkpoint has others.
        num_classes: None: as many as the checkpoint has, the preset's without. Others than the checkpoint's: a fresh
            head.
        keep_ratio: share of the patches that run through the wide blocks (plain models have no use for it).
        dtype, device: as `build_sam`.

    Raises FileNotFoundError or CheckpointError (a ValueError) for the checkpoint, ValueError for the other arguments.
    """
    make = partial(BLVisionTransformer, config, keep_ratio=keep_ratio)
    return with_weights(
        make, config.dim, checkpoint, image_size=image_size, num_classes=num_classes, dtype=dtype, device=device
    )


def with_weights(
    make: Callable[..., Model],
    width: int,
    checkpoint: str | Path | None = None,
    *,
    image_size: int | None = None,
    num_classes: int | None = None,
    dtype: str = "float32",
    device: torch.device | str | None = None,
) -> Model:
    """What `make` builds of img_size and num_classes, with tokens of such a width, ready as `build_classifier` says, whose
    other arguments and errors these are."""
    device = torch.get_default_device() if device is None else device
    compute = resolve_dtype(dtype, device, width)
    state = None
    if checkpoint is not None:
        state = read_classifier(checkpoint)
        image_size = _side_of(state) if image_size is None else image_size
        classes = len(state["head.bias"]) if "head.bias" in state else None
        fresh = num_classes is not None and num_classes != classes
        num_classes = num_classes if fresh else classes
        if fresh:
            state = {key: value for key, value in state.items() if not HEADS.match(key)}
    model = make(img_size=image_size, num_classes=num_classes)
    if state is not None:
        _load(model, state, str(checkpoint), fresh)
    model.use_dtype(compute)
    return model.eval().to(device)


def read_classifier(path: str | Path) -> State:
    """The ViT's state dict in a file, on the CPU; of a training checkpoint that has one beside it, the moving average.

    FileNotFoundError if there is no such file, CheckpointError if it holds no ViT, or several.
    """
    path = checked_path(path)
    content, _ = read_content(path)
    found: dict[str, State] = {}
    for name, tensors in tensor_dicts(content):
        plain = {WRAPPED.sub("", key): value for key, value in tensors.items()}
        for mark in (key for key in plain if key.endswith(MARK)):
            before = mark.removesuffix(MARK)
            found[name + before] = {k.removeprefix(before): v for k, v in plain.items() if k.startswith(before)}
    averages = {name: state for name, state in found.items() if name.endswith("ema")}
    found = averages or found
    if not found:
        raise CheckpointError(f"{path} holds no vision transformer: there is no {MARK} in it")
    if len(found) > 1:
        raise CheckpointError(f"{path} holds several models, {', '.join(found)}; save the one you want by itself")
    return next(iter(found.values()))


def _side_of(state: State) -> int | None:
    """The image size in pixels that a checkpoint was made for; None where its patches are of no square."""
    patches, patch = state.get("pos_embed", torch.zeros(0, 1)).shape[1] - 1, state[MARK].shape[-1]
    side = math.isqrt(max(0, patches))
    return side * patch if side and side * side == patches else None


def _load(model: BLVisionTransformer, state: State, source: str, fresh: bool) -> None:
    """Strictly, but for what the model has besides a plain ViT and for heads that are to be fresh; CheckpointError says
    in one line what does not fit."""
    config, own = model.config, model.state_dict()
    if (patch := state[MARK]).dim() != 4 or patch.shape[0] != config.dim or patch.shape[2] != config.patch:
        raise CheckpointError(f"{source} has patches of {list(patch.shape)}, {config.name} of {list(own[MARK].shape)}")
    state = dict(state)
    model.complete(state)
    lost = [key for key in own if key not in state and not (fresh and HEADS.match(key))]
    foreign = [key for key in state if key not in own]
    if lost or foreign:
        what = f"lacks {lost[0]}" if lost else f"has {foreign[0]}, which {config.name} does not know"
        more = len(lost or foreign) - 1
        raise CheckpointError(f"{source} {what}" + (f" (and {more} more)" if more else ""))
    try:
        model.load_state_dict(state, strict=False)
    except RuntimeError as error:  # of another shape
        raise CheckpointError(f"{source} does not fit {config.name}: {str(error).splitlines()[-1].strip()}") from None
