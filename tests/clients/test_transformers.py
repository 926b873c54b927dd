"""The `mask-generation` pipeline of transformers, with a model of SAM's kind behind the two calls that it makes."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from tests.clients.conftest import SIZE
from tests.photos import PHOTOS


class Adapter(nn.Module):
    """The glue: what the pipeline calls, in terms of SAM's parts.

    Points [B, prompts, points, 2] in the resized image, labels [B, prompts, points] -> `pred_masks`, logits
    [B, prompts, masks, h, w], and `iou_scores` [B, prompts, masks].
    """

    def __init__(self, sam):
        super().__init__()
        self.sam = sam

    @torch.no_grad()
    def get_image_embeddings(self, pixel_values):
        return self.sam.image_encoder(pixel_values)

    @torch.no_grad()
    def forward(self, image_embeddings, input_points, input_labels):
        masks, scores = [], []
        for embedding, points, labels in zip(image_embeddings, input_points, input_labels):
            sparse, dense = self.sam.prompt_encoder(points=(points.float(), labels), boxes=None, masks=None)
            found = self.sam.mask_decoder(
                image_embeddings=embedding[None],
                image_pe=self.sam.prompt_encoder.get_dense_pe(),
                sparse_prompt_embeddings=sparse,
                dense_prompt_embeddings=dense,
                multimask_output=True,
            )
            masks.append(found[0])
            scores.append(found[1])
        return {"pred_masks": torch.stack(masks), "iou_scores": torch.stack(scores)}


def test_the_two_calls(sides):
    def program(side):
        sam = side.build()
        transform, model = side.api.SamPredictor(sam).transform, Adapter(sam)
        tensors = [torch.as_tensor(transform.apply_image(image)).permute(2, 0, 1)[None] for image in PHOTOS.values()]
        embeddings = model.get_image_embeddings(torch.cat([sam.preprocess(tensor) for tensor in tensors]))
        points = torch.tensor([[[[90.0, 70]], [[150, 60]]]]).repeat(2, 1, 1, 1)
        return model(
            image_embeddings=embeddings, input_points=points, input_labels=torch.ones(2, 2, 1, dtype=torch.int)
        )

    sides.compare(program)


def test_the_pipeline(sides):
    transformers = pytest.importorskip("transformers")
    image_module = pytest.importorskip("PIL.Image")
    processor = transformers.SamImageProcessor(
        size={"longest_edge": SIZE},
        pad_size={"height": SIZE, "width": SIZE},
        mask_size={"longest_edge": SIZE // 4},
        mask_pad_size={"height": SIZE // 4, "width": SIZE // 4},
    )

    def program(side):
        model = Adapter(side.build())
        model.config, model.device, model.dtype = SimpleNamespace(), torch.device("cpu"), torch.float32
        model.can_generate = lambda: False
        pipeline = transformers.MaskGenerationPipeline(model=model, image_processor=processor)
        found = pipeline(
            image_module.fromarray(PHOTOS["landscape"]),
            points_per_crop=3,
            points_per_batch=4,
            pred_iou_thresh=0.5,
            stability_score_thresh=0.6,
        )
        return {"masks": [np.asarray(mask) for mask in found["masks"]], "scores": np.asarray(found["scores"])[:2]}

    assert sides.compare(program)["masks"]
