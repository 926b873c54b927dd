"""`segment_anything`'s `SamPredictor` that tells the encoder what is padding, and checks prompts.

What SAM answers is answered, with one warning where it makes no sense (`senseless`); the command line and the page
refuse that (`check_prompts`).
"""

from __future__ import annotations

import copy
import math
import threading
import warnings
from collections.abc import Iterable
from dataclasses import fields
from typing import Any

import numpy as np
import torch
from segment_anything import SamPredictor as _SamPredictor
from segment_anything.utils.transforms import ResizeLongestSide as _ResizeLongestSide

from .config import OUT_CHANNELS
from .encoded import Encoded
from .images import as_photo, as_photos
from .modeling.mask_decoder import decode_photo
from .modeling.routing import Routing
from .modeling.sam import Sam

RELEASED = _SamPredictor.predict_torch
PHOTO = (*(field.name for field in fields(Encoded)), "is_image_set", "_batch")  # a predictor's attributes
# Held while the attributes of a photo change, or are read together: letting go of a large tensor lets other threads run,
# even between two attributes of one `update`.
CHANGE = threading.RLock()


class ResizeLongestSide(_ResizeLongestSide):
    """As `segment_anything`'s; release 1.0 reads batch and channels as height and width in `apply_image_torch`, and
    leaves a photo that is far longer than wide no pixel."""

    @staticmethod
    def get_preprocess_shape(oldh: int, oldw: int, long_side_length: int) -> tuple[int, int]:
        """(H, W) -> (h, w) with the longer side `long_side_length`, a pixel at least."""
        h, w = _ResizeLongestSide.get_preprocess_shape(oldh, oldw, long_side_length)
        return max(1, h), max(1, w)

    def apply_image_torch(self, image: torch.Tensor) -> torch.Tensor:
        """float [B, C, H, W] -> [B, C, h, w] with the longer side `target_length`."""
        size = self.get_preprocess_shape(image.shape[2], image.shape[3], self.target_length)
        return torch.nn.functional.interpolate(image, size, mode="bilinear", align_corners=False, antialias=True)


