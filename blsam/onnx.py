"""`SamPredictor` on files of `blsam export`, with numpy and onnxruntime alone: no torch.

blsam export -o exported

from blsam.onnx import SamPredictor

predictor = SamPredictor("exported/blsam_vit_t_fine.encoder.onnx", "exported/blsam_vit_t_fine.decoder.onnx")
predictor.set_image(photo)                                   # uint8 [H, W, 3] RGB
masks, scores, logits = predictor.predict(np.array([[320, 240]]), np.array([1]))
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from .resizing import resize

MEAN, STD = np.array([123.675, 116.28, 103.53], np.float32), np.array([58.395, 57.12, 57.375], np.float32)


class SamPredictor:
    """`set_image` once, then `predict` for each prompt; arguments and results as in `segment_anything`.

    encoder, decoder: files of `blsam export --for blsam`, which is the default. providers: onnxruntime's, as
    ["CUDAExecutionProvider"]; the CPU by default. threads: 0 for as many as there are cores.

    Attributes: `features`, the embedding [1, 256, h, w]; `prime`, which tokens ran through the wide blocks, bool
    [stages, H, W], None for an exact model; `original_size` (H, W).
    """

    def __init__(
        self,
        encoder: str | Path,
        decoder: str | Path,
        providers: Sequence[str] = ("CPUExecutionProvider",),
        threads: int = 0,
    ) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        self.encoder = load(encoder, "encoder", options, providers)
        self.decoder = load(decoder, "decoder", options, providers)
        facts, others = (one.get_modelmeta().custom_metadata_map for one in (self.encoder, self.decoder))
        for fact in ("model", "image_size", "checkpoint_sha256"):
            if facts.get(fact) != others.get(fact):
                was = f"{facts.get(fact)} and {others.get(fact)}"
                raise ValueError(f"{encoder} and {decoder} do not belong together: their {fact} is {was}")
        self.size: int = self.encoder.get_inputs()[0].shape[2]
        self.mask_shape = tuple({one.name: one.shape for one in self.decoder.get_inputs()}["mask_input"])
        self.reset_image()

    def reset_image(self) -> None:
        """Forget the photo."""
        self.features: np.ndarray | None = None
        self.prime: np.ndarray | None = None
        self.original_size, self.input_size = (0, 0), (0, 0)

    def set_image(self, image: np.ndarray, image_format: str = "RGB") -> None:
        """Encode a photo, uint8 [H, W, 3]; image_format "RGB" or "BGR"."""
        image = np.asarray(image)
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
            raise ValueError(f"the image must be uint8 [H, W, 3], is {image.dtype} {list(image.shape)}")
        if image_format not in ("RGB", "BGR"):
            raise ValueError(f"image_format must be RGB or BGR, is {image_format!r}")
        self.reset_image()
        image = image if image_format == "RGB" else image[..., ::-1]
        height, width = image.shape[:2]
        scale = self.size / max(height, width)
        h, w = (max(1, int(side * scale + 0.5)) for side in (height, width))
        x = np.zeros((1, 3, self.size, self.size), np.float32)
        x[0, :, :h, :w] = ((resize(image, h, w) - MEAN) / STD).transpose(2, 0, 1)  # [h, w, 3] -> [3, h, w]
        features, *prime = self.encoder.run(None, {"x": x})
        self.features, self.prime = features, prime[0][0] if prime else None
        self.original_size, self.input_size = (height, width), (h, w)

    def get_image_embedding(self) -> np.ndarray:
        """The embedding [1, 256, h, w]; RuntimeError where no image is set."""
        if self.features is None:
            raise RuntimeError("an image must be set with .set_image(...) before a mask is predicted")
        return self.features

    def predict(
        self,
        point_coords: np.ndarray | None = None,
        point_labels: np.ndarray | None = None,
        box: np.ndarray | None = None,
        mask_input: np.ndarray | None = None,
        multimask_output: bool = True,
        return_logits: bool = False,
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Masks bool [M, H, W], scores [M], low-resolution logits [M, h, w]; M is 3, or 1 without multimask_output.

        Points [N, 2] and box [4] in pixels of the photo, labels [N] 1 or 0, mask_input [1, h, w] of an earlier call.
        """
        features = self.get_image_embedding()
        points = np.zeros((0, 2)) if point_coords is None else np.asarray(point_coords, float)
        labels = np.zeros(0) if point_labels is None else np.asarray(point_labels, float)
        if points.ndim != 2 or points.shape[1] != 2 or labels.shape != points.shape[:1]:
            raise ValueError(f"points are [N, 2] with N labels, got {list(points.shape)} and {list(labels.shape)}")
        if box is not None:
            points = np.concatenate([points, np.asarray(box, float).reshape(2, 2)])
            labels = np.concatenate([labels, [2.0, 3.0]])
        elif len(points):  # as SAM does where there is no box: a point that is none
            points, labels = np.pad(points, ((0, 1), (0, 0))), np.append(labels, -1.0)
        if not (np.isfinite(points).all() and np.isfinite(labels).all()):
            raise ValueError("points, labels and box must be finite numbers")
        mask = np.zeros(self.mask_shape) if mask_input is None else np.asarray(mask_input)[None]
        if mask.shape != self.mask_shape or not np.isfinite(mask).all():
            raise ValueError(
                f"mask_input must be finite logits {list(self.mask_shape[1:])}, is {list(mask.shape[1:])}"
            )
        (height, width), (h, w) = self.original_size, self.input_size
        masks, scores, logits = self.decoder.run(
            None,
            {
                "image_embeddings": features,
                "point_coords": (points * (w / width, h / height))[None].astype(np.float32),
                "point_labels": labels[None].astype(np.float32),
                "mask_input": mask.astype(np.float32),
                "has_mask_input": np.array([mask_input is not None], np.float32),
                "orig_im_size": np.array([height, width], np.float32),
            },
        )
        kept = slice(1, None) if multimask_output else slice(0, 1)  # the decoder gives SAM's four
        masks, scores, logits = masks[0, kept], scores[0, kept], logits[0, kept]
        return masks if return_logits else masks > 0, scores, logits


def load(path: str | Path, part: str, options: onnxruntime.SessionOptions, providers: Sequence[str]) -> Any:
    """An exported encoder or decoder, made for this predictor; FileNotFoundError or ValueError in one line."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"no exported model at {path}; blsam export makes one")
    try:
        session = onnxruntime.InferenceSession(str(path), options, list(providers))
    except Exception as error:  # onnxruntime's exceptions have no common base
        raise ValueError(f"{path} cannot be run: {str(error).strip().partition(chr(10))[0]}") from None
    facts = session.get_modelmeta().custom_metadata_map
    if (facts.get("for"), facts.get("part")) != ("blsam", part):
        raise ValueError(f"{path} is not the {part} of blsam export --for blsam, as this predictor needs it")
    return session
