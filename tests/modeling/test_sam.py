"""`Sam` called as segment_anything's."""

import numpy as np
import torch

from blsam import SamPredictor
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
