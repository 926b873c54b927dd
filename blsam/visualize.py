"""Pictures of masks and prompts."""

from __future__ import annotations

import cv2
import numpy as np

OBJECT, POSITIVE, NEGATIVE = (30, 144, 255), (60, 200, 60), (230, 50, 50)


def draw_mask(
    image: np.ndarray,
    mask: np.ndarray,
    points: list[tuple[float, float, int]] = (),
    box: tuple[float, float, float, float] | None = None,
) -> np.ndarray:
    """The mask in blue with a white edge over the photo, and its prompts.

    image uint8 [H, W, 3] RGB; mask bool [H, W]; points as x, y, label; box x1, y1, x2, y2 -> uint8 [H, W, 3].
    """
    out = image.copy()
    out[mask] = (0.45 * image[mask] + 0.55 * np.array(OBJECT)).astype(np.uint8)
    unit = max(1, round(max(image.shape[:2]) / 400))  # line widths grow with the photo
    edges, _ = cv2.findContours(mask.astype(np.uint8), cv2.RETR_LIST, cv2.CHAIN_APPROX_NONE)
    cv2.drawContours(out, edges, -1, (255, 255, 255), unit, cv2.LINE_AA)
    if box is not None:
        x1, y1, x2, y2 = (round(v) for v in box)
        cv2.rectangle(out, (x1, y1), (x2, y2), POSITIVE, 2 * unit, cv2.LINE_AA)
    for x, y, label in points:
        centre = (round(x), round(y))
        cv2.circle(out, centre, 5 * unit, (255, 255, 255), -1, cv2.LINE_AA)
        cv2.circle(out, centre, 4 * unit, POSITIVE if label else NEGATIVE, -1, cv2.LINE_AA)
    return out
