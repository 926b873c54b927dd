"""Which state dict a file's content holds, under SAM's own key names: other people's wrappers, prefixes and layouts.

The content is a state dict, or dictionaries around one or several. What training frameworks put into or before the
keys is taken off, and the layout of Hugging Face's `SamModel` becomes SAM's.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from .checkpoint_files import CheckpointError

State = dict[str, torch.Tensor]
PARTS = ("image_encoder", "prompt_encoder", "mask_decoder")  # of SAM; the other two are Hugging Face's
ROOT = re.compile(
    r"((?:[^.]+\.)*?)(image_encoder|vision_encoder|prompt_encoder|mask_decoder|shared_image_embedding)\."
)
# What DDP, torch.compile, FSDP and activation checkpointing put between the parts of a key.
WRAPPED = re.compile(r"(?<![^.])(?:module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
DEPTH = 5  # dictionaries that are opened inside one another


def find_state(content: Any, source: str, fits: Callable[[State], bool] | None = None) -> State:
    """The one state dict of a file's content that has a SAM's keys, or its only dict of tensors if none has.

    fits: which of several is wanted. CheckpointError if there is none, or more than one.
    """
    dicts = list(tensor_dicts(content))
    found = [(name, state) for path, tensors in dicts for name, state in _sams(path, tensors)]
    distinct = {_identity(state): (name, state) for name, state in reversed(found)}  # saved twice: the first
    if fits is not None and len(distinct) > 1:
        distinct = {key: pair for key, pair in distinct.items() if fits(pair[1])} or distinct
    if len(distinct) > 1:
        names = " and ".join(sorted(name or "(outermost)" for name, _ in distinct.values()))
        raise CheckpointError(f"{source} holds several models, {names}; save the one you want in a file of its own")
    if not dicts:
        raise CheckpointError(f"{source} is not a state dict of tensors: it holds {_kind(content)}")
    state = next(iter(distinct.values()))[1] if distinct else max((tensors for _, tensors in dicts), key=len)
    for key, value in state.items():
        if wrong := _not_plain(value):
            raise CheckpointError(f"{source}: {key} is {wrong}, not a plain tensor")
    return state


def tensor_dicts(content: Any) -> Iterator[tuple[str, State]]:
    """All dictionaries with tensors in them, outermost first, by the keys that lead to them; not the optimiser's."""
    yield from _dicts(content, "", set())


def _dicts(content: Any, path: str, seen: set[int], depth: int = DEPTH) -> Iterator[tuple[str, State]]:
    """Each once, or one that holds itself would lead in circles: `seen` are the ids of those that were looked at."""
    if not isinstance(content, (Mapping, list, tuple)) or id(content) in seen or not depth:
        return
    seen.add(id(content))
    if not isinstance(content, Mapping):
        content = dict(enumerate(content[:16]))
    # torch's AveragedModel counts beside its weights
    tensors = {
        k: v for k, v in content.items() if isinstance(k, str) and isinstance(v, torch.Tensor) and k != "n_averaged"
    }
    for part in PARTS:  # a model saved in its three parts
        if isinstance(content.get(part), Mapping):
            tensors |= {f"{part}.{k}": v for k, v in content[part].items() if isinstance(v, torch.Tensor)}
    if tensors:
        yield path, tensors
    for key, value in content.items():
        if key not in PARTS and not str(key).startswith("optim"):
            yield from _dicts(value, f"{path}.{key}" if path else str(key), seen, depth - 1)


def _sams(path: str, tensors: State) -> Iterator[tuple[str, State]]:
    """The models in a flat dict: those whose keys, without what comes before and between, begin like SAM's."""
    plain = {WRAPPED.sub("", key): value for key, value in tensors.items()}
    roots = {key: match for key in plain if (match := ROOT.match(key))}
    prefixes = sorted({m[1] for m in roots.values() if m[2] in ("image_encoder", "vision_encoder")}, key=len)[::-1]
    if prefixes and len(plain) < len(tensors):
        raise CheckpointError(
            f"{path or 'the state dict'} has keys with and without module. or _orig_mod. before them"
        )
    owner = {key: next((p for p in prefixes if key.startswith(p)), None) for key in plain}
    for prefix in prefixes:
        # what is beside all models stays, to be refused by its name
        state = {k.removeprefix(prefix): v for k, v in plain.items() if owner[k] in (prefix, None)}
        if any(key.startswith("vision_encoder.") for key in state):
            state = {from_transformers(key): value for key, value in state.items()}
        yield ".".join(filter(None, (path, prefix.rstrip(".")))), state


def _identity(state: State) -> tuple:
    """The same for two state dicts that share their tensors."""

    def place(value: torch.Tensor) -> int:
        return value.data_ptr() if value.layout == torch.strided and not value.is_nested else id(value)

    return tuple(sorted((key, place(value), tuple(value.shape)) for key, value in state.items()))


