"""Our encoder inside Hugging Face's SamModel: the same masks, folders, pipelines."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from skimage import data

from blsam.build_sam import build_sam, sam_model_registry
from blsam.checkpoint import load, read
from blsam.encoded import Encoded
from blsam.predictor import SamPredictor
from tests.helpers import TINY, TINY_EXACT, gap, images, randomize

transformers = pytest.importorskip("transformers", reason="pip install 'blsam[hf]'")
from blsam.integrations.transformers import BLSamConfig, BLSamModel, processor_of  # noqa: E402

FINE = replace(TINY, name="tiny_fine", grow=2)


def model(config=TINY, size=160):
    torch.manual_seed(0)
    sam = build_sam(config, image_size=size, keep_ratio=0.5)
    randomize(sam.image_encoder)
    return sam


def predicted(sam, pixel_values, size, **prompts):
    """As `SamPredictor` does it, on an image that is prepared already; size (h, w) of the photo, not scaled."""
    features, routing = sam.image_encoder.encode(pixel_values)
    predictor = SamPredictor(sam)
    predictor.set_encoded(Encoded(features, routing, size, size))
    return predictor.predict(**prompts)


@torch.no_grad()
@pytest.mark.parametrize("config", [TINY_EXACT, TINY, FINE], ids=lambda config: config.name)
def test_the_same_masks_from_the_same_pixels(config):
    sam, x = model(config), images()
    x[:, :, 120:] = 0
    ours, box = BLSamModel.from_sam(sam), np.array([20.0, 30, 100, 90])
    found = ours(pixel_values=x, input_boxes=torch.tensor(box)[None, None].float())
    masks, scores, logits = predicted(sam, x, (120, 160), box=box)
    np.testing.assert_allclose(found.iou_scores[0, 0], scores, atol=1e-5)
    assert gap(found.pred_masks[0, 0], torch.from_numpy(logits)) < 1e-4
    of_photo = processor_of(ours).image_processor.post_process_masks(
        found.pred_masks, torch.tensor([[120, 160]]), torch.tensor([[120, 160]])
    )
    assert (of_photo[0][0].numpy() == masks).mean() > 0.9995


@torch.no_grad()
def test_a_click_and_an_embedding_made_before():
    sam, x, point = model(), images(), np.array([[50.0, 60.0]])
    ours = BLSamModel.from_sam(sam)
    embedding = ours.get_image_embeddings(x)
    assert torch.equal(embedding, sam.image_encoder(x))
    points = torch.tensor(point)[None, None].float()
    labels = torch.ones(1, 1, 1, dtype=torch.int)
    found = ours(image_embeddings=embedding, input_points=points, input_labels=labels)
    _, scores, logits = predicted(sam, x, (160, 160), point_coords=point, point_labels=np.array([1]))
    np.testing.assert_allclose(found.iou_scores[0, 0], scores, atol=1e-5)
    assert gap(found.pred_masks[0, 0], torch.from_numpy(logits)) < 1e-4


@torch.no_grad()
@pytest.mark.parametrize("config", [TINY_EXACT, TINY, FINE], ids=lambda config: config.name)
def test_a_folder_gives_the_same_model(config, tmp_path):
    sam, x = model(config), images()
    ours = BLSamModel.from_sam(sam)
    ours.save_pretrained(tmp_path)
    processor_of(ours).save_pretrained(tmp_path)
    for auto in (BLSamModel, transformers.AutoModel, transformers.AutoModelForMaskGeneration):
        again = auto.from_pretrained(tmp_path)
        assert isinstance(again, BLSamModel) and again.vision_encoder.keep_ratio == 0.5
        assert torch.equal(again.get_image_embeddings(x), ours.get_image_embeddings(x))
    processor = transformers.AutoProcessor.from_pretrained(tmp_path)
    assert processor(images=data.coffee(), return_tensors="pt")["pixel_values"].shape[2:] == (160, 160)
    state, _ = read(tmp_path / "model.safetensors", config)
    other = build_sam(config, image_size=160, keep_ratio=0.5)
    load(other, config, state, "the folder")
    assert torch.equal(other.image_encoder(x), sam.image_encoder(x))


def test_the_processor_normalises_as_sam_does():
    sam, processor = model(), processor_of(BLSamModel.from_sam(model())).image_processor
    for given, own in ((processor.image_mean, sam.pixel_mean), (processor.image_std, sam.pixel_std)):
        torch.testing.assert_close(torch.tensor(given) * 255, own.flatten(), rtol=1e-6, atol=1e-4)


@torch.no_grad()
def test_half_precision_is_kept(tmp_path):
    sam = model()
    sam.image_encoder.use_dtype(torch.bfloat16)
    ours = BLSamModel.from_sam(sam)
    expected = sam.image_encoder(images())
    assert torch.equal(ours.get_image_embeddings(images()), expected)
    ours.vision_encoder.keep_ratio = 0.25
    ours.save_pretrained(tmp_path)
    again = BLSamModel.from_pretrained(tmp_path)
    assert again.vision_encoder.keep_ratio == 0.25
    again.vision_encoder.keep_ratio = 0.5
    assert torch.equal(again.get_image_embeddings(images()), expected)


def test_the_keep_ratio_may_be_set_and_training_reaches_the_encoder():
    ours = BLSamModel.from_sam(model())
    ours.vision_encoder.keep_ratio = 0.25
    found = ours(pixel_values=images(), input_points=torch.tensor([[[[50.0, 60.0]]]]))
    found.pred_masks.sum().backward()
    assert ours.vision_encoder.blocks[1].e_block.attn.qkv.weight.grad.abs().sum() > 0


def test_a_config_says_what_it_is():
    config = BLSamConfig.of(model(FINE).image_encoder)
    assert config.encoder_config == FINE and config.model_type == "blsam"
    assert config.prompt_encoder_config.image_embedding_size == 20


@torch.no_grad()
def test_mask_generation_pipeline():
    """On the model that ships: everything in a photo, by transformers' own code."""
    from blsam.options import shipped_checkpoint

    sam = sam_model_registry["blsam_vit_t"](shipped_checkpoint("blsam_vit_t"))
    ours = BLSamModel.from_sam(sam)
    generate = transformers.pipeline(
        "mask-generation", model=ours, image_processor=processor_of(ours).image_processor, device="cpu"
    )
    options = {"points_per_crop": 8, "pred_iou_thresh": 0.5, "stability_score_thresh": 0.8}
    found = generate(Image.fromarray(data.coffee()), **options)
    assert found["masks"] and all(np.asarray(mask).shape == (400, 600) for mask in found["masks"])
    assert all(0.5 < score <= 1 for score in found["scores"])
