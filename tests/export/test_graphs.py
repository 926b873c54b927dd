"""The modules that become files, as modules."""

import numpy as np
import pytest
import torch
from PIL import Image
from segment_anything.utils.onnx import SamOnnxModel
from skimage import data

from blsam.build_sam import build_sam
from blsam.export.graphs import DecoderGraph, cut_out, photo_graph, true_sizes
from blsam.export.tools import TOOLS, Tool
from blsam.modeling.windows import unpadded_sizes
from blsam.predictor import ResizeLongestSide
from tests.helpers import TINY, gap


@pytest.fixture(scope="module")
def sam():
    torch.manual_seed(0)
    return build_sam(TINY, image_size=160)


def test_extents_are_those_that_the_encoder_finds():
    x = torch.randn(4, 3, 48, 48)
    x[0, :, 30:] = 0
    x[1, :, :, 17:] = 0
    x[2, :, 20:, 20:] = 0  # a corner is no padding
    x[3] = 0
    assert true_sizes(x).tolist() == [list(size) for size in unpadded_sizes(x)]
    assert true_sizes(x).tolist() == [[30, 48], [48, 17], [48, 48], [48, 48]]


@pytest.mark.parametrize("shape", [(400, 600), (600, 400), (100, 100), (7, 300), (512, 512)])
def test_a_photo_is_prepared_as_sam_does(shape):
    onnx, runtime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    size = 160
    model = onnx.parser.parse_model(photo_graph(size))
    onnx.checker.check_model(model)
    image = np.asarray(Image.fromarray(data.astronaut()).resize(shape[::-1]))
    session = runtime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    found = session.run(None, {"input_image": image.astype(np.float32)})[0]
    resized = ResizeLongestSide(size).apply_image(image)
    (h, w), mean, std = resized.shape[:2], (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
    pixels = found[0].transpose(1, 2, 0) * std + mean
    difference = np.abs(pixels[:h, :w] - resized)
    assert difference.max() <= 1.001, difference.max()  # a grey level: weights are whole numbers in Pillow
    assert (difference > 0.5).mean() < 0.1, (difference > 0.5).mean()
    assert not found[:, :, h:].any() and not found[:, :, :, w:].any()


def inputs(sam, side):
    size = sam.prompt_encoder.image_embedding_size
    torch.manual_seed(1)
    return {
        "image_embeddings": torch.randn(1, 256, *size),
        "point_coords": torch.tensor([[[30.0, 40.0], [100.0, 20.0], [0.0, 0.0]]]),
        "point_labels": torch.tensor([[1.0, 0.0, -1.0]]),
        "mask_input": torch.randn(1, 1, side, side),
        "has_mask_input": torch.zeros(1),
        "orig_im_size": torch.tensor([320.0, 320.0]),
    }


def test_a_square_photo_is_decoded_as_by_sam_s_own_export(sam):
    graph, given = DecoderGraph(sam, TOOLS["labelme"]), inputs(sam, 256)
    own = given | {"mask_input": torch.zeros(1, 1, graph.own_side, graph.own_side)}
    expected = SamOnnxModel(sam, return_single_mask=True)(*own.values())
    for has_mask in (0.0, -1.0):  # labelme's way to say that there is none
        found = graph(**given | {"has_mask_input": torch.tensor([has_mask])})
        assert max(gap(a, b) for a, b in zip(found, expected) if b.numel() > 1) <= 1e-5


def test_a_tool_s_frame_is_scaled_to_the_model_s(sam):
    given = inputs(sam, 256)
    small = DecoderGraph(sam, TOOLS["labelme"])(**given)
    large = DecoderGraph(sam, TOOLS["anylabeling"])(**given | {"point_coords": given["point_coords"] * 1024 / 160})
    assert gap(large[2], small[2]) <= 1e-4


@pytest.mark.parametrize("rows, columns", [((2, 5), (1, 9)), ((0, 1), (0, 1)), ((3, 4), (0, 12)), ((0, 8), (11, 12))])
def test_a_mask_is_cut_out_along_its_box(rows, columns):
    mask = torch.zeros(1, 1, 8, 12, dtype=torch.bool)
    mask[..., slice(*rows), slice(*columns)] = True
    cut, x1, y1, x2, y2 = cut_out(mask)
    assert (x1, y1, x2, y2) == (columns[0], rows[0], columns[1] - 1, rows[1] - 1)
    assert cut.dtype == torch.uint8 and cut.shape[2:] == (rows[1] - rows[0], columns[1] - columns[0]) and cut.all()


def test_an_empty_mask_is_one_pixel():
    cut, *box = cut_out(torch.zeros(1, 1, 8, 12, dtype=torch.bool))
    assert [int(value) for value in box] == [0, 0, 0, 0] and cut.tolist() == [[[[0]]]]


def test_an_empty_mask_is_not_the_most_stable_one(sam):
    """Its stability is 0 / 0, and torch's argmax takes what is not a number."""
    graph = DecoderGraph(sam, Tool(single=True), stability_score=True)
    masks = torch.arange(4.0).view(1, 4, 1, 1).expand(-1, -1, 2, 2)
    for points, stability, expected in (
        (2, [0.9, float("nan"), 0.6, 0.7], 3),  # of one click the three, of more the first
        (5, [0.9, float("nan"), 0.6, 0.7], 0),
        (5, [float("nan"), 0.5, 0.6, float("nan")], 0),
    ):
        scores = torch.tensor([stability])
        chosen, score = graph.select_masks(masks, scores, points)
        assert chosen.shape == (1, 1, 2, 2) and chosen.unique().item() == expected
        assert score.item() == pytest.approx(0.0 if np.isnan(stability[expected]) else stability[expected])
