"""`Sam` called as segment_anything's, and what may stand in the place of its encoder."""

import copy

import numpy as np
import pytest
import torch

from blsam import SamPredictor, sam_model_registry
from blsam.modeling.image_encoder import ImageEncoder
from tests.helpers import gap
from tests.photos import PHOTOS


def test_sam_forward_passes_extents_and_equals_the_predictor(small):
    predictor, records = SamPredictor(small), []
    boxes = torch.tensor([[60.0, 20, 250, 280]])
    for image in PHOTOS.values():
        resized = torch.as_tensor(predictor.transform.apply_image(image)).permute(2, 0, 1)
        frame = predictor.transform.apply_boxes_torch(boxes, image.shape[:2])
        records.append({"image": resized, "original_size": image.shape[:2], "boxes": frame})
    for image, result in zip(PHOTOS.values(), small(records, multimask_output=True)):
        predictor.set_image(image)
        masks, scores, _ = predictor.predict(box=boxes[0].numpy())
        assert (result["masks"][0].numpy() != masks).mean() <= 1e-3
        assert np.abs(result["iou_predictions"][0].numpy() - scores).max() <= 1e-4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_encoder_may_be_cast_alone(dtype):
    torch.manual_seed(0)
    sam = sam_model_registry["blsam_vit_t"](image_size=128)
    predictor = SamPredictor(sam)
    sam.image_encoder.to(dtype)
    predictor.set_image(PHOTOS["landscape"])
    assert predictor.features.dtype == torch.float32
    assert np.isfinite(predictor.predict(box=[60, 20, 250, 280])[1]).all()


def test_another_encoder_is_used_as_in_sam(small):
    class Own(torch.nn.Module):
        img_size = 256

        def forward(self, x):
            self.seen = x.shape
            return torch.ones(len(x), 256, 16, 16)

    sam = copy.copy(small)
    sam._modules = dict(small._modules, image_encoder=Own())
    predictor = SamPredictor(sam)
    predictor.set_image(PHOTOS["landscape"])
    assert sam.image_encoder.seen == (1, 3, 256, 256) and predictor.features.eq(1).all()
    assert predictor.predict(box=[60, 20, 250, 280])[0].shape == (3, 300, 512)
    with pytest.raises(ValueError, match="keep_ratio means nothing to an image encoder of type Own"):
        sam.encode_images([torch.zeros(3, 150, 256)], keep_ratio=0.5)


@pytest.mark.parametrize("name", ["vit_t", "blsam_vit_t"])
def test_a_compiled_encoder_is_used(name):
    torch.manual_seed(0)
    sam = sam_model_registry[name](image_size=128)
    predictor = SamPredictor(sam)
    predictor.set_image(PHOTOS["landscape"])
    plain, runs = predictor.features, []

    def backend(graph, inputs):
        return lambda *args: runs.append(1) or graph(*args)

    sam.image_encoder = torch.compile(sam.image_encoder, backend=backend)
    predictor.set_image(PHOTOS["landscape"])
    assert runs and gap(predictor.features, plain) <= 1e-4
    sam.image_encoder = sam.image_encoder._orig_mod
    sam.image_encoder.compile(backend=backend)
    runs.clear()
    predictor.set_image(PHOTOS["portrait"])
    assert runs
    predictor.predict(box=[60, 20, 250, 280])


def test_hooks_of_the_encoder_are_called(small):
    seen, predictor = [], SamPredictor(small)
    handle = small.image_encoder.register_forward_hook(lambda _, __, out: seen.append(out))
    predictor.set_image(PHOTOS["landscape"])
    handle.remove()
    assert len(seen) == 1 and torch.equal(seen[0], predictor.features) and predictor.routing.stages


def test_a_subclass_with_sams_forward_is_called_as_sam_calls_it(small):
    class Own(ImageEncoder):
        def forward(self, x):
            return super().forward(x) * 0 + 1

    sam = copy.copy(small)
    encoder = Own(small.image_encoder.config, 256)
    sam._modules = dict(small._modules, image_encoder=encoder.eval())
    predictor = SamPredictor(sam)
    predictor.set_image(PHOTOS["landscape"])
    assert predictor.features.eq(1).all()
