"""Files of `blsam export` in the tools that open them, with the tools' own code; what our predictor finds is the measure.

The tools give a point that is none behind a box too, which `predict` does not: of boxes they differ a little, as with
SAM's own files. AnyLabeling puts every photo into a frame of 684 x 1024, samexporter resizes to 1024, whatever the
model's size.
"""

import cv2
import numpy as np
import pytest
from skimage import data

from blsam import SamPredictor, sam_model_registry
from blsam.cli import main
from blsam.options import shipped_checkpoint
from blsam.predictor import ResizeLongestSide

pytestmark = pytest.mark.clients
MODEL = "blsam_vit_t"
PHOTOS = {
    "square": data.astronaut(),
    "landscape": data.coffee(),
    "portrait": np.ascontiguousarray(data.chelsea().swapaxes(0, 1)),
}
LEAST = {"click": 0.97, "clicks": 0.97, "box": 0.8}  # IoU


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported")
    for tool in ("anylabeling", "labelme"):
        assert main(["export", "--model", MODEL, "--for", tool, "-o", str(folder / tool)]) == 0
    return folder


@pytest.fixture(scope="module")
def predictor():
    return SamPredictor(sam_model_registry[MODEL](shipped_checkpoint(MODEL)))


def prompts(size):
    """By name: points, labels, box, and whether the best of three is meant, as SAM's files decide by the points."""
    height, width = size
    points = np.array([[0.5, 0.5], [0.4, 0.6], [0.1, 0.1]]) * (width, height)
    box = np.array([0.2, 0.1, 0.8, 0.9]) * (width, height, width, height)
    return {
        "click": (points[:1], np.array([1]), None, True),
        "clicks": (points, np.array([1, 1, 0]), None, False),
        "box": (None, None, box, False),
    }


def marks(points, labels, box):
    """A prompt as AnyLabeling and samexporter take it."""
    clicks = (
        [{"type": "point", "data": p.tolist(), "label": int(n)} for p, n in zip(points, labels)] if box is None else []
    )
    return clicks or [{"type": "rectangle", "data": box.tolist()}]


def agrees(name, mask, expected):
    iou = (mask & expected).sum() / (mask | expected).sum()
    assert iou >= LEAST[name], f"{name}: IoU {iou:.3f}"


def best(predictor, points, labels, box, three):
    """The logits of the best mask: the tools resize those, and cut off at zero then."""
    masks, scores, _ = predictor.predict(points, labels, box, multimask_output=three, return_logits=True)
    return masks[scores.argmax()]


@pytest.mark.parametrize("photo", PHOTOS)
def test_osam_which_labelme_uses(exported, predictor, photo):
    types = pytest.importorskip("osam.types", reason="osam is not installed")
    from osam._models.sam import _models

    class File(types.Blob):
        path = property(lambda self: self.url)

        def pull(self, **_):
            pass

    class Ours(_models.Sam):
        name = MODEL
        _blobs = {  # noqa: RUF012
            part: File(url=str(exported / "labelme" / f"{MODEL}.{part}.onnx"), hash="")
            for part in ("encoder", "decoder")
        }

    image, model = PHOTOS[photo], Ours()
    predictor.set_image(image)
    embedding = model.encode_image(image)
    for name, (points, labels, box, three) in prompts(image.shape[:2]).items():
        coords, kinds = (points, labels) if box is None else (box.reshape(2, 2), np.array([2, 3]))
        prompt = types.Prompt(points=coords.astype(np.float32), point_labels=kinds.astype(np.int32))
        found = model._generate_mask_from_image_embedding(embedding, prompt)
        agrees(name, found, best(predictor, points, labels, box, three) > 0)


@pytest.mark.parametrize("photo", PHOTOS)
def test_anylabeling(exported, predictor, photo):
    module = pytest.importorskip("anylabeling.services.auto_labeling.sam_onnx", reason="AnyLabeling is not installed")
    model = module.SegmentAnythingONNX(
        *(str(exported / "anylabeling" / f"{MODEL}.{p}.onnx") for p in ("encoder", "decoder"))
    )
    image = PHOTOS[photo]
    height, width = image.shape[:2]
    scale = min(1024 / width, 684 / height)
    predictor.set_image(cv2.warpAffine(image, np.array([[scale, 0, 0], [0, scale, 0]]), (1024, 684)))
    encoded = model.encode(image)
    for name, (points, labels, box, three) in prompts((height, width)).items():
        found = model.predict_masks(encoded, marks(points, labels, box))[0, 0] > 0
        points, box = (None if value is None else value * scale for value in (points, box))
        expected = best(predictor, points, labels, box, three)
        back = np.array([[1 / scale, 0, 0], [0, 1 / scale, 0]])
        agrees(name, found, cv2.warpAffine(expected, back, (width, height)) > 0)


@pytest.mark.parametrize("photo", PHOTOS)
def test_samexporter(exported, predictor, photo):
    module = pytest.importorskip("samexporter.sam_onnx", reason="samexporter is not installed")
    model = module.SegmentAnythingONNX(
        *(str(exported / "anylabeling" / f"{MODEL}.{p}.onnx") for p in ("encoder", "decoder"))
    )
    image = PHOTOS[photo]
    size = image.shape[:2]
    resized = ResizeLongestSide(1024)
    predictor.set_image(resized.apply_image(image))
    encoded = model.encode(image[..., ::-1])
    for name, (points, labels, box, three) in prompts(size).items():
        found = model.predict_masks(encoded, marks(points, labels, box))[0, 0] > 0
        points = None if points is None else resized.apply_coords(points, size)
        box = None if box is None else resized.apply_boxes(box[None], size)[0]
        _, scores, logits = predictor.predict(points, labels, box, multimask_output=three)
        of_best = logits[scores.argmax()][None, None]  # which the tool scales up itself
        agrees(
            name, found, model.postprocess_masks(of_best, size, resized.get_preprocess_shape(*size, 1024))[0, 0] > 0
        )
