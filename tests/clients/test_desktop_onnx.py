"""AnyLabeling, X-AnyLabeling, samexporter, labelme and CVAT's page: encoder and decoder as ONNX files.

They are written as SAM's script and samexporter write them, by torch's older exporter, and run by ONNX Runtime.
"""

import inspect
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from segment_anything.utils.onnx import SamOnnxModel
from torch import nn

from tests.clients.conftest import SIZE
from tests.photos import PHOTOS

pytest.importorskip("onnx")
runtime = pytest.importorskip("onnxruntime")

NAMES = ("image_embeddings", "point_coords", "point_labels", "mask_input", "has_mask_input", "orig_im_size")


class FromPixels(nn.Module):
    """As samexporter's: pixels [h, w, 3], 0 to 255, of any size that fits -> embedding."""

    def __init__(self, sam):
        super().__init__()
        self.image_encoder = sam.image_encoder
        self.mean, self.std = torch.tensor([123.675, 116.28, 103.53]), torch.tensor([58.395, 57.12, 57.375])

    @torch.no_grad()
    def forward(self, input_image):
        x = torch.permute((input_image - self.mean) / self.std, (2, 0, 1))
        h, w = x.shape[-2:]
        x = F.pad(x, (0, self.image_encoder.img_size - w, 0, self.image_encoder.img_size - h))
        return self.image_encoder(torch.unsqueeze(x, 0))


class WithBoxes(nn.Module):
    """As CVAT's decoder: the masks' boxes beside SAM's three outputs."""

    def __init__(self, sam):
        super().__init__()
        self.decoder = SamOnnxModel(sam, return_single_mask=True)

    @torch.no_grad()
    def forward(self, *inputs):
        masks, scores, logits = self.decoder(*inputs)
        rows, columns = (masks[0, 0] > 0).any(1).nonzero()[:, 0], (masks[0, 0] > 0).any(0).nonzero()[:, 0]
        corners = columns.min(), rows.min(), columns.max(), rows.max()
        return masks, scores, logits, *(corner.to(torch.int32) for corner in corners)


def export(model, inputs, path, names, outputs, axes=None):
    options = {"dynamo": False} if "dynamo" in inspect.signature(torch.onnx.export).parameters else {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            model,
            inputs,
            path,
            input_names=names,
            output_names=outputs,
            dynamic_axes=axes,
            opset_version=17,
            **options,
        )
    return runtime.InferenceSession(path, providers=["CPUExecutionProvider"])


def decoder_inputs(embedding, points, labels, mask=None, has_mask=0.0, size=(300, 512)):
    scale = SIZE / max(size)
    values = (
        embedding,
        np.float32(points)[None] * scale,
        np.float32(labels)[None],
        np.zeros((1, 1, SIZE // 4, SIZE // 4), np.float32) if mask is None else mask,
        np.float32([has_mask]),
        np.float32(size),
    )
    return dict(zip(NAMES, values))


def decoder(side, path):
    model = WithBoxes(side.build())
    example = decoder_inputs(np.zeros((1, 256, SIZE // 16, SIZE // 16), np.float32), [[9, 9], [0, 0]], [1, -1])
    outputs = ["masks", "iou_predictions", "low_res_masks", "xtl", "ytl", "xbr", "ybr"]
    axes = {"point_coords": {1: "num_points"}, "point_labels": {1: "num_points"}}
    return export(model, tuple(torch.as_tensor(v) for v in example.values()), path, list(NAMES), outputs, axes)


def test_decoder(exact, tmp_path):
    def program(side):
        session = decoder(side, tmp_path / f"{side.name}.onnx")
        assert [one.name for one in session.get_inputs()] == list(NAMES)
        embedding = side.predictor(PHOTOS["landscape"]).get_image_embedding().numpy()
        point = session.run(None, decoder_inputs(embedding, [[220, 110], [0, 0]], [1, -1]))
        box = session.run(None, decoder_inputs(embedding, [[120, 20], [300, 280]], [2, 3]))
        # labelme's runtime says -1 where it has no mask
        odd = session.run(None, decoder_inputs(embedding, [[220, 110], [0, 0]], [1, -1], has_mask=-1.0))
        return [one.name for one in session.get_outputs()], point, box, odd

    exact.compare(program)


@pytest.mark.e2e
@pytest.mark.parametrize("kind", ["pixels", "normalised"])
def test_encoder(sides, kind, tmp_path):
    """samexporter's takes pixels of any height and width; labelme's takes what SAM's encoder takes, by the name x."""

    def program(side):
        sam, path = side.build(), tmp_path / f"{side.name}.onnx"
        predictor, image = side.api.SamPredictor(sam), PHOTOS["landscape"]
        resized = predictor.transform.apply_image(image)
        if kind == "pixels":
            axes = {"input_image": {0: "image_height", 1: "image_width"}}
            example = torch.rand(SIZE, SIZE, 3) * 255
            session = export(FromPixels(sam), (example,), path, ["input_image"], ["image_embeddings"], axes)
            found = session.run(None, {"input_image": resized.astype(np.float32)})[0]
        else:
            session = export(sam.image_encoder, (torch.rand(1, 3, SIZE, SIZE),), path, ["x"], ["image_embeddings"])
            assert session.get_inputs()[0].shape == [1, 3, SIZE, SIZE]
            x = sam.preprocess(torch.as_tensor(resized).permute(2, 0, 1)[None].float())
            found = session.run(None, {"x": x.numpy()})[0]
            with torch.no_grad():
                expected = sam.image_encoder(x)
            if side.name == "segment_anything" or sides.exact:  # a graph routes over padding, too
                gap = np.abs(found - expected.numpy()).max() / found.std()
                assert gap <= 1e-3, f"{gap:.1e}"
        predictor.features, predictor.original_size = torch.from_numpy(found), image.shape[:2]
        predictor.input_size, predictor.is_image_set = resized.shape[:2], True
        return found, predictor.predict(box=np.array([120, 20, 300, 280]), multimask_output=False)

    sides.compare(program)
