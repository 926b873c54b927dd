"""Checkpoints: read safely, check against the model by name, resample to its image size, write whole.

Three kinds load: SAM's own (`.pth`), which also warm-starts a `blsam_*` model; ours, which holds every key of the
model; and either of them for another image size. Nothing that a file contains is ever executed.
"""

from __future__ import annotations

import json
import pickle
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from .config import CONFIGS, EncoderConfig
from .files import write_atomically
from .modeling.attention import resampled
from .modeling.image_encoder import NEW as ENCODER_NEW
from .modeling.windows import PATCH

State = dict[str, torch.Tensor]
SUFFIXES = (".safetensors", ".pth", ".pt")
# The keys that SAM does not have; all others keep SAM's names.
NEW = re.compile(r"image_encoder\." + ENCODER_NEW.pattern)


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message says why and what would help."""


def read(path: str | Path) -> tuple[State, dict[str, str]]:
    """The tensors of a file, on the CPU, and its metadata (empty for `.pth` and `.pt`).

    FileNotFoundError if there is no such file, CheckpointError if it is not a plain checkpoint.
    """
    path = checked_path(path)
    if path.suffix.lower() == ".safetensors":
        try:
            with safe_open(path, framework="pt") as file:
                return {key: file.get_tensor(key) for key in file.keys()}, dict(file.metadata() or {})
        except SafetensorError as error:
            raise CheckpointError(f"{path} is damaged or not a safetensors file ({error})") from None
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        reason = str(error).splitlines()[0]
        raise CheckpointError(f"{path} holds more than tensors and was not opened, for safety ({reason})") from None
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, IndexError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise CheckpointError(f"{path} is damaged or not a checkpoint ({reason})") from None
    for wrapper in ("model", "state_dict"):  # as training frameworks write it
        if isinstance(content, dict) and isinstance(content.get(wrapper), dict):
            content = content[wrapper]
    if not isinstance(content, dict) or not all(isinstance(v, torch.Tensor) for v in content.values()):
        raise CheckpointError(f"{path} is not a state dict of tensors")
    return content, {}


def checked_path(path: str | Path) -> Path:
    """The path of a checkpoint that exists and has a known suffix."""
    path = Path(path)
    if path.suffix.lower() not in SUFFIXES:
        raise CheckpointError(f"{path}: a checkpoint ends in {', '.join(SUFFIXES)}")
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}")
    return path


def image_size_of(state: State) -> int:
    """The image size in pixels that a checkpoint was made for: 16 x the side of its `pos_embed`."""
    return PATCH * state["image_encoder.pos_embed"].shape[1]


def check_fits(state: State, config: EncoderConfig, source: str) -> None:
    """CheckpointError unless the state is a SAM checkpoint with the width and depth of `config`."""
    patch, pos = "image_encoder.patch_embed.proj.weight", "image_encoder.pos_embed"
    if any(key not in state or state[key].dim() != 4 for key in (patch, pos)):
        raise CheckpointError(f"{source} is not a SAM checkpoint: it lacks a proper {patch} or {pos}")
    dim = state[patch].shape[0]
    depth = 1 + max(
        (int(m[1]) for m in map(re.compile(r"image_encoder\.blocks\.(\d+)\.").match, state) if m), default=0
    )
    if (dim, depth) != (config.dim, config.depth):
        fits = [c.name for c in CONFIGS.values() if (c.dim, c.depth) == (dim, depth)]
        hint = f"it fits {' or '.join(fits)}" if fits else "it fits no model of the registry"
        raise CheckpointError(f"{source} has width {dim} and depth {depth}, not those of {config.name}; {hint}")


def load(model: nn.Module, config: EncoderConfig, state: State, source: str = "the checkpoint") -> list[str]:
    """Copy a state into a `Sam`, resampled to its image size; returns the new keys that a warm start left as they were.

    CheckpointError names what is missing, unexpected or of another shape. Nothing is copied then.
    """
    check_fits(state, config, source)
    own = model.state_dict()
    tables = tuple(f"image_encoder.blocks.{i}." for i in config.global_layers)
    state = {k: resample(k, v, own[k].shape, k.startswith(tables)) if k in own else v for k, v in state.items()}
    missing = [key for key in own if key not in state]
    new = [key for key in own if NEW.match(key)]
    if any(not NEW.match(key) for key in missing):
        raise CheckpointError(f"{source} lacks {_names(k for k in missing if not NEW.match(k))}")
    if missing and missing != new:
        raise CheckpointError(
            f"{source} has some of the keys that {config.name} adds to SAM, but lacks {_names(missing)}"
        )
    unexpected = [key for key in state if key not in own]
    if unexpected:
        hint = "; it was made for a blsam_* model" if not config.routed and any(map(NEW.match, unexpected)) else ""
        raise CheckpointError(f"{source} has keys that {config.name} does not know: {_names(unexpected)}{hint}")
    odd = [k for k in state if state[k].shape != own[k].shape]
    if odd:
        shapes = f"{list(state[odd[0]].shape)}, the model's is {list(own[odd[0]].shape)}"
        raise CheckpointError(f"{source}: {_names(odd)} has another shape than in {config.name}: {shapes}")
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
