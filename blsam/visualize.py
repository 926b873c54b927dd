"""Pictures of masks and prompts, and of where the encoder spent its wide blocks."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import cv2
import matplotlib
import numpy as np
from matplotlib.figure import Figure

from .modeling.routing import Routing
from .modeling.windows import PATCH

OBJECT, POSITIVE, NEGATIVE = (30, 144, 255), (60, 200, 60), (230, 50, 50)


def draw_mask(
    image: np.ndarray,
    mask: np.ndarray,
    points: Sequence[tuple[float, float, int]] = (),
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


# --- routing ---------------------------------------------------------------------------------------------------------


def to_photo(tokens: np.ndarray, input_size: tuple[int, int], photo_size: tuple[int, int]) -> np.ndarray:
    """A value for each token -> one for each pixel of the photo: [S/16, S/16] -> [H, W], without the padding.

    input_size (h, w): what the photo covers of the S x S frame; photo_size (H, W).
    """
    h, w = input_size
    pixels = tokens.repeat(PATCH, 0).repeat(PATCH, 1)[:h, :w]
    return cv2.resize(pixels, photo_size[::-1], interpolation=cv2.INTER_NEAREST)


def draw_prime(image: np.ndarray, prime: np.ndarray) -> np.ndarray:
    """The photo where tokens are prime, bool [H, W], and a dark grey shadow of it elsewhere; uint8 [H, W, 3]."""
    grey = image.mean(-1, keepdims=True).repeat(3, -1)
    return np.where(prime[..., None], image, (0.25 * grey).astype(np.uint8))


def draw_heat(image: np.ndarray, values: np.ndarray, colours: str = "inferno") -> np.ndarray:
    """Values [H, W] in [0, 1] as colours over the photo's greys; uint8 [H, W, 3]."""
    heat = matplotlib.colormaps[colours](values)[..., :3] * 255
    grey = image.mean(-1, keepdims=True)
    return (0.75 * heat + 0.25 * grey).astype(np.uint8)


def routing_figure(
    image: np.ndarray, routing: Routing, input_size: tuple[int, int], layers: tuple[int, ...]
) -> Figure:
    """Prime tokens and scores of every stage, and how often each token was prime.

    image uint8 [H, W, 3]; routing of one photo, `layers` after which its predictors stand, for the titles. Scores are
    scaled to their own range in each stage, which the title states. ValueError for an exact model's routing,
    or one without scores.
    """
    if not routing.stages:
        raise ValueError("an exact model has no routing: all its tokens run through every block")
    masks = [stage.mask[0].cpu().numpy() for stage in routing.stages]
    scores = [stage.scores[0].cpu().numpy() for stage in routing.stages if stage.scores is not None]
    if len(scores) < len(masks):
        raise ValueError("a routing without scores cannot be drawn: take the one that `encode` gives back")
    return _stages_figure(image, masks, scores, layers, lambda tokens: to_photo(tokens, input_size, image.shape[:2]))


def class_routing_figure(
    image: np.ndarray, routing: Routing, grid: tuple[int, int], layers: tuple[int, ...]
) -> Figure:
    """As `routing_figure`, of a classifier, with the patches that were prime in every stage (the paper's figure 3).

    image uint8 [S, S, 3], what the classifier saw; routing of it, with masks [1, 1 + n] of grid (h, w) patches.
    ValueError for a plain model's routing.
    """
    if not routing.stages:
        raise ValueError("a plain model has no routing: all its tokens run through every block")
    patches = [(stage.mask[0, 1:], stage.scores) for stage in routing.stages]
    masks = [mask.view(grid).cpu().numpy() for mask, _ in patches]
    scores = [of_all[0, 1:].view(grid).cpu().numpy() for _, of_all in patches if of_all is not None]
    if len(scores) < len(masks):
        raise ValueError("a routing without scores cannot be drawn: take the one that `encode` gives back")

    def to_pixels(tokens: np.ndarray) -> np.ndarray:
        return cv2.resize(tokens, image.shape[1::-1], interpolation=cv2.INTER_NEAREST)

    return _stages_figure(image, masks, scores, layers, to_pixels, every=True)


def _stages_figure(
    image: np.ndarray,
    masks: Sequence[np.ndarray],
    scores: Sequence[np.ndarray],
    layers: tuple[int, ...],
    to_pixels: Callable[[np.ndarray], np.ndarray],
    every: bool = False,
) -> Figure:
    """Two rows of panels, a column for the photo and for each stage; every: one more, of all stages together."""
    size, stages = image.shape[:2], len(masks)
    width, columns = 3.2, stages + 1 + every
    figure = Figure((width * columns, 2 * (width * size[0] / size[1] + 0.45)), layout="constrained")
    axes = figure.subplots(2, columns)
    chosen = to_pixels(np.stack(masks).sum(0, dtype=np.uint8))
    panels = [(axes[0, 0], image, "photo")]
    panels.append((axes[1, 0], draw_heat(image, chosen / stages, "viridis"), f"times prime, 0 to {stages}"))
    if every:
        panels.append((axes[0, -1], draw_prime(image, chosen == stages), "prime in every layer"))
        panels.append((axes[1, -1], draw_prime(image, chosen == 0), "in none"))
    for i, (mask, score) in enumerate(zip(masks, scores), 1):
        prime, pixels = to_pixels(mask.astype(np.uint8)), to_pixels(score)
        low, high = pixels.min(), pixels.max()
        share = 100 * prime.mean()
        panels.append((axes[0, i], draw_prime(image, prime > 0), f"after layer {layers[i - 1]}: {share:.0f} % prime"))
        heat = draw_heat(image, (pixels - low) / max(high - low, 1e-9))
        panels.append((axes[1, i], heat, f"scores {low:.2f} to {high:.2f}"))
    for axis, picture, title in panels:
        axis.imshow(picture)
        axis.set_title(title, fontsize=10)
        axis.axis("off")
    return figure