def _not_plain(value: torch.Tensor) -> str | None:
    """What a tensor is that holds no numbers of its own, one by one."""
    if value.is_meta:
        return "without values (on the meta device)"
    if value.layout != torch.strided or value.is_nested or value.is_quantized:
        return "sparse, nested or quantised"
    if value.untyped_storage().nbytes() < value.numel() * value.element_size():
        return f"a few numbers repeated to {list(value.shape)}"
    return None


def _kind(content: Any) -> str:
    if isinstance(content, Mapping):
        return ", ".join(str(key)[:40] for key in list(content)[:4]) or "nothing"
    return "one tensor without a name" if isinstance(content, torch.Tensor) else f"a {type(content).__name__}"


# --- Hugging Face ----------------------------------------------------------------------------------------------------

_TRANSFORMERS = [
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"^(shared_image_embedding|prompt_encoder\.shared_embedding)\.positional_embedding$",
         "prompt_encoder.pe_layer.positional_encoding_gaussian_matrix"),
        (r"^vision_encoder\.layers\.", "image_encoder.blocks."),
        (r"^vision_encoder\.patch_embed\.projection\.", "image_encoder.patch_embed.proj."),
        (r"^vision_encoder\.neck\.conv1\.", "image_encoder.neck.0."),
        (r"^vision_encoder\.neck\.layer_norm1\.", "image_encoder.neck.1."),
        (r"^vision_encoder\.neck\.conv2\.", "image_encoder.neck.2."),
        (r"^vision_encoder\.neck\.layer_norm2\.", "image_encoder.neck.3."),
        (r"^vision_encoder\.", "image_encoder."),
        (r"^prompt_encoder\.point_embed\.", "prompt_encoder.point_embeddings."),
        (r"^prompt_encoder\.mask_embed\.conv1\.", "prompt_encoder.mask_downscaling.0."),
        (r"^prompt_encoder\.mask_embed\.layer_norm1\.", "prompt_encoder.mask_downscaling.1."),
        (r"^prompt_encoder\.mask_embed\.conv2\.", "prompt_encoder.mask_downscaling.3."),
        (r"^prompt_encoder\.mask_embed\.layer_norm2\.", "prompt_encoder.mask_downscaling.4."),
        (r"^prompt_encoder\.mask_embed\.conv3\.", "prompt_encoder.mask_downscaling.6."),
        (r"^mask_decoder\.upscale_conv1\.", "mask_decoder.output_upscaling.0."),
        (r"^mask_decoder\.upscale_layer_norm\.", "mask_decoder.output_upscaling.1."),
        (r"^mask_decoder\.upscale_conv2\.", "mask_decoder.output_upscaling.3."),
        (r"\.layer_norm_final_attn\.", ".norm_final_attn."),
        (r"^(mask_decoder\.(?:output_hypernetworks_mlps\.\d+|iou_prediction_head))\.layers\.0\.", r"\1.layers.1."),
        (r"^(mask_decoder\..*)\.proj_in\.", r"\1.layers.0."),
        (r"^(mask_decoder\..*)\.proj_out\.", r"\1.layers.2."),
        (r"\.layer_norm(\d)\.", r".norm\1."),
    )
]  # fmt: skip


def from_transformers(key: str) -> str:
    """SAM's name of a key of Hugging Face's `SamModel`."""
    for pattern, replacement in _TRANSFORMERS:
        key = pattern.sub(replacement, key)
    return key


# --- what it is instead of SAM's -------------------------------------------------------------------------------------

_OTHERS = (  # the beginning of a key that only such a state has
    (r"image_encoder\.trunk\.|sam_prompt_encoder\.", "a SAM 2 or SAM 3 model; give one of the first SAM"),
    (r"image_encoder\.(patch_embed\.seq|layers)\.", "a MobileSAM (its encoder is TinyViT); give one of SAM's sizes"),
    (r"(image_encoder\.)?(model\.)?\d+\.(conv|cv1)\.", "a YOLO network (FastSAM?); give one of the first SAM"),
    (r"(encoder\.)?(patch_embed\.proj|blocks\.0\.norm1)\.", "an image encoder alone; give the whole SAM"),
    (r"(prompt_encoder|mask_decoder)\.", "prompt encoder and mask decoder alone; give the whole SAM"),
    (
        r".*\.lora_[AB]\.|.*\.linear_[ab]_[qv]\.",
        "LoRA's additions alone; merge them into the model that they belong to",
    ),
)


def describe(state: State) -> str:
    """What a state that is not SAM's seems to be, in words; its first keys if it is not known."""
    for pattern, words in _OTHERS:
        if any(re.match(pattern, key) for key in state):
            return f"it seems to be {words}"
    return f"its keys begin with {', '.join(list(state)[:2]) or 'nothing'}"
