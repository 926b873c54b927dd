"""An encoded photo in memory and on disk: the same masks without the encoder, and no other model's."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from skimage import data

from blsam import SamPredictor, build_sam
from blsam.encoded import Encoded, Identity, fingerprint
from tests.helpers import TINY, TINY_EXACT, randomize

PHOTO = data.coffee()[:300]
BOX = np.array([160, 10, 400, 245])


def make(config=TINY, seed=0, **more):
    torch.manual_seed(0)
    return randomize(build_sam(config, image_size=160, **more), seed=seed)


@pytest.fixture(scope="module", params=[TINY, TINY_EXACT], ids=lambda config: config.name)
def sam(request):
    return make(request.param)


@pytest.fixture
def predictor(sam):
    predictor = SamPredictor(sam)
    predictor.set_image(PHOTO)
    return predictor


def test_a_photo_comes_back_from_disk_without_the_encoder(predictor, sam, tmp_path, monkeypatch):
    path, identity = tmp_path / "new" / "photo.safetensors", Identity.of(sam)
    predictor.encoded.save(path, identity)
    expected = predictor.predict(box=BOX)
    monkeypatch.setattr(sam.image_encoder, "encode", lambda *_, **__: pytest.fail("encoded again"))
    other = SamPredictor(sam)
    other.set_encoded(Encoded.load(path, identity))
    for found, wanted in zip(other.predict(box=BOX), expected):
        assert np.array_equal(found, wanted)
    assert torch.equal(other.get_image_embedding(), predictor.features) and other.is_image_set
    assert (
        (other.input_size, other.original_size)
        == (predictor.input_size, predictor.original_size)
        == ((80, 160), (300, 600))
    )
    assert len(other.routing.stages) == len(predictor.routing.stages) == len(sam.image_encoder.predictors)
    for one, two in zip(other.routing.stages, predictor.routing.stages):
        assert torch.equal(one.mask, two.mask) and torch.equal(one.scores, two.scores)
        assert torch.equal(one.counts, two.counts) and one.mask.any() and not one.mask.all()
    # as any program reads it
    with safe_open(path, "pt") as file:
        assert file.metadata()["original_size"] == "[300, 600]" and file.get_tensor("features").shape == (
            1,
            256,
            10,
            10,
        )


def test_a_value_is_what_a_predictor_and_its_batch_hold(predictor, sam):
    encoded = predictor.encoded
    assert encoded.features is predictor.features and encoded.routing is predictor.routing
    stages = encoded.routing.stages
    tensors = [encoded.features, *(t for s in stages for t in (s.mask, s.scores, s.counts))]
    assert encoded.nbytes == sum(t.numel() * t.element_size() for t in tensors)
    batch = SamPredictor(sam)
    batch.set_images([PHOTO[:, :90], PHOTO])
    batch.use_image(1)
    assert (batch.encoded.features - encoded.features).abs().max() < 1e-4 * encoded.features.std()
    assert (batch.encoded.input_size, batch.encoded.original_size) == (encoded.input_size, encoded.original_size)
    batch.set_encoded(encoded)
    with pytest.raises(ValueError, match="image 1 is none of the 0"):  # the batch is forgotten, as by set_image
        batch.use_image(1)
    batch.reset_image()
    with pytest.raises(RuntimeError, match="no photo is encoded"):
        batch.encoded  # noqa: B018


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (lambda: make(seed=1), r"\(weights [0-9a-f]{12}, not [0-9a-f]{12}\)"),
        (lambda: make(keep_ratio=0.5), r"\(keep ratio 0.25, not 0.5\)"),
        (lambda: make(TINY_EXACT), r"\(model tiny, not tiny_exact\)"),
        (lambda: make(replace(TINY, semi_cross=False)), r"\(semi cross True, not False\)"),
        (lambda: make(dtype="bfloat16"), r"dtype float32, not bfloat16"),
    ],
)
def test_another_model_s_is_refused_in_one_line(other, message, tmp_path):
    sam = make()
    predictor, path = SamPredictor(sam), tmp_path / "photo.safetensors"
    predictor.set_image(PHOTO)
    predictor.encoded.save(path, Identity.of(sam))
    with pytest.raises(ValueError, match=f"was encoded by another model .*{message}.*encode the photo again") as error:
        Encoded.load(path, Identity.of(other()))
    assert "\n" not in str(error.value)


def test_a_finer_embedding_is_prompted_and_taken_up_again():
    """Embedding and masks of twice as many rows, prompts in the same pixels."""
    sam = make(replace(TINY_EXACT, grow=2))
    predictor = SamPredictor(sam)
    predictor.set_image(PHOTO)
    assert predictor.features.shape == (1, 256, 20, 20) and sam.prompt_encoder.mask_input_size == (80, 80)
    masks, _, logits = predictor.predict(box=BOX)
    assert masks.shape == (3, *PHOTO.shape[:2]) and logits.shape == (3, 80, 80)
    again = predictor.predict(box=BOX, mask_input=logits[:1], multimask_output=False)[2]
    assert np.isfinite(again).all()
    other = SamPredictor(sam)
    other.set_encoded(predictor.encoded)
    assert np.array_equal(other.predict(box=BOX)[2], logits)
    with pytest.raises(ValueError, match=r"must be \[1, 256, 10, 10\], is \[1, 256, 20, 20\]"):
        SamPredictor(make(TINY_EXACT)).set_encoded(predictor.encoded)


def test_another_image_size_s_is_refused(predictor, sam, tmp_path):
    path = tmp_path / "photo.safetensors"
    predictor.encoded.save(path, Identity.of(sam))
    torch.manual_seed(0)
    larger = build_sam(sam.image_encoder.config, image_size=224)
    with pytest.raises(ValueError, match="image size 160, not 224"):
        Encoded.load(path, Identity.of(larger))
    with pytest.raises(ValueError, match=r"must be \[1, 256, 14, 14\], is \[1, 256, 10, 10\]"):
        SamPredictor(larger).set_encoded(predictor.encoded)


def test_a_keep_ratio_of_one_call(tmp_path):
    sam = make()
    image = torch.zeros(3, 80, 160)
    features, routing = sam.encode_images([image], keep_ratio=0.5)
    path = tmp_path / "photo.safetensors"
    Encoded(features, routing, (80, 160), (300, 600)).save(path, Identity.of(sam, keep_ratio=0.5))
    assert torch.equal(Encoded.load(path, Identity.of(sam, keep_ratio=0.5)).features, features)
    with pytest.raises(ValueError, match="keep ratio 0.5, not 0.25"):
        Encoded.load(path, Identity.of(sam))


def test_files_that_are_no_encoded_photo(tmp_path):
    identity, path = Identity.of(make()), tmp_path / "photo.safetensors"
    with pytest.raises(FileNotFoundError, match="no encoded photo at"):
        Encoded.load(path, identity)
    path.write_bytes(b"no safetensors")
    with pytest.raises(ValueError, match="damaged or not an encoded photo"):
        Encoded.load(path, identity)
    save_file({"features": torch.zeros(1, 256, 10, 10)}, path)
    with pytest.raises(ValueError, match="is not an encoded photo of this version of blsam"):
        Encoded.load(path, identity)


def test_a_fingerprint_sees_names_types_shapes_and_values():
    linear = torch.nn.Linear(2, 3)
    seen = {fingerprint(linear)}
    assert fingerprint(torch.nn.Linear(2, 3)) not in seen
    same = torch.nn.Linear(2, 3)
    same.load_state_dict(linear.state_dict())
    assert fingerprint(same) in seen
    with torch.no_grad():
        same.weight[2, 1] += 1e-6
    assert fingerprint(same) not in seen
    for changed in (torch.nn.Sequential(linear), torch.nn.Linear(2, 3).bfloat16()):
        assert fingerprint(changed) not in seen
    wide, tall = torch.nn.Linear(4, 2, bias=False), torch.nn.Linear(2, 4, bias=False)
    with torch.no_grad():
        tall.weight.copy_(wide.weight.reshape(4, 2))
    assert fingerprint(wide) != fingerprint(tall)
