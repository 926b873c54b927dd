"""Encoder and decoder as modules whose inputs and outputs are those of a file."""

from __future__ import annotations

import re
from typing import Any

import torch
import torch.nn.functional as F
from segment_anything.utils.onnx import SamOnnxModel
from torch import nn

from ..modeling.image_encoder import ImageEncoder
from ..modeling.sam import Sam
from .tools import MASK_SIDE, Tool

OPSET = 18


def true_sizes(x: torch.Tensor) -> torch.Tensor:
    """(h, w) in pixels of what is not SAM's padding, rows and columns of zeros: [B, 3, S, S] -> int64 [B, 2].

    As `windows.unpadded_sizes`, with no value looked at; an image of zeros is a whole one there too.
    """
    something = (x != 0).any(1)  # [B, S, S]
    places = torch.arange(1, x.shape[2] + 1, device=x.device)
    found = torch.stack([(something.any(along) * places).amax(1) for along in (2, 1)], dim=1)
    return torch.where(found > 0, found, x.shape[2])


class EncoderGraph(nn.Module):
    """x [B, 3, S, S], normalised and padded with zeros -> the embedding, and of a routed model which tokens were prime,
    bool [B, stages, H, W].

    Told what of x is not padding, int64 [B, 2] pixels (h, w), it does not look for zeros, and gives the scores of all
    tokens too, float32 [B, stages, H, W].
    """

    def __init__(self, encoder: ImageEncoder, keep_ratio: float | None = None) -> None:
        """keep_ratio: a constant of the graph; None: the encoder's."""
        super().__init__()
        self.encoder, self.keep_ratio = encoder, keep_ratio

    def forward(self, x: torch.Tensor, extents: torch.Tensor | None = None) -> torch.Tensor | tuple[torch.Tensor, ...]:
        if not self.encoder.config.routed:
            return self.encoder(x)
        sizes = true_sizes(x) if extents is None else extents
        embedding, routing = self.encoder.encode(x, true_sizes=sizes, keep_ratio=self.keep_ratio)
        prime = torch.stack([stage.mask for stage in routing.stages], dim=1)
        if extents is None:
            return embedding, prime
        scores = [stage.scores for stage in routing.stages if stage.scores is not None]  # all have them
        return embedding, prime, torch.stack(scores, dim=1)


