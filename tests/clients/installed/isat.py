"""ISAT: its copy of `segment_anything` exchanged for ours; points, a box, and images encoded ahead."""

import sys

import numpy as np
import torch

PACKAGE = "isat-sam"


def run(photo, checkpoint, folder):
    import segment_anything
    from ISAT.segment_any import segment_any
    from ISAT.segment_any import segment_anything as copy

    path = folder / "sam_vit_b.pth"  # it tells the kind of model by the name
    path.symlink_to(checkpoint)
    copy.sam_model_registry, copy.SamPredictor = segment_anything.sam_model_registry, segment_anything.SamPredictor
    sys.modules["ISAT.segment_any.segment_anything"] = copy
    sam = segment_any.SegAny(str(path), use_bfloat16=False)
    sam.set_image(photo)
    point = sam.predict_with_point_prompt([[220, 110], [20, 20]], [1, 0])
    box = sam.predict_with_box_prompt(np.array([390, 20, 465, 280]))

    predictor = sam.predictor  # as its thread that encodes ahead does, and what the window does with it
    with torch.inference_mode():
        resized = predictor.transform.apply_image(photo[::-1])
        tensor = torch.as_tensor(resized).permute(2, 0, 1).contiguous()[None, :, :, :]
        features = predictor.model.image_encoder(predictor.model.preprocess(tensor))
    sam.reset_image()
    predictor.features, predictor.original_size = features, photo.shape[:2]
    predictor.input_size, predictor.is_image_set = tuple(tensor.shape[-2:]), True
    ahead = sam.predict_with_box_prompt(np.array([120, 20, 300, 280]))
    return {"features": features.numpy(), "encoded ahead": ahead, "masks": np.concatenate([point, box])}
