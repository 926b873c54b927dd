"""Whether an exported file gives what torch gives: three photos, with clicks, boxes and masks.

The routing is compared in two ways. Sets: how many of the tokens that torch chose the file chose too; a tie or a last
bit may decide otherwise. Values: torch is given the file's own choice, and the embeddings must agree.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..modeling.routing import Routing, Stage
from ..modeling.sam import Sam
from ..predictor import ResizeLongestSide, SamPredictor
from .tools import MASK_SIDE, Tool, decoder_outputs
from .write import import_openvino

MOST = 1e-4  # difference of values, over the standard deviation of torch's
SAME = 0.999  # share of prime tokens that must be torch's, and of pixels

Runner = Callable[[Mapping[str, np.ndarray]], list[np.ndarray]]


@dataclass(frozen=True)
class Found:
    """difference: the largest, over the standard deviation of what torch gives. same: the share of prime tokens
    (encoder) or of pixels (decoder) that are torch's; None where nothing is chosen."""

    difference: float
    same: float | None

    @property
    def holds(self) -> bool:
        return self.difference <= MOST and (self.same is None or self.same >= SAME)


def runner(path: Path) -> Runner:
    """Runs a file of ONNX or OpenVINO on the CPU, inputs by name to outputs in order, in float32."""
    if path.suffix == ".onnx":
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # or it starves who shares the cores
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        return lambda inputs: session.run(None, dict(inputs))
    openvino = import_openvino()
    compiled = openvino.Core().compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})

    def run(inputs: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        found = compiled(dict(inputs))
        return [found[output] for output in compiled.outputs]

    return run


def photos() -> list[np.ndarray]:
    """A square, a landscape and a portrait, uint8 [H, W, 3]: scikit-image's."""
    from skimage import data

    return [data.astronaut(), data.coffee(), np.ascontiguousarray(data.chelsea().swapaxes(0, 1))]


@torch.no_grad()
def check_encoder(sam: Sam, tool: Tool, run: Runner) -> Found:
    """An encoder's file against the model, on photos that are resized before: there runtimes differ by a rounding."""
    encoder = sam.image_encoder
    found, same, prime = [], 0, 0
    for photo in photos():  # one after the other, for the memory
        image = ResizeLongestSide(encoder.img_size).apply_image(photo)
        x = sam.preprocess(torch.as_tensor(image).permute(2, 0, 1).float())[None]  # [h, w, 3] -> [1, 3, S, S]
        given = {"input_image": image.astype(np.float32)} if tool.photo else {"x": x.numpy()}
        outputs = [torch.from_numpy(output) for output in run(given)]
        sizes, supplied = [(image.shape[0], image.shape[1])], None
        if encoder.config.routed:
            stages = outputs[1].unbind(1)  # [1, stages, H, W]
            supplied = Routing(tuple(Stage.from_mask(mask, encoder.config.window) for mask in stages))
            _, own = encoder.encode(x, true_sizes=sizes)
            same += sum(int((mask & stage.mask).sum()) for mask, stage in zip(stages, own.stages))
            prime += sum(int(stage.mask.sum()) for stage in own.stages)
        expected, _ = encoder.encode(x, true_sizes=sizes, routing=supplied)
        found.append(gap(outputs[0], expected))
    return Found(worst(found), same / prime if encoder.config.routed else None)


@torch.no_grad()
def check_decoder(sam: Sam, tool: Tool, run: Runner) -> Found:
    """A decoder's file against `predict`, on torch's embeddings: a click, three, a box, both, and a mask given back."""
    predictor, found = SamPredictor(sam), []
    for image in photos():
        predictor.set_image(image)
        earlier = predictor.predict(*prompts(image.shape[:2])[0], multimask_output=False)[2]
        for coords, labels, box in prompts(image.shape[:2]):
            for mask in (None, earlier):
                given = inputs_of(predictor, tool, coords, labels, box, mask)
                outputs = dict(zip(decoder_outputs(tool), run(given)))
                found.append(compared(predictor, tool, outputs, given, (coords, labels, box, mask)))
    return Found(worst(one.difference for one in found), min(one.same or 0.0 for one in found))


def prompts(size: tuple[int, int]) -> list[tuple[np.ndarray | None, np.ndarray | None, np.ndarray | None]]:
    """Points, labels and box, in pixels of a photo of (h, w)."""
    height, width = size
    place = np.array([[0.5, 0.5], [0.4, 0.6], [0.1, 0.1]]) * (width, height)
    box = np.array([0.2, 0.1, 0.8, 0.9]) * (width, height, width, height)
    one, three = (place[:1], np.array([1])), (place, np.array([1, 1, 0]))
    return [(*one, None), (*three, None), (None, None, box), (*three, box)]


def inputs_of(
    predictor: SamPredictor,
    tool: Tool,
    coords: np.ndarray | None,
    labels: np.ndarray | None,
    box: np.ndarray | None,
    mask: np.ndarray | None,
) -> dict[str, np.ndarray]:
    """A prompt as tools give it: boxes as two points of labels 2 and 3, else a point that is none, label -1."""
    points = np.empty((0, 2)) if coords is None else coords
    corners = np.zeros((1, 2)) if box is None else box.reshape(2, 2)
    kinds = np.empty(0) if labels is None else labels
    kinds = np.concatenate([kinds, [-1] if box is None else [2, 3]])
    points = predictor.transform.apply_coords(np.concatenate([points, corners]), predictor.original_size)
    points *= (tool.frame or predictor.transform.target_length) / predictor.transform.target_length
    side = MASK_SIDE if tool.single else predictor.model.prompt_encoder.mask_input_size[0]
    given = np.zeros((1, side, side)) if mask is None else mask
    if given.shape[-1] != side:  # as a tool would that kept a mask of another size
        resized = torch.nn.functional.interpolate(torch.from_numpy(given)[None], (side, side), mode="bilinear")
        given = resized[0].numpy()
    return {
        "image_embeddings": predictor.features.numpy(),
        "point_coords": points[None].astype(np.float32),
        "point_labels": kinds[None].astype(np.float32),
        "mask_input": given[None].astype(np.float32),
        "has_mask_input": np.array([mask is not None], np.float32),
        "orig_im_size": np.array(predictor.original_size, np.float32),
    }


def compared(
    predictor: SamPredictor,
    tool: Tool,
    outputs: Mapping[str, np.ndarray],
    given: Mapping[str, np.ndarray],
    prompt: Any,
) -> Found:
    """Logits and scores of one prompt against `predict`'s, and the pixels of the mask in the photo."""
    coords, labels, box, mask = prompt
    if mask is not None and given["mask_input"].shape[-1] != mask.shape[-1]:  # what the file makes of it
        side = mask.shape[-2:]
        back = torch.nn.functional.interpolate(torch.from_numpy(given["mask_input"]), side, mode="bilinear")
        mask = back[0].numpy()
    of_one, of_three = (
        predictor.predict(coords, labels, box, mask, multimask_output=three, return_logits=True)
        for three in (False, True)
    )
    masks, scores, logits = (
        np.concatenate(pair) for pair in zip(of_one, of_three)
    )  # SAM's four, the single one first
    if tool.single:
        few = given["point_labels"].shape[1] <= 2  # SAM's rule: of one click the best of three
        best = [1 + int(of_three[1].argmax())] if few else [0]
        masks, scores, logits = masks[best], scores[best], logits[best]
    exported = outputs["masks"][0] > 0
    if tool.cut:
        x1, y1, x2, y2 = (int(outputs[name]) for name in ("xtl", "ytl", "xbr", "ybr"))
        whole = np.zeros(predictor.original_size, bool)
        whole[y1 : y2 + 1, x1 : x2 + 1] = exported[0]
        exported = whole[None]
    differences = [
        gap(torch.from_numpy(outputs["low_res_masks"][0]), torch.from_numpy(logits)),
        float(np.abs(outputs["iou_predictions"][0] - scores).max()),
    ]
    if not tool.cut:  # in the photo's size
        differences.append(gap(torch.from_numpy(outputs["masks"][0]), torch.from_numpy(masks)))
    return Found(worst(differences), float((exported == (masks > predictor.model.mask_threshold)).mean()))


def worst(differences: Iterable[float]) -> float:
    """The largest, and NaN if one is: Python's own max may drop it."""
    return float(np.max(list(differences)))


def gap(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference over the standard deviation of what is expected."""
    if found.shape != expected.shape:
        raise ValueError(f"the file gives {list(found.shape)}, torch {list(expected.shape)}")
    return float((found - expected).abs().max() / expected.std())