class SamPredictor(_SamPredictor):
    """`set_image` once, then `predict` for each prompt; arguments and results as in `segment_anything`.

    Attributes besides SAM's: `routing`, which tokens of the photo were prime in each stage (None: no photo is set), and
    `encoded`, the photo that is set as a value.

    A predictor holds one photo and is not meant for several threads: each should have its own, which may share the
    model. `predict` works on the photo that is set when it begins, whatever happens to the predictor meanwhile.
    """

    routing: Routing | None = None
    _batch: list[Encoded] = []  # noqa: RUF012 - never changed in place

    def __init__(self, sam_model: Sam) -> None:
        super().__init__(sam_model)
        self.transform = ResizeLongestSide(sam_model.image_encoder.img_size)

    def reset_image(self) -> None:
        """Forget the photo, or the photos."""
        with CHANGE:
            super().reset_image()
            self.routing, self._batch = None, []

    @property
    def encoded(self) -> Encoded:
        """The photo that is set; RuntimeError if there is none. `features` written by hand have no routing of theirs."""
        now = self._as_it_is()
        if not now.is_image_set or now.routing is None:
            raise RuntimeError("no photo is encoded: an image must be set with .set_image(...)")
        return Encoded(now.features, now.routing, now.input_size, now.original_size)

    def set_encoded(self, encoded: Encoded) -> None:
        """Let `predict` work on a photo that this model encoded before; the encoder does not run."""
        wanted = (1, OUT_CHANNELS, *self.model.prompt_encoder.image_embedding_size)
        if encoded.features.shape != wanted:
            raise ValueError(
                f"the embedding must be {list(wanted)}, is {list(encoded.features.shape)}: another model's"
            )
        self.reset_image()
        self._use(encoded.to(self.device))

    def _use(self, encoded: Encoded) -> None:
        parts = {f.name: getattr(encoded, f.name) for f in fields(encoded)}
        with CHANGE:
            self.__dict__.update(parts, is_image_set=True)

    def _as_it_is(self) -> SamPredictor:
        """A copy that keeps its photo, whatever other threads do to this one."""
        with CHANGE:
            return copy.copy(self)

    def _note(self, now: SamPredictor) -> None:
        """What a subclass has noted on such a copy meanwhile, but not the photo, which may be another by now."""
        self.__dict__.update({name: value for name, value in vars(now).items() if name not in PHOTO})

    def get_image_embedding(self) -> torch.Tensor:
        """The embedding of the photo that is set, [1, 256, h, w]; RuntimeError if there is none."""
        return super(SamPredictor, self._as_it_is()).get_image_embedding()

    def set_image(self, image: Any, image_format: str = "RGB") -> None:
        """Encode a photo: uint8 [H, W, 3], or anything that `images.as_photo` reads as one.

        image_format: "RGB" or "BGR", of an array. After a ValueError no photo is set.
        """
        self.reset_image()
        super().set_image(as_photo(image, image_format), "RGB")

    @torch.no_grad()
    def set_torch_image(self, transformed_image: torch.Tensor, original_image_size: tuple[int, int]) -> None:
        """An image [1, 3, h, w], already resized so that its longer side is `img_size`; original size as (H, W).

        As in SAM, a batch of B images of one size is taken: `features` is theirs, and each has to be decoded by hand.
        """
        self.reset_image()
        side = self.model.image_encoder.img_size
        shape = tuple(transformed_image.shape)
        if len(shape) != 4 or shape[1] != 3 or max(shape[2:]) != side:
            raise ValueError(f"the image must be [1, 3, h, w] with its longer side {side}, is {list(shape)}")
        features, routing = self.model.encode_images(list(transformed_image))
        height, width = original_image_size
        self._use(Encoded(features, routing, (shape[2], shape[3]), (height, width)))

    @torch.no_grad()
    def set_images(self, images: Iterable[Any]) -> None:
        """Encode several photos together, each as in `set_image`, of any sizes; `use_image` says which one is meant."""
        self.reset_image()
        photos = as_photos(images)
        if not photos:
            raise ValueError("set_images needs at least one image")
        resized = [self.transform.apply_image(photo) for photo in photos]
        tensors = [torch.as_tensor(r, device=self.device).permute(2, 0, 1).contiguous() for r in resized]
        features, routing = self.model.encode_images(tensors)
        batch = [
            Encoded(features[i : i + 1], routing.of_image(i), (tensor.shape[1], tensor.shape[2]), photo.shape[:2])
            for i, (photo, tensor) in enumerate(zip(photos, tensors))
        ]
        with CHANGE:
            self._batch = batch
            self._use(batch[0])

    def use_image(self, number: int) -> None:
        """Let `predict` work on image `number`, from 0, of the last `set_images`."""
        batch = self._batch
        if not 0 <= number < len(batch):
            raise ValueError(f"image {number} is none of the {len(batch)} that set_images encoded")
        self._use(batch[number])

    def predict(
        self,
        point_coords: np.ndarray | None = None,
        point_labels: np.ndarray | None = None,
        box: np.ndarray | None = None,
        mask_input: np.ndarray | None = None,
        multimask_output: bool = True,
        return_logits: bool = False,
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Masks of one prompt on the image that is set.

        Args:
            point_coords: [N, 2], x and y in pixels of the original image. point_labels: [N], 1 object, 0 background.
            box: [4], x1 y1 x2 y2 in pixels of the original image.
            mask_input: [1, h, w], the third result of an earlier call.
            multimask_output: three candidates, or the single mask that suits unambiguous prompts.
            return_logits: logits instead of a bool mask.

        Returns masks [M, H, W], scores [M] (predicted IoU), low-resolution logits [M, h, w], which are float32 whatever
        the precision; ValueError says what a prompt should have been, and a warning what of it makes no sense.
        """
        point_coords, point_labels, box, mask_input = (
            value if value is None else np.asarray(value) for value in (point_coords, point_labels, box, mask_input)
        )
        if point_coords is not None and point_coords.size == 0:  # an empty list is no points, as np.empty((0, 2)) is
            point_coords, point_labels = np.empty((0, 2)), np.empty(0)
        now = self._as_it_is()
        if now.is_image_set:
            check_shapes(point_coords, point_labels, box, mask_input)
            wanted = (1, *self.model.prompt_encoder.mask_input_size)
            if mask_input is not None and mask_input.shape != wanted:
                raise ValueError(f"mask_input must be {list(wanted)}, is {list(mask_input.shape)}")
            odd = senseless(point_coords, point_labels, box, now.original_size)
            if not odd and points_outside(point_coords, now.original_size):
                odd = "a point lies outside the image"
            if odd:
                warnings.warn(f"{odd}; the mask has little meaning", stacklevel=2)
        found = super(SamPredictor, now).predict(
            point_coords, point_labels, box, mask_input, multimask_output, return_logits
        )
        self._note(now)
        return found

    @torch.no_grad()
    def predict_torch(
        self,
        point_coords: torch.Tensor | None,
        point_labels: torch.Tensor | None,
        boxes: torch.Tensor | None = None,
        mask_input: torch.Tensor | None = None,
        multimask_output: bool = True,
        return_logits: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Masks of P prompts in the coordinates of the resized image, as in SAM; P may be 0.

        point_coords [P, N, 2], point_labels [P, N], boxes [P, 4], mask_input [P, 1, h, w]. Returns masks [P, M, H, W],
        scores [P, M] and low-resolution logits [P, M, h, w]; scores and logits float32, under autocast too.
        """
        now = self._as_it_is()
        if now.is_image_set and {len(given) for given in (point_coords, boxes) if given is not None} == {0}:
            count, size = 3 if multimask_output else 1, self.model.prompt_encoder.mask_input_size
            masks = now.features.new_zeros(0, count, *now.original_size)
            masks = masks if return_logits else masks.bool()
            return masks, now.features.new_zeros(0, count), now.features.new_zeros(0, count, *size)
        weight = next(self.model.prompt_encoder.parameters())
        if weight.dtype != torch.float32 and not torch.is_autocast_enabled(weight.device.type):
            raise RuntimeError(
                f"SAM's prompt encoder works in float32 and was cast to {str(weight.dtype).removeprefix('torch.')}; "
                'cast the image encoder alone, by dtype="bfloat16" where the model is built, or predict under autocast'
            )
        if not now.is_image_set or not is_released(super().predict_torch):  # which raises, or is somebody's own
            found = super(SamPredictor, now).predict_torch(
                point_coords, point_labels, boxes, mask_input, multimask_output, return_logits
            )
            self._note(now)
            masks, scores, logits = (t if t.dtype == torch.bool else t.float() for t in found)
            return masks, scores, logits
        model, points = self.model, None if point_coords is None else (point_coords, point_labels)
        sparse, dense = model.prompt_encoder(points=points, boxes=boxes, masks=mask_input)
        positions = model.prompt_encoder.get_dense_pe()
        decoded = decode_photo(model.mask_decoder, now.features, positions, sparse, dense, multimask_output)
        logits, scores = (value.float() for value in decoded)  # under autocast they are not
        masks = model.postprocess_masks(logits, now.input_size, now.original_size)
        return masks if return_logits else masks > model.mask_threshold, scores, logits


def is_released(predict_torch: Any) -> bool:
    """Whether this is `segment_anything`'s own, and nothing that a program put in its place before or after us."""
    named = f"{_SamPredictor.__module__}.SamPredictor.predict_torch"
    function = getattr(predict_torch, "__func__", None)
    return function is RELEASED and f"{function.__module__}.{function.__qualname__}" == named


def check_prompts(
    point_coords: np.ndarray | None,
    point_labels: np.ndarray | None,
    box: np.ndarray | None,
    mask_input: np.ndarray | None,
    image_size: tuple[int, int],
) -> None:
    """ValueError unless the prompts of one `predict` call make sense on an image of size (H, W)."""
    check_shapes(point_coords, point_labels, box, mask_input)
    odd = senseless(point_coords, point_labels, box, image_size)
    if odd:
        raise ValueError(odd)


def check_shapes(
    point_coords: np.ndarray | None,
    point_labels: np.ndarray | None,
    box: np.ndarray | None,
    mask_input: np.ndarray | None,
) -> None:
    """ValueError unless the prompts of one `predict` call have the right shapes, and finite values."""
    if point_coords is not None and point_labels is None:
        raise ValueError("point_coords and point_labels go together: the labels are missing")
    if point_coords is not None:
        coords, labels = np.asarray(point_coords), np.asarray(point_labels)
        if coords.ndim != 2 or coords.shape[1] != 2:
            raise ValueError(f"point_coords must be [N, 2] (x, y in pixels), is {list(coords.shape)}")
        if labels.shape != coords.shape[:1]:
            raise ValueError(f"point_labels must be [{len(coords)}], one for each point, is {list(labels.shape)}")
        if not _finite(coords) or not _finite(labels):
            raise ValueError("point_coords and point_labels must be finite numbers")
    if box is not None:
        shape = np.shape(box)
        if len(shape) == 2 and shape[1] == 4 and shape[0] > 1:
            raise ValueError(f"predict takes one box, is given {shape[0]}; predict_torch takes many")
        if math.prod(shape) != 4 or not _finite(box):  # in any shape: SAM's notebooks pass [1, 4]
            raise ValueError(f"box must be four finite numbers x1, y1, x2, y2, is {np.asarray(box).tolist()}")
    if mask_input is not None:
        shape = np.shape(mask_input)
        if len(shape) != 3 or shape[0] != 1 or not _finite(mask_input):
            raise ValueError(f"mask_input must be finite logits [1, h, w] of an earlier call, is {list(shape)}")


def senseless(
    point_coords: np.ndarray | None,
    point_labels: np.ndarray | None,
    box: np.ndarray | None,
    image_size: tuple[int, int],
) -> str | None:
    """What makes no sense in prompts of the right shapes, although SAM answers them; image_size (H, W)."""
    if point_labels is not None and point_coords is None:
        return "point_labels without point_coords"
    if point_labels is not None and not np.isin(point_labels, (-1, 0, 1)).all():
        return "point_labels must be 1 (object), 0 (background) or -1 (no point)"
    if box is not None:
        (height, width), (x1, y1, x2, y2) = image_size, np.asarray(box, float).reshape(4).tolist()
        if x2 <= x1 or y2 <= y1:
            return f"box must be x1, y1, x2, y2 with x1 < x2 and y1 < y2, is {[x1, y1, x2, y2]}"
        if x2 <= 0 or y2 <= 0 or x1 >= width or y1 >= height:
            return f"box {[x1, y1, x2, y2]} misses the image of {width} x {height} pixels"
    return None


def _finite(values: np.ndarray) -> bool:
    """Whether all are numbers, and finite."""
    try:
        return bool(np.isfinite(np.asarray(values, float)).all())
    except (TypeError, ValueError):
        return False


def points_outside(point_coords: np.ndarray | None, image_size: tuple[int, int]) -> list[tuple[float, float]]:
    """The points that lie more than half a pixel outside [0, W] x [0, H]."""
    if point_coords is None:
        return []
    height, width = image_size
    return [
        (x, y) for x, y in np.asarray(point_coords) if not (-0.5 <= x <= width + 0.5 and -0.5 <= y <= height + 0.5)
    ]
