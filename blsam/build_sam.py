"""Builders and the registry: a name and a checkpoint to a model that drops into SAM's tools."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from segment_anything.modeling import MaskDecoder, PromptEncoder, TwoWayTransformer

from . import checkpoint as ckpt
from .baselines.sam.build import build_encoder
from .config import MODELS, OUT_CHANNELS, REDUCED, EncoderConfig
from .modeling.sam import Sam
from .modeling.windows import PATCH
from .runtimes.cache import default_folder
from .runtimes.choice import resolve_for


def build_sam(
    config: EncoderConfig,
    checkpoint: str | Path | None = None,
    *,
    image_size: int | None = None,
    keep_ratio: float | None = None,
    dtype: str = "float32",
    device: torch.device | str | None = None,
    runtime: str = "torch",
    cache: bool = True,
) -> Sam:
    """A `Sam` in eval mode.

    Args:
        config: a row of `MODELS`, or one of your own.
        checkpoint: a file of torch's or safetensors, ours or SAM's; None: random weights, as in SAM.
        image_size: side of the square input in pixels, a multiple of 16. None: that of the checkpoint, 1024 without.
            Positions are resampled when it differs from the checkpoint's.
        keep_ratio: share of the tokens that run through the wide blocks (exact models have no use for it); None: the
            model's own, 0.25 of a bLSAM. What it means to a model of `REDUCED`, its rule says.
        dtype: what the encoder's products are computed and its weights held in, "float32", "bfloat16" (half the
            memory; norms, softmax and importance scores stay float32) or "auto" (bfloat16 where it was measured to be
            faster, `precision.FASTER_FROM`, and on GPUs that have it). Input, embedding and decoder are float32 whatever
            it is.
        device: where the model is put; None: where torch makes new tensors, which is the CPU unless it is told otherwise.
        runtime: what computes the encoder's passes, "torch", "openvino", "onnxruntime" (float32 alone), or "auto", the
            fastest on this kind of processor that is installed. A model with a checkpoint is compiled here, which takes
            up to minutes the first time. Training and gradients stay torch's, and so do the models of `REDUCED`.
        cache: keep what was compiled in `runtimes.cache.default_folder()`, so that later starts take seconds.

    Raises FileNotFoundError or CheckpointError (a ValueError) for the checkpoint, ValueError for the other arguments,
    ImportError for a runtime that is not installed.
    """
    device = torch.get_default_device() if device is None else device
    runtime, compute = resolve_for(config, runtime, dtype, device)
    state = None
    if checkpoint is not None:
        state, _ = ckpt.read(checkpoint, config)
        ckpt.check_fits(state, config, str(checkpoint))
    if image_size is None:
        image_size = 1024 if state is None else ckpt.image_size_of(state)

    side = image_size // PATCH * config.grow
    sam = Sam(
        build_encoder(config, image_size, keep_ratio),
        PromptEncoder(
            embed_dim=OUT_CHANNELS,
            image_embedding_size=(side, side),
            input_image_size=(image_size, image_size),
            mask_in_chans=16,
        ),
        MaskDecoder(
            num_multimask_outputs=3,
            transformer=TwoWayTransformer(depth=2, embedding_dim=OUT_CHANNELS, mlp_dim=2048, num_heads=8),
            transformer_dim=OUT_CHANNELS,
            iou_head_depth=3,
            iou_head_hidden_dim=256,
        ),
    )
    if state is not None:
        ckpt.load(sam, config, state, str(checkpoint))
    sam.image_encoder.use_dtype(compute)
    sam = sam.eval().to(device)
    if runtime != "torch":
        from .runtimes.engine import Engine

        sam.image_encoder.engine = Engine(runtime, default_folder() if cache else None)
        if state is not None:
            sam.image_encoder.engine.prepare(sam.image_encoder)
    return sam


Builder = Callable[..., Sam]


def _builder(name: str) -> Builder:
    def build(
        checkpoint: str | Path | None = None,
        *,
        image_size: int | None = None,
        keep_ratio: float | None = None,
        dtype: str = "float32",
        device: torch.device | str | None = None,
        runtime: str = "torch",
        cache: bool = True,
    ) -> Sam:
        return build_sam(
            MODELS[name], checkpoint, image_size=image_size, keep_ratio=keep_ratio, dtype=dtype, device=device,
            runtime=runtime, cache=cache,
        )  # fmt: skip

    build.__name__ = build.__qualname__ = f"build_{name}" if name.startswith("blsam") else f"build_sam_{name}"
    build.__doc__ = f"`{name}`; arguments as `build_sam`."
    return build


build_sam_vit_h = _builder("vit_h")
build_sam_vit_l = _builder("vit_l")
build_sam_vit_b = _builder("vit_b")
build_sam_vit_t = _builder("vit_t")
build_sam_vit_t_fine = _builder("vit_t_fine")
build_blsam_vit_h = _builder("blsam_vit_h")
build_blsam_vit_l = _builder("blsam_vit_l")
build_blsam_vit_b = _builder("blsam_vit_b")
build_blsam_vit_t = _builder("blsam_vit_t")
build_blsam_vit_t_fine = _builder("blsam_vit_t_fine")

sam_model_registry: dict[str, Builder] = {
    "default": build_sam_vit_h,  # as in SAM
    "vit_h": build_sam_vit_h,
    "vit_l": build_sam_vit_l,
    "vit_b": build_sam_vit_b,
    "vit_t": build_sam_vit_t,
    "vit_t_fine": build_sam_vit_t_fine,
    "blsam_vit_h": build_blsam_vit_h,
    "blsam_vit_l": build_blsam_vit_l,
    "blsam_vit_b": build_blsam_vit_b,
    "blsam_vit_t": build_blsam_vit_t,
    "blsam_vit_t_fine": build_blsam_vit_t_fine,
    **{name: _builder(name) for name in REDUCED},
}
