"""What each tool that opens such files asks of them; read from the tools' sources.

blsam        `blsam.onnx`, and scripts of one's own
anylabeling  AnyLabeling, X-AnyLabeling, samexporter: the photo goes in as it is, and the decoder is always told of a
             frame of 1024 pixels, whatever the model's size
labelme      labelme and osam: the image size is read from the encoder; `has_mask_input` is -1
cvat         CVAT's browser plugin: a mask cut out along its box, an embedding of 64 x 64 cells; its server encodes in
             torch, so that there is no encoder
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

MASK_SIDE = 256  # of the mask that tools give to a decoder, whatever the model's is


@dataclass(frozen=True)
class Tool:
    """photo: whether the encoder takes a photo as it is, [H, W, 3], rather than what is resized, normalised, padded.
    frame: the longer side, in pixels, that prompts are scaled to; None: the model's. single: one mask comes out, chosen
    by the number of points as in SAM's export, rather than all four. cut: the mask is cut out along its box.
    has_encoder: whether the tool reads one."""

    photo: bool = False
    frame: int | None = None
    single: bool = True
    cut: bool = False
    has_encoder: bool = True


TOOLS = {
    "blsam": Tool(single=False),
    "anylabeling": Tool(photo=True, frame=1024),
    "labelme": Tool(),
    "cvat": Tool(frame=1024, cut=True, has_encoder=False),
}

OUTPUTS = ("masks", "iou_predictions", "low_res_masks")
BOUNDS = ("xtl", "ytl", "xbr", "ybr")


def decoder_outputs(tool: Tool) -> Sequence[str]:
    return (*OUTPUTS, *BOUNDS) if tool.cut else OUTPUTS


def anylabeling_yaml(name: str, encoder: str, decoder: str) -> str:
    """The file that AnyLabeling loads as a custom model, beside the two that it names."""
    return (
        f"type: segment_anything\nname: {name}\ndisplay_name: {name}\n"
        f"encoder_model_path: {encoder}\ndecoder_model_path: {decoder}\n"
        "input_size: 1024\nmax_width: 1024\nmax_height: 682\n"
    )
