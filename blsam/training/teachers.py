"""Teachers that a student's image encoder learns from: dense models of this project, or MobileSAM."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .. import checkpoint as ckpt
from ..build_sam import sam_model_registry
from ..config import CONFIGS, EncoderConfig

DENSE = tuple(name for name, config in CONFIGS.items() if not config.routed)
TEACHERS = (*DENSE, "mobile_sam")
# what reads the embedding, and the scale it is read in
DECODER_PARTS = ("prompt_encoder.", "mask_decoder.", "image_encoder.neck.3.")


def load_teacher(name: str, checkpoint: str | Path, image_size: int) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """The frozen image encoder of a teacher, [B, 3, S, S] normalised -> [B, 256, h, w], and its decoder's weights.

    The weights are those of prompt encoder, mask decoder and the encoder's last norm, with SAM's key names: a student
    of the encoder alone starts from them (decoupled distillation, MobileSAM, arXiv 2306.14289).

    FileNotFoundError, CheckpointError or ImportError (mobile_sam needs its package) in one line.
    """
    if name == "mobile_sam":
        state, _ = ckpt.read(checkpoint)
        encoder = _mobile_sam_encoder(image_size)
        own = {key.removeprefix("image_encoder."): v for key, v in state.items() if key.startswith("image_encoder.")}
        if {k: v.shape for k, v in own.items()} != {k: v.shape for k, v in encoder.state_dict().items()}:
            raise ckpt.CheckpointError(f"{checkpoint} is not a MobileSAM checkpoint (its encoder is not TinyViT-5M)")
        if not all(any(key.startswith(part) for key in state) for part in DECODER_PARTS):
            raise ckpt.CheckpointError(f"{checkpoint} holds an encoder alone; give the whole MobileSAM")
        encoder.load_state_dict(own)
    else:
        sam = sam_model_registry[name](checkpoint, image_size=image_size)
        encoder, state = sam.image_encoder, sam.state_dict()
    decoder = {key: value for key, value in state.items() if key.startswith(DECODER_PARTS)}
    return encoder.eval().requires_grad_(False), decoder


def finer_by(teacher_size: int | None, image_size: int) -> int:
    """Pixels of the teacher's frame along one of the student's (None: 1); ValueError unless it is a whole number."""
    if (teacher_size or image_size) % image_size:
        raise ValueError(f"--teacher-size {teacher_size} is not a multiple of --image-size {image_size}")
    return (teacher_size or image_size) // image_size


def check_grid(student: EncoderConfig, teacher: str, finer: int) -> None:
    """ValueError unless the teacher's embedding, in a frame `finer` times the student's, can be averaged to its grid."""
    cells = finer * (CONFIGS[teacher].grow if teacher in CONFIGS else 1)
    if cells % student.grow:
        raise ValueError(
            f"{student.name} answers in {student.grow} cells along a token and its teacher in {cells}: "
            f"--teacher-size must be {student.grow} times --image-size, or a multiple of that"
        )


def placed(teacher: nn.Module, device: torch.device, compiled: bool) -> Any:
    """A teacher's encoder where and how it is to run."""
    teacher = teacher.to(device).to(memory_format=torch.channels_last)
    return torch.compile(teacher, options={"freezing": True}) if compiled else teacher


def _mobile_sam_encoder(image_size: int) -> nn.Module:
    """MobileSAM's TinyViT at any size that is a multiple of 16; the package's own takes 1024 only."""
    try:
        with warnings.catch_warnings():  # of timm about names that the package still uses
            warnings.simplefilter("ignore")
            from mobile_sam.modeling.tiny_vit_sam import TinyViT
    except ImportError as error:
        raise ImportError(f"the teacher mobile_sam needs: pip install mobilesam-mirror timm ({error})") from None

    class Encoder(TinyViT):
        def forward_features(self, x: torch.Tensor) -> torch.Tensor:
            x = self.patch_embed(x)
            for layer in self.layers:
                x = layer(x)
            side = image_size // 16
            return self.neck(x.unflatten(1, (side, side)).permute(0, 3, 1, 2))  # [B, n, C] -> [B, C, h, w]

    return Encoder(
        img_size=image_size,
        embed_dims=[64, 128, 160, 320],
        depths=[2, 2, 6, 2],
        num_heads=[2, 4, 5, 10],
        window_sizes=[7, 7, 14, 7],
        drop_path_rate=0.0,
    )