class DecoderGraph(SamOnnxModel):
    """SAM's own export of prompt encoder, decoder and postprocessing, mended and fitted to what tools do.

    Mended: SAM's release cuts the padding off at the size of the example that it was traced with, so that masks of
    photos of other shapes are wrong; and where it goes by stability it chooses an empty mask. `has_mask_input` above 0
    means that there is one (labelme says -1).
    """

    def __init__(self, sam: Sam, tool: Tool, stability_score: bool = False, metrics: bool = False) -> None:
        """stability_score, metrics: SAM's `use_stability_score` and `return_extra_metrics`."""
        super().__init__(sam, tool.single, stability_score, metrics)
        self.tool = tool
        self.scale = 1.0 if tool.frame is None else self.img_size / tool.frame
        self.own_side = sam.prompt_encoder.mask_input_size[0]
        self.mask_side = MASK_SIDE if tool.single else self.own_side

    def mask_postprocessing(self, masks: torch.Tensor, orig_im_size: torch.Tensor) -> torch.Tensor:
        side = (self.img_size, self.img_size)
        masks = F.interpolate(masks, side, mode="bilinear", align_corners=False)
        inside = self.resize_longest_image_size(orig_im_size, self.img_size).clamp(min=1)
        masks = masks[..., : inside[0], : inside[1]]  # tensors, so that the graph computes them
        size: Any = orig_im_size.to(torch.int64).unbind()
        return F.interpolate(masks, size, mode="bilinear", align_corners=False)

    def select_masks(
        self, masks: torch.Tensor, iou_preds: torch.Tensor, num_points: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As SAM's, but an empty mask's stability, 0 / 0, counts as 0: torch takes it for the best, runtimes do not."""
        if self.use_stability_score:
            iou_preds = torch.where(iou_preds.isnan(), torch.zeros_like(iou_preds), iou_preds)
        chosen, scores = super().select_masks(masks, iou_preds, num_points)
        return chosen, scores

    @torch.no_grad()
    def forward(
        self,
        image_embeddings: torch.Tensor,
        point_coords: torch.Tensor,
        point_labels: torch.Tensor,
        mask_input: torch.Tensor,
        has_mask_input: torch.Tensor,
        orig_im_size: torch.Tensor,
    ) -> tuple[torch.Tensor, ...]:
        """Inputs as in SAM's export; masks [1, M, H, W] of logits, scores [1, M], logits [1, M, h, w].

        For CVAT: uint8 [1, 1, h, w], 0 or 1, cut out along the box x1 y1 x2 y2 (its last row and column inside), and
        the box, four int64.
        """
        if self.mask_side != self.own_side:
            mask_input = F.interpolate(mask_input, (self.own_side,) * 2, mode="bilinear", align_corners=False)
        masks, *rest = super().forward(
            image_embeddings,
            point_coords * self.scale,
            point_labels,
            mask_input,
            (has_mask_input > 0).to(mask_input.dtype),
            orig_im_size,
        )
        return cut_out(masks > self.model.mask_threshold, *rest) if self.tool.cut else (masks, *rest)

    def example(self) -> dict[str, torch.Tensor]:
        """Inputs to trace with."""
        size = self.model.prompt_encoder.image_embedding_size
        return {
            "image_embeddings": torch.randn(1, self.model.prompt_encoder.embed_dim, *size),
            "point_coords": torch.rand(1, 5, 2) * self.img_size,
            "point_labels": torch.tensor([[0.0, 1.0, 2.0, 3.0, -1.0]]),
            "mask_input": torch.randn(1, 1, self.mask_side, self.mask_side),
            "has_mask_input": torch.ones(1),
            "orig_im_size": torch.tensor([120.0, 160.0]),
        }


def cut_out(mask: torch.Tensor, *rest: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """A mask [1, 1, H, W] along its box, then `rest`, then the box; without a pixel, 1 x 1 at the corner."""
    bounds = []
    for along in (2, 3):  # columns, then rows
        there = mask.any(along)[0, 0].to(torch.int64)
        first = there.argmax()
        last = (there * torch.arange(1, there.shape[0] + 1)).amax() - 1
        bounds.append((first, torch.maximum(last, first)))
    (x1, x2), (y1, y2) = bounds
    cut = mask[:, :, y1 : y2 + 1, x1 : x2 + 1].to(torch.uint8)
    return (cut, *rest, x1, y1, x2, y2)


def photo_graph(size: int) -> str:
    """What stands before an encoder that takes photos as they are, in ONNX's own text: float32 [H, W, 3] RGB 0 ... 255,
    resized so that its longer side is `size` as Pillow does (bilinear, antialiased, rounded after either side),
    normalised as SAM's, padded at right and bottom: x [1, 3, size, size].

    The resizing is two products: onnxruntime's own antialiased Resize is up to 12 grey levels away from Pillow's.
    """
    return f"""
<ir_version: 10, opset_import: ["": {OPSET}]>
photo (float[height, width, 3] input_image) => (float[1, 3, {size}, {size}] prepared) {{
  zero = Constant <value = int64 {{0}}> ()
  one = Constant <value = int64 {{1}}> ()
  first = Constant <value = int64[1] {{0}}> ()
  second = Constant <value = int64[1] {{1}}> ()
  no_pads = Constant <value = int64[6] {{0, 0, 0, 0, 0, 0}}> ()
  sides = Constant <value = int64[2] {{{size}, {size}}}> ()
  side = Constant <value = double {{{size}}}> ()
  half = Constant <value = double {{0.5}}> ()
  unit = Constant <value = double {{1.0}}> ()
  half_level = Constant <value = float {{0.5}}> ()
  black = Constant <value = float {{0.0}}> ()
  mean = Constant <value = float[3, 1, 1] {{123.675, 116.28, 103.53}}> ()
  std = Constant <value = float[3, 1, 1] {{58.395, 57.12, 57.375}}> ()

  shape = Shape <start = 0, end = 2> (input_image)
  extent = Cast <to = 11> (shape)
  longer = ReduceMax <keepdims = 0> (extent)
  scale = Div (side, longer)
  scaled = Mul (extent, scale)
  shifted = Add (scaled, half)
  whole = Floor (shifted)
  new = Cast <to = 7> (whole)
  new_shape = Max (new, one)
  new_extent = Cast <to = 11> (new_shape)
{_resize_weights("rows", "first")}
{_resize_weights("columns", "second")}
  planes = Transpose <perm = [2, 0, 1]> (input_image)
  across = Transpose (columns_weights)
  narrow = MatMul (planes, across)
  narrow_up = Add (narrow, half_level)
  narrow_pixels = Floor (narrow_up)
  small = MatMul (rows_weights, narrow_pixels)
  small_up = Add (small, half_level)
  pixels = Floor (small_up)
  centred = Sub (pixels, mean)
  normalised = Div (centred, std)
  batch = Unsqueeze (normalised, first)
  missing = Sub (sides, new_shape)
  pads = Concat <axis = 0> (no_pads, missing)
  prepared = Pad (batch, pads, black)
}}
"""


def _resize_weights(side: str, place: str) -> str:
    """Pillow's triangle filter for one side, [new, old], each row with a sum of one."""
    text = f"""
  _old = Gather (extent, {place})
  _new = Gather (new_extent, {place})
  _step = Div (_old, _new)
  _reach = Max (_step, unit)
  _count = Gather (new_shape, {place})
  _count0 = Squeeze (_count)
  _outputs = Range (zero, _count0, one)
  _outputs_d = Cast <to = 11> (_outputs)
  _outputs_h = Add (_outputs_d, half)
  _centres = Mul (_outputs_h, _step)
  _centres_c = Unsqueeze (_centres, second)
  _length = Gather (shape, {place})
  _length0 = Squeeze (_length)
  _inputs = Range (zero, _length0, one)
  _inputs_d = Cast <to = 11> (_inputs)
  _inputs_h = Add (_inputs_d, half)
  _far = Sub (_inputs_h, _centres_c)
  _distance = Abs (_far)
  _relative = Div (_distance, _reach)
  _triangle = Sub (unit, _relative)
  _positive = Relu (_triangle)
  _total = ReduceSum (_positive, second)
  _shares = Div (_positive, _total)
  _weights = Cast <to = 1> (_shares)"""
    return re.sub(r"\b_(\w+)", rf"{side}_\1", text)
