"""Label Studio's backend, CVAT's function and Roboflow's inference server: embeddings sent out, parts called by hand."""

import base64

import numpy as np
import torch
from segment_anything.utils.transforms import ResizeLongestSide

from tests.photos import PHOTOS

PHOTO = PHOTOS["portrait"]


def test_label_studio_keeps_embeddings(sides):
    def program(side):
        sam = side.build()
        predictor = side.api.SamPredictor(sam)
        predictor.set_image(PHOTO)
        kept = {
            "embedding": predictor.get_image_embedding().cpu().numpy(),
            "coords": predictor.transform.apply_coords(np.array([[150, 120]]), PHOTO.shape[:2]),
            "threshold": predictor.model.mask_threshold,
        }
        masks, probs, _ = predictor.predict(
            point_coords=np.array([[150, 120]], dtype=float),
            point_labels=np.array([1], dtype=int),
            mask_input=None,
            multimask_output=False,
        )
        return kept, (masks[0, :, :].astype(np.uint8), float(probs[0]))

    sides.compare(program)


def test_label_studio_sends_batches_to_the_model(sides):
    def program(side):
        sam = side.build()
        transform = ResizeLongestSide(sam.image_encoder.img_size)
        records = []
        for image in PHOTOS.values():
            boxes = torch.tensor([[60.0, 20, 250, 280], [10, 10, 90, 120]])
            tensor = torch.as_tensor(transform.apply_image(image)).permute(2, 0, 1).contiguous()
            boxes = transform.apply_boxes_torch(boxes, image.shape[:2])
            records.append({"image": tensor, "boxes": boxes, "original_size": image.shape[:2]})
        return sam(records, multimask_output=False)

    sides.compare(program)


def test_cvat_encodes_the_embedding_as_text(sides):
    def program(side):
        predictor = side.predictor(PHOTO)
        features = predictor.get_image_embedding()
        text = base64.b64encode(features.cpu().numpy() if features.is_cuda else features.numpy()).decode()
        return np.frombuffer(base64.b64decode(text), np.float32).reshape(features.shape)

    sides.compare(program)


def test_inference_calls_every_part_by_hand(sides):
    def program(side):
        sam = side.build()
        sam.to(device="cpu")
        transform = ResizeLongestSide(sam.image_encoder.img_size)
        with torch.inference_mode():
            tensor = torch.from_numpy(transform.apply_image(PHOTO)).permute(2, 0, 1).contiguous()[None]
            size = transform.get_preprocess_shape(*PHOTO.shape[:2], transform.target_length)
            embedding = sam.image_encoder(sam.preprocess(tensor))
            coords = transform.apply_coords_torch(torch.tensor([[[150.0, 120.0]]]), PHOTO.shape[:2])
            sparse, dense = sam.prompt_encoder(points=(coords, torch.tensor([[1]])), boxes=None, masks=None)
            logits, scores = sam.mask_decoder(
                image_embeddings=embedding,
                image_pe=sam.prompt_encoder.get_dense_pe(),
                sparse_prompt_embeddings=sparse,
                dense_prompt_embeddings=dense,
                multimask_output=True,
            )
            masks = sam.postprocess_masks(logits, input_size=size, original_size=PHOTO.shape[:2])
        return embedding, logits, scores, masks > sam.mask_threshold

    sides.compare(program)
