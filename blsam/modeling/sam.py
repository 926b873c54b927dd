"""`segment_anything`'s `Sam` with our image encoder; it differs only in telling the encoder what is padding.

Another encoder may be put in its place, as in SAM: a compiled one of ours, or one of one's own.
"""

from __future__ import annotations

from typing import Any

import torch
from segment_anything.modeling import Sam as _Sam

from .image_encoder import ImageEncoder
from .layers import input_dtype
from .mask_decoder import decode_photo
from .routing import Routing, Stage


class Sam(_Sam):
    """Prompt encoder, mask decoder, `preprocess` and `postprocess_masks` are `segment_anything`'s; what the decoder gives
    is computed in fewer operations (`decode_photo`)."""

    image_encoder: ImageEncoder

    def encode_images(
        self, images: list[torch.Tensor], *, keep_ratio: float | None = None
    ) -> tuple[torch.Tensor, Routing]:
        """Resized images [3, h, w] (or [1, 3, h, w]), 0 ... 255, long side `img_size`; keep_ratio for this call only.

        -> embedding [B, 256, h, w], and the routing (without stages for exact models, for a compiled encoder and
        for one of one's own, which is given the batch alone).
        """
        sizes = [(image.shape[-2], image.shape[-1]) for image in images]
        batch = torch.stack([self.preprocess(image.squeeze(0) if image.dim() == 4 else image) for image in images])
        embedding, routing = self._encode(batch, sizes, keep_ratio)
        return embedding.to(input_dtype(self.mask_decoder)), routing  # the encoder may have been cast alone

    def _encode(
        self, batch: torch.Tensor, sizes: list[tuple[int, int]], keep_ratio: float | None
    ) -> tuple[torch.Tensor, Routing]:
        """By whatever encoder is there, called as a module, so that hooks and compiled forms of it are used."""
        encoder: Any = self.image_encoder
        ours = getattr(encoder, "_orig_mod", encoder)  # of torch.compile(encoder)
        forward_is_ours = getattr(type(ours), "forward", None) is ImageEncoder.forward and "forward" not in vars(ours)
        if not forward_is_ours:  # called as SAM calls it
            if keep_ratio is not None:
                raise ValueError(f"keep_ratio means nothing to an image encoder of type {type(ours).__name__}")
            return encoder(batch), Routing()
        if encoder is not ours or ours._compiled_call_impl is not None:
            # sizes as a tensor are no reason to compile again; a list of stages would break the graph
            extents = torch.tensor(sizes, device=batch.device) if ours.config.reduces else None
            return encoder(batch, extents, keep_ratio), Routing()
        stages: list[Stage] = []
        return encoder(batch, sizes, keep_ratio, stages), Routing(tuple(stages))

    @torch.no_grad()
    def forward(self, batched_input: list[dict[str, Any]], multimask_output: bool) -> list[dict[str, torch.Tensor]]:
        """Masks of several images at once; keys, shapes and order of input and output as in `segment_anything`."""
        embeddings, _ = self.encode_images([record["image"] for record in batched_input])
        return [
            self._decode(record, embedding[None], multimask_output)
            for record, embedding in zip(batched_input, embeddings)
        ]

    def _decode(self, record: dict[str, Any], embedding: torch.Tensor, multimask: bool) -> dict[str, torch.Tensor]:
        points = (record["point_coords"], record["point_labels"]) if "point_coords" in record else None
        sparse, dense = self.prompt_encoder(points, record.get("boxes"), record.get("mask_inputs"))
        positions = self.prompt_encoder.get_dense_pe()
        logits, scores = decode_photo(self.mask_decoder, embedding, positions, sparse, dense, multimask)
        masks = self.postprocess_masks(logits, record["image"].shape[-2:], record["original_size"])
        return {"masks": masks > self.mask_threshold, "iou_predictions": scores, "low_res_logits": logits}
