"""The predictor without torch."""

import subprocess
import sys

import numpy as np
import pytest
import torch

from blsam import SamPredictor
from blsam.build_sam import build_sam
from blsam.export import write
from blsam.export.tools import TOOLS
from blsam.onnx import SamPredictor as OnnxPredictor
from tests.helpers import TINY, TINY_EXACT, gap, randomize
from tests.photos import PHOTOS


def test_it_needs_no_torch():
    code = (
        "import sys, blsam.onnx; print([m for m in ('torch', 'segment_anything', 'PIL', 'cv2') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.fixture(scope="module", params=[TINY_EXACT, TINY], ids=lambda config: config.name)
def predictors(request, tmp_path_factory):
    """Ours, and the one on its files."""
    torch.manual_seed(0)
    sam = build_sam(request.param, image_size=160)
    randomize(sam.image_encoder)
    folder = tmp_path_factory.mktemp("exported")
    paths = folder / "encoder.onnx", folder / "decoder.onnx"
    write.encoder_onnx(sam.image_encoder, TOOLS["blsam"], paths[0], {"for": "blsam", "part": "encoder"})
    write.decoder_onnx(sam, TOOLS["blsam"], paths[1], {"for": "blsam", "part": "decoder"})
    return SamPredictor(sam), OnnxPredictor(*paths), paths


@pytest.mark.e2e
@pytest.mark.parametrize("photo", PHOTOS)
def test_it_gives_what_ours_gives(predictors, photo):
    ours, found, _ = predictors
    image = PHOTOS[photo]
    for predictor in (ours, found):
        predictor.set_image(image)
    assert gap(torch.from_numpy(found.features), ours.features) <= 1e-4
    if found.prime is not None:
        assert np.array_equal(found.prime, torch.cat([stage.mask for stage in ours.routing.stages]).numpy())
    height, width = image.shape[:2]
    points, labels, box = np.array([[150.0, 120.0], [20, 20]]), np.array([1, 0]), np.array([60.0, 20, 250, 190])
    earlier = ours.predict(points, labels)[2][:1]
    for multimask in (True, False):
        for prompt in (
            {"point_coords": points[:1], "point_labels": labels[:1]},
            {"point_coords": points, "point_labels": labels, "mask_input": earlier},
            {"box": box},
            {"point_coords": points, "point_labels": labels, "box": box},
            {"mask_input": earlier},
            {},
        ):
            expected = ours.predict(**prompt, multimask_output=multimask)
            masks, scores, logits = found.predict(**prompt, multimask_output=multimask)
            assert masks.shape == expected[0].shape == (3 if multimask else 1, height, width)
            assert (masks != expected[0]).mean() <= 1e-3
            assert np.abs(scores - expected[1]).max() <= 1e-4
            assert gap(torch.from_numpy(logits), torch.from_numpy(expected[2])) <= 1e-3
    bgr = found.features
    found.set_image(image[..., ::-1], "BGR")
    assert np.array_equal(found.features, bgr)


@pytest.mark.e2e
def test_what_it_refuses(predictors, tmp_path):
    _, found, paths = predictors
    found.reset_image()
    with pytest.raises(RuntimeError, match="an image must be set"):
        found.predict(box=np.array([0, 0, 9, 9]))
    found.set_image(PHOTOS["portrait"])
    side = found.mask_shape[-1]
    for prompt, message in (
        ({"point_coords": np.array([[1, 2]])}, r"got \[1, 2\] and \[0\]"),
        ({"box": np.array([0, 0, np.nan, 9])}, "finite"),
        ({"mask_input": np.zeros((1, 5, 5))}, rf"finite logits \[1, {side}, {side}\], is \[1, 5, 5\]"),
        ({"mask_input": np.full((1, side, side), np.inf)}, "finite logits"),
    ):
        with pytest.raises(ValueError, match=message):
            found.predict(**prompt)
    for image in (np.zeros((4, 4)), np.zeros((4, 4, 3)), np.zeros((4, 0, 3), np.uint8)):
        with pytest.raises(ValueError, match="must be uint8"):
            found.set_image(image)
    with pytest.raises(FileNotFoundError, match="blsam export makes one"):
        OnnxPredictor(tmp_path / "no.onnx", paths[1])
    with pytest.raises(ValueError, match="decoder.onnx is not the encoder of blsam export --for blsam"):
        OnnxPredictor(paths[1], paths[0])
    other, facts = tmp_path / "other.onnx", {"for": "blsam", "part": "decoder", "model": "another"}
    write.decoder_onnx(build_sam(TINY, image_size=160), TOOLS["blsam"], other, facts)
    with pytest.raises(ValueError, match="do not belong together: their model is None and another"):
        OnnxPredictor(paths[0], other)
    for tool in ("labelme", "cvat"):
        write.decoder_onnx(build_sam(TINY, image_size=160), TOOLS[tool], other, {"for": tool, "part": "decoder"})
        with pytest.raises(ValueError, match="is not the decoder"):
            OnnxPredictor(paths[0], other)
    (tmp_path / "broken.onnx").write_bytes(b"no model")
    with pytest.raises(ValueError, match="broken.onnx cannot be run"):
        OnnxPredictor(tmp_path / "broken.onnx", paths[1])
