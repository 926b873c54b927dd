"""micro-sam: embeddings of an image and of tiles, prompts on saved embeddings, everything, LoRA in the encoder."""

import sys

import numpy as np

PACKAGE, IMAGE_SIZE = "micro-sam", 1024
POINT, BOX = np.array([[110, 220]]), np.array([20, 120, 280, 300])  # y before x


def run(photo, checkpoint, folder):
    sys.modules["mobile_sam"] = None  # whose registry it prefers where it is installed
    from micro_sam import util
    from micro_sam.instance_segmentation import AutomaticMaskGenerator
    from micro_sam.models import build_sam
    from micro_sam.prompt_based_segmentation import segment_from_box, segment_from_mask, segment_from_points

    build_sam._validate_model_type = lambda state: "vit_b"  # it knows the widths of SAM's three models alone
    predictor = util.get_sam_model("vit_b", device="cpu", checkpoint_path=checkpoint)
    first = util.precompute_image_embeddings(predictor, photo, str(folder / "photo.zarr"), ndim=2, verbose=False)
    predictor.reset_image()
    again = util.precompute_image_embeddings(predictor, photo, str(folder / "photo.zarr"), ndim=2, verbose=False)
    point = segment_from_points(predictor, POINT, np.array([1]), image_embeddings=again)
    box = segment_from_box(predictor, BOX, image_embeddings=again)
    found = {"features": np.asarray(first["features"]), "point": point}
    found["mask again"] = segment_from_mask(predictor, point[0], image_embeddings=again)

    volume = np.stack([photo[..., 0], photo[::-1, :, 1]])
    slices = util.precompute_image_embeddings(predictor, volume, ndim=3, verbose=False, batch_size=2)
    found["slices"] = np.asarray(slices["features"])
    found["in a slice"] = segment_from_box(predictor, BOX, image_embeddings=slices, i=1)
    tiles = {"tile_shape": (160, 256), "halo": (16, 16)}
    tiled = util.precompute_image_embeddings(predictor, photo, ndim=2, verbose=False, batch_size=2, **tiles)
    found["in a tile"] = segment_from_points(predictor, POINT, np.array([1]), image_embeddings=tiled)

    generator = AutomaticMaskGenerator(predictor, points_per_side=6)
    generator.initialize(photo, image_embeddings=first)
    found["everything"] = np.asarray(generator.generate(pred_iou_thresh=0.4, stability_score_thresh=0.6))

    adapted = util.get_sam_model(
        "vit_b", device="cpu", checkpoint_path=checkpoint, peft_kwargs={"rank": 4}, flexible_load_checkpoint=True
    )
    adapted.set_image(photo)
    found["features with LoRA"] = adapted.features.numpy()  # whose changes start at zero
    return found | {"masks": np.concatenate([point, box]) > 0}
