"""Pictures and files of masks: what the page lays over the photo, and what it hands out at the photo's own size."""

from __future__ import annotations

import colorsys
import io
import json
from collections.abc import Iterable, Sequence
from typing import Any

import cv2
import numpy as np
from PIL import Image
from pycocotools import mask as rle_tools

from ..images import encode_image
from ..modeling.routing import Routing
from ..records import coco_annotation, coco_json, mask_record
from ..visualize import OBJECT, draw_heat, draw_prime, to_photo

FILL, EDGE = 140, 255  # opacity of a mask and of its edge, of 255


def png(pixels: np.ndarray) -> bytes:
    """Pixels as a PNG file, packed quickly rather than tightly."""
    return encode_image(pixels, "PNG", compress_level=1)


def mask_overlay(mask: np.ndarray) -> bytes:
    """bool [h, w] -> a transparent PNG: the mask in blue with a white edge."""
    indices = mask.astype(np.uint8)
    edges, _ = cv2.findContours(indices, cv2.RETR_LIST, cv2.CHAIN_APPROX_NONE)
    cv2.drawContours(indices, edges, -1, 2, max(1, round(max(mask.shape) / 500)))
    return _indexed_png(indices, [OBJECT, (255, 255, 255)], [FILL, EDGE])


def everything_overlay(records: Sequence[dict[str, Any]], size: tuple[int, int]) -> bytes:
    """Run-length records, large ones first -> a transparent PNG of `size` (h, w) with a colour for each."""
    indices = np.zeros(size, np.uint8)
    for number, record in enumerate(records):
        mask = rle_tools.decode(record["segmentation"])
        edges, _ = cv2.findContours(mask, cv2.RETR_LIST, cv2.CHAIN_APPROX_NONE)
        indices[mask > 0] = 1 + number % 254
        cv2.drawContours(indices, edges, -1, 255, 1)
    hues = [colorsys.hsv_to_rgb(number * 0.618 % 1, 0.75, 1.0) for number in range(254)]
    colours = [(round(255 * r), round(255 * g), round(255 * b)) for r, g, b in hues]
    return _indexed_png(indices, [*colours, (255, 255, 255)], [FILL] * 254 + [EDGE])


def _indexed_png(indices: np.ndarray, colours: list[tuple[int, int, int]], opacities: list[int]) -> bytes:
    """0 is transparent, i is colour i - 1; a few bits a pixel, so that it is small and quick to make."""
    image = Image.fromarray(indices).convert("P")
    image.putpalette([part for colour in [(0, 0, 0), *colours] for part in colour])
    buffer = io.BytesIO()
    bits = next(b for b in (1, 2, 4, 8) if len(colours) < 2**b)
    image.save(buffer, "PNG", transparency=bytes([0, *opacities]), bits=bits, compress_level=1)
    return buffer.getvalue()


def routing_picture(preview: np.ndarray, routing: Routing, input_size: tuple[int, int], stage: int | None) -> bytes:
    """Prime tokens of a stage, from 0, or (None) how often each token was prime, over the preview, as a JPEG file.

    preview uint8 [h, w, 3]; input_size (h, w): what the photo covers of the encoder's square.
    """
    masks = [one.mask[0].cpu().numpy().astype(np.uint8) for one in routing.stages]
    if stage is None:
        often = to_photo(np.stack(masks).sum(0, dtype=np.uint8), input_size, preview.shape[:2])
        picture = draw_heat(preview, often / len(masks), "viridis")
    else:
        picture = draw_prime(preview, to_photo(masks[stage], input_size, preview.shape[:2]) > 0)
    return encode_image(picture, "JPEG", quality=88)


def cut_out(pixels: np.ndarray, mask: np.ndarray) -> bytes:
    """Photo uint8 [H, W, 3] and mask bool [H, W] -> an RGBA PNG, transparent outside of the mask."""
    return png(np.dstack([pixels, mask * np.uint8(255)]))


def coco_file(found: Iterable[tuple[np.ndarray, float]], file_name: str, size: tuple[int, int]) -> bytes:
    """Masks bool [H, W] with their scores -> COCO's json, as bytes."""
    annotations = [coco_annotation(mask_record(mask, score)) for mask, score in found]
    return json.dumps(coco_json([(file_name, size, annotations)]), indent=1).encode()
