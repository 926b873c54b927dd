"""Checkpoints: read safely, check against the model by name, resample to its image size, write whole.

Three kinds load: SAM's own, which also warm-starts a `blsam_*` model; ours, which holds every key of the model; and
either of them for another image size. What files there are is in `checkpoint_files`, what is around the weights and
before their keys in `checkpoint_layouts`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

from .checkpoint_files import CheckpointError, read_content
from .checkpoint_layouts import State, describe, find_state
from .config import CONFIGS, EncoderConfig
from .files import is_file, printable, write_atomically
from .modeling.attention import resampled
from .modeling.image_encoder import ADDED as ADDED_TO_ENCODER
from .modeling.windows import PATCH

SUFFIXES = (".safetensors", ".pth", ".pt")  # that are written
# The keys that SAM does not have, by what adds them, and all of them; all others keep SAM's names.
ADDED = {what: re.compile(r"image_encoder\." + names) for what, names in ADDED_TO_ENCODER.items()}
NEW = re.compile("|".join(keys.pattern for keys in ADDED.values()))
MADE_FOR = {"routing": "a blsam_* model", "grow": "a model with a finer embedding, as vit_t_fine"}


def read(path: str | Path, config: EncoderConfig | None = None) -> tuple[State, dict[str, str]]:
    """The state dict in a file, on the CPU, under SAM's key names, and the metadata of safetensors (else empty).

    Whatever the suffix, and whatever is around it or before its keys (`checkpoint_layouts`). config: which model is
    wanted, where a file holds several.

    FileNotFoundError if there is no such file, CheckpointError if it is not a plain checkpoint.
    """
    path = checked_path(path)
    content, metadata = read_content(path)
    return find_state(content, str(path), partial(_fits, config) if config else None), metadata


def _fits(config: EncoderConfig, state: State) -> bool:
    try:
        check_fits(state, config, "")
    except CheckpointError:
        return False
    return True


def checked_path(path: str | Path) -> Path:
    """The path of a checkpoint that exists; what it is, its content says."""
    path = Path(path)
    if path.is_dir():
        inside = sorted(p.name for p in path.iterdir() if p.suffix.lower() in (*SUFFIXES, ".bin", ".ckpt"))
        hint = f", such as {inside[0]}" if inside else ""
        raise CheckpointError(f"{path} is a folder; give the checkpoint in it{hint}")
    if not is_file(path):
        raise FileNotFoundError(f"no checkpoint at {printable(path, 300)}")
    return path


def image_size_of(state: State) -> int:
    """The image size in pixels that a checkpoint was made for: 16 x the side of its `pos_embed`."""
    return PATCH * state["image_encoder.pos_embed"].shape[1]


def check_fits(state: State, config: EncoderConfig, source: str) -> None:
    """CheckpointError unless the state is a SAM checkpoint with the width and depth of `config`."""
    patch, pos = state.get("image_encoder.patch_embed.proj.weight"), state.get("image_encoder.pos_embed")
    if patch is None or pos is None or patch.dim() != 4 or pos.dim() != 4 or not pos.shape[1] == pos.shape[2] > 0:
        raise CheckpointError(
            f"{source} is not a SAM checkpoint: it lacks a proper image_encoder.patch_embed.proj.weight or "
            f"image_encoder.pos_embed; {describe(state)}"
        )
    if not any(key.startswith(("prompt_encoder.", "mask_decoder.")) for key in state):
        raise CheckpointError(
            f"{source} holds SAM's image encoder alone; give a checkpoint with prompt encoder and mask decoder"
        )
    dim = patch.shape[0]
    depth = 1 + max(
        (int(m[1]) for m in map(re.compile(r"image_encoder\.blocks\.(\d+)\.").match, state) if m), default=0
    )
    if (dim, depth) != (config.dim, config.depth):
        fits = [c.name for c in CONFIGS.values() if (c.dim, c.depth) == (dim, depth)]
        hint = f"it fits {' or '.join(fits)}" if fits else "it fits no model of the registry"
        raise CheckpointError(f"{source} has width {dim} and depth {depth}, not those of {config.name}; {hint}")


def load(model: nn.Module, config: EncoderConfig, state: State, source: str = "the checkpoint") -> list[str]:
    """Copy a state into a `Sam`, resampled to its image size and cast to its dtype; returns the new keys that a warm
    start left as they were.

    CheckpointError names what is missing, unexpected or of another shape. Nothing is copied then.
    """
    check_fits(state, config, source)
    own = model.state_dict()
    tables = tuple(f"image_encoder.blocks.{i}." for i in config.global_layers)
    state = {k: resample(k, v, own[k].shape, k.startswith(tables)) if k in own else v for k, v in state.items()}
    missing = [key for key in own if key not in state]
    if any(not NEW.match(key) for key in missing):
        raise CheckpointError(f"{source} lacks {_names(k for k in missing if not NEW.match(k))}")
    for keys in ADDED.values():  # all of a kind, or none
        lost = [key for key in missing if keys.match(key)]
        if lost and any(key in state for key in own if keys.match(key)):
            raise CheckpointError(
                f"{source} has some of the keys that {config.name} adds to SAM, but lacks {_names(lost)}"
            )
    unexpected = [key for key in state if key not in own]
    if unexpected:
        foreign = [
            what for what, keys in ADDED.items() if any(map(keys.match, unexpected)) and not any(map(keys.match, own))
        ]
        hint = f"; it was made for {MADE_FOR[foreign[0]]}" if foreign else ""
        raise CheckpointError(f"{source} has keys that {config.name} does not know: {_names(unexpected)}{hint}")
    odd = [k for k in state if state[k].shape != own[k].shape]
    if odd:
        shapes = f"{list(state[odd[0]].shape)}, the model's is {list(own[odd[0]].shape)}"
        raise CheckpointError(f"{source}: {_names(odd)} has another shape than in {config.name}: {shapes}")
    whole = [k for k in state if own[k].is_floating_point() and not state[k].is_floating_point()]
    if whole:
        kind = str(state[whole[0]].dtype).removeprefix("torch.")
        raise CheckpointError(f"{source}: {_names(whole)} holds {kind}, as quantised models do; give one of floats")
    model.load_state_dict(state, strict=False)
    return missing


def resample(key: str, value: torch.Tensor, shape: torch.Size, in_global_layer: bool) -> torch.Tensor:
    """Absolute positions (bicubic) and the tables of global layers (linear, as SAM does) for another image size."""
    if value.shape == shape:
        return value
    if key.endswith("pos_embed") and value.dim() == 4 and value.shape[3] == shape[3]:
        grid = value.float().permute(0, 3, 1, 2)  # [1, H, W, C] -> [1, C, H, W]
        grid = F.interpolate(grid, size=tuple(shape[1:3]), mode="bicubic", align_corners=False)
        return grid.permute(0, 2, 3, 1).to(value.dtype)
    if in_global_layer and key.endswith(("rel_pos_h", "rel_pos_w")) and value.shape[1:] == shape[1:]:
        return resampled(value, shape[0])
    return value


def save(path: str | Path, state: State, metadata: Mapping[str, object], dtype: torch.dtype | None = None) -> None:
    """Write tensors (floating ones as `dtype`, if given) and metadata; the file is complete or not there at all."""
    path = Path(path)
    if path.suffix.lower() not in SUFFIXES:
        raise CheckpointError(f"{path}: a checkpoint ends in {', '.join(SUFFIXES)}")
    state = {k: v.detach().cpu().contiguous() for k, v in state.items()}
    if dtype is not None:
        state = {k: v.to(dtype) if v.is_floating_point() else v for k, v in state.items()}
    broken = [k for k, v in state.items() if v.is_floating_point() and not torch.isfinite(v).all()]
    if broken:
        raise CheckpointError(f"not written: {_names(broken)} would hold values that are not finite")
    if path.suffix.lower() == ".safetensors":
        text = {k: v if isinstance(v, str) else json.dumps(v) for k, v in metadata.items()}
        write_atomically(path, lambda temporary: save_file(state, temporary, {"format": "pt", **text}))
    else:
        write_atomically(path, lambda temporary: torch.save(state, temporary))


def _names(keys: Iterable[str]) -> str:
    keys = list(keys)
    return ", ".join(keys[:3]) + (f" and {len(keys) - 3} more" if len(keys) > 3 else "")
