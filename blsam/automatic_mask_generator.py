"""`segment_anything`'s mask generator on our predictor: crops tell the encoder what is padding, and only the masks
that pass the first filter are ever made."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from segment_anything import SamAutomaticMaskGenerator as _SamAutomaticMaskGenerator
from segment_anything.utils.amg import (
    MaskData,
    batched_mask_to_box,
    calculate_stability_score,
    is_box_near_crop_edge,
    mask_to_rle_pytorch,
    uncrop_masks,
)

from .config import OUT_CHANNELS
from .decoding import confident
from .images import as_photo
from .precision import resolve_dtype
from .predictor import SamPredictor

CHUNK, CHUNK_ON_GPU = 4, 64  # masks at the photo's size at a time: what a processor's caches hold, what a GPU wants


class Unchanged(list):
    """A list that nobody changes: SAM copies run-lengths number by number whenever it joins them to others."""

    def __deepcopy__(self, memo: Any) -> Unchanged:
        return self


class SamAutomaticMaskGenerator(_SamAutomaticMaskGenerator):
    """Arguments and results as in `segment_anything`; decoder_dtype: what the mask decoder multiplies in where no autocast
    says otherwise, "float32", "bfloat16" or "auto" (`precision.resolve_dtype`)."""

    decoder_dtype: torch.dtype = torch.float32

    def __init__(self, model: Any, *args: Any, decoder_dtype: str = "float32", **kwargs: Any) -> None:
        super().__init__(model, *args, **kwargs)
        self.predictor = SamPredictor(model)
        self.decoder_dtype = resolve_dtype(decoder_dtype, self.predictor.device, OUT_CHANNELS)

    def generate(self, image: Any) -> list[dict[str, Any]]:
        """Masks of everything in an image, uint8 [H, W, 3] or anything that `images.as_photo` reads as one; one record
        for each, as in `segment_anything`."""
        photo, device = as_photo(image), self.predictor.device
        # release 1.0 makes the categories of its NMS on the default device, which fails beside boxes on another
        at_home = device.type == torch.get_default_device().type == "cpu"
        with nullcontext() if at_home else torch.device(device):  # which slows every call
            return super().generate(photo)

    def _process_crop(self, image: np.ndarray, crop_box: list[int], *rest: Any) -> MaskData:
        x1, y1, x2, y2 = crop_box
        if x2 <= x1 or y2 <= y1:  # of a photo with fewer pixels across than crops
            return MaskData()
        data = super()._process_crop(image, crop_box, *rest)
        data["crop_boxes"] = data["crop_boxes"].view(-1, 4)  # of no masks, it would have one dimension and break
        return data

    def _process_batch(
        self, points: np.ndarray, im_size: tuple[int, ...], crop_box: list[int], orig_size: tuple[int, ...]
    ) -> MaskData:
        """Masks of the points [N, 2] (x, y in the crop) that pass the filters, as run-lengths of the whole photo.

        `segment_anything` makes all three masks of every point, scales them up and filters then; here the predicted IoU
        decides first, and what it leaves is made, scaled up, judged and encoded a few masks at a time.
        """
        threshold = self.pred_iou_thresh if self.pred_iou_thresh > 0.0 else None
        found = confident(self.predictor, points, threshold, self.decoder_dtype)
        # float64, as in SAM, and so on the CPU: not every device has it
        of_point = torch.as_tensor(points, device="cpu")[found.prompts.cpu()]
        data = MaskData()
        chunk = CHUNK if self.predictor.device.type == "cpu" else CHUNK_ON_GPU
        for start in range(0, max(1, len(of_point)), chunk):  # of nothing, one part without masks
            part = slice(start, start + chunk)
            data.cat(self._process_masks(found.logits[part], found.scores[part], of_point[part], crop_box, orig_size))
        data["rles"] = Unchanged(data["rles"])
        return data

    def _process_masks(
        self,
        logits: torch.Tensor,
        scores: torch.Tensor,
        points: torch.Tensor,
        crop_box: list[int],
        orig_size: tuple[int, ...],
    ) -> MaskData:
        """Low-resolution logits [M, h, w] to what passes the stability and the border filter."""
        predictor, threshold = self.predictor, self.predictor.model.mask_threshold
        masks = predictor.model.postprocess_masks(logits[:, None], predictor.input_size, predictor.original_size)[:, 0]
        data = MaskData(masks=masks, iou_preds=scores, points=points)
        data["stability_score"] = calculate_stability_score(masks, threshold, self.stability_score_offset)
        if self.stability_score_thresh > 0.0:
            data.filter(data["stability_score"] >= self.stability_score_thresh)
        data["masks"] = data["masks"] > threshold
        data["boxes"] = batched_mask_to_box(data["masks"])
        height, width = orig_size
        data.filter(~is_box_near_crop_edge(data["boxes"], crop_box, [0, 0, width, height]))
        data["rles"] = Unchanged(mask_to_rle_pytorch(uncrop_masks(data["masks"], crop_box, height, width)))
        del data["masks"]
        return data
